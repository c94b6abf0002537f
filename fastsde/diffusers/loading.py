"""Loading: folders, names on the hub, single safetensors files; never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastsde.diffusers.networks import offloaded_to
from fastsde.diffusers.schedules import filled

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
"""The files of a network in diffusers' layout."""
_EMA = ("ema_unet", "unet_ema", "ema")
"""Subfolders in which repositories keep averaged weights beside the others."""
_SCHEDULERS = ("scheduler_config.json", "scheduler/scheduler_config.json", "../scheduler/scheduler_config.json")
"""Where the configuration of a scheduler may be, seen from the folder of a network."""
_OPTIONS = {
    *("cache_dir", "device_map", "dtype", "local_files_only", "low_cpu_mem_usage", "max_memory", "revision", "token"),
    *("torch_dtype", "use_safetensors", "variant"),
}
"""Arguments of diffusers' `from_pretrained` that say where and how, not what."""


def load(
    source: str | Path,
    scheduler: Any = None,
    *,
    subfolder: str | None = None,
    ema: bool | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Loads a pipeline or a network, and its scheduler, in evaluation mode.

    Weights are averaged ones where a folder has both: networks in `ema_unet` (or `unet_ema`, `ema`) replace the
    pipeline's. What was taken is written on the network, as `network.fastsde_source`: path, subfolder and whether it
    is an average.

    Args:
        source: a folder of a pipeline (`model_index.json`) or of a network (`config.json`); a name on the hub; or a
            single `.safetensors` file, beside its `config.json` or with `config=`.
        scheduler: a scheduler or its configuration, in the place of the one that belongs to the model.
        subfolder: where in the source the network is, if it is to be loaded alone.
        ema: True to insist on averaged weights, False to leave them; taken where they are by default.
        config: for a single file, the folder of the pipeline whose weights it holds.
        options: of diffusers' `from_pretrained`: `dtype` (or its old name `torch_dtype`), `variant`, `revision`,
            `device_map`, `local_files_only`.

    Returns:
        A pipeline or a network, and a scheduler or its configuration (None: the pipeline's).

    Raises:
        FileNotFoundError: if there is nothing there, naming what was looked for.
        ValueError: for pickled weights, or `ema=True` where there are none.
        ImportError: if diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("loading a diffusers model needs diffusers: pip install 'fastsde[diffusers]'.") from error
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise TypeError(f"no option {', '.join(unknown)}; load passes on {', '.join(sorted(_OPTIONS))}.")
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    path = Path(source)
    if path.is_file() or path.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth"):
        return _load_file(path, scheduler, config, options)
    local = path.is_dir()
    if not local and (path.is_absolute() or str(source).count("/") > 1 or str(source).startswith(".")):
        raise FileNotFoundError(f"no folder {source}; a name on the hub looks like 'google/ddpm-cifar10-32'.")
    options = {"use_safetensors": True, **options}
    taken = local and ema is not False
    averaged = next((name for name in _EMA if (path / name / CONFIG).is_file()), None) if taken else None
    if ema and averaged is None and subfolder is None:
        raise ValueError(f"ema=True, but {source} has none of the folders {', '.join(_EMA)}; or give subfolder=.")
    whole = (path / "model_index.json").is_file() if local else subfolder is None
    if whole and subfolder is None:
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(source), **options)
        except AttributeError as error:
            raise ValueError(
                f"{source} names a pipeline or part that this diffusers does not have: {error}."
            ) from error
        name = next((k for k in ("transformer", "unet") if getattr(pipe, k, None) is not None), None)
        if name is None:  # priors and decoders of several stages
            return pipe, scheduler
        if averaged is not None:
            network = diffusers.AutoModel.from_pretrained(str(source), subfolder=averaged, **options)
            pipe.register_modules(**{name: network.to(getattr(pipe, name).device)})
        _mark(getattr(pipe, name), source, averaged or name)
        return pipe, scheduler
    subfolder = averaged if subfolder is None else subfolder
    folder = path if subfolder is None else path / subfolder
    if local and not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds neither model_index.json nor {CONFIG}: no diffusers model.")
    network = diffusers.AutoModel.from_pretrained(str(source), subfolder=subfolder, **options)
    _mark(network, source, subfolder)
    if scheduler is None:
        found = next((folder / name for name in _SCHEDULERS if (folder / name).is_file()), None) if local else None
        if found is None:
            raise FileNotFoundError(f"no scheduler_config.json in or beside {folder}; give scheduler=.")
        scheduler = filled(json.loads(found.read_text()))
    return network, scheduler


def _load_file(path: Path, scheduler: Any, config: str | Path | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """A network beside its configuration, or the pipeline of a known layout."""
    import diffusers

    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no safetensors file. Pickled weights are refused: they can run code.")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    if config is not None:
        index = Path(config) / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(f"config= must be the folder of a pipeline; {index} is missing.")
        kind = getattr(diffusers, json.loads(index.read_text())["_class_name"])
        pipe = kind.from_single_file(str(path), config=str(config), **options)
        _mark(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, path, None)
        return pipe, scheduler
    if path.name != WEIGHTS or not (path.parent / CONFIG).is_file():
        raise ValueError(
            f"{path} says nothing of its network: put it beside its {CONFIG} as {WEIGHTS}, or give config=, the folder "
            "of a pipeline with that layout."
        )
    return load(path.parent, scheduler, ema=False, **options)


def _mark(network: Any, source: str | Path, subfolder: str | None) -> None:
    network.eval()
    missing = [name for name, weight in network.named_parameters() if weight.is_meta]
    if missing and offloaded_to(network) is None:
        raise ValueError(f"{source} lacks weights of its network: {', '.join(missing[:5])} ({len(missing)} in all).")
    average = subfolder is not None and "ema" in subfolder
    network.fastsde_source = {"path": str(source), "subfolder": subfolder, "ema": average}
