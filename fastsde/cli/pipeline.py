"""`fastsde sample --pipeline`: any pipeline of diffusers, with the arguments of its own call."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.cli.media import MADE, Media, are_images, read_value
from fastsde.cli.output import dump_json, finished, prepare_folder, result_record, tell, versions, write_atomic
from fastsde.cli.solver_options import Steps
from fastsde.diffusers import PipelineResult, load, sample_pipeline
from fastsde.evaluation.jobs import MANIFEST
from fastsde.files import read_json
from fastsde.score.network import weights_hash
from fastsde.steps import DEFAULT_RTOL

_OPTIONS = {"prompt": "--prompt", "negative_prompt": "--negative-prompt", "guidance_scale": "--guidance-scale"}
"""Arguments of calls that have an option of their own."""
_OURS = {"generator": "--seed says the noise", "return_dict": "files are written", "batch_size": "-n says how many"}
"""Arguments of calls that the command gives itself, and why."""
_RESERVED = inspect.signature(sample_pipeline).parameters.keys() - {"prompt", "arguments"}
_RECORD = "samples.json"


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a pipeline's call, as the command line says them: `values` for all samples, and `per_sample`.

    The number of samples n is None where the arguments say it. The record has values, or names and SHA-256 of files.
    """

    values: dict[str, Any]
    per_sample: dict[str, list[Any]]
    n: int | None
    record: dict[str, Any]

    @classmethod
    def read(cls, options: Mapping[str, Any], settings: Sequence[str], n: int | None) -> Call:
        """Reads the files too; of the options in `_OPTIONS` those not given are None, and `settings` are KEY=VALUE."""
        given = {key: value for key, value in options.items() if value is not None}
        record = dict(given)
        for text in settings:
            key, equals, value = text.partition("=")
            if not equals or not key.isidentifier():
                raise ValueError(f"--set must be KEY=VALUE, such as height=512 or image=@in.png; got {text[:80]!r}.")
            if key in _OURS:
                raise ValueError(f"--set {key}: {_OURS[key]}.")
            if key in _RESERVED:
                raise ValueError(f"--set {key}: this is fastsde's, not the pipeline's; see fastsde sample --help.")
            if key in given:
                raise ValueError(f"{key} is given twice: --set {key} and {_OPTIONS.get(key, 'another --set')}.")
            try:
                given[key], record[key] = read_value(value)
            except ValueError as error:
                raise ValueError(f"--set {key}: {error}") from error
        per_sample = {}
        prompts = list(options["prompt"] or [])
        if len(prompts) > 1:
            n = n or len(prompts)
            per_sample["prompt"] = [prompts[k % len(prompts)] for k in range(n)]
        for key, value in given.items():
            # Pictures of a folder or a video belong together, also where there are as many as samples.
            if n is not None and are_images(value):
                per_sample[key] = [value] * n
        values = {key: value for key, value in given.items() if key not in per_sample}
        if len(prompts) == 1:
            values["prompt"] = record["prompt"] = prompts[0]
        return cls(values, per_sample, n, record)

    def check(self, kind: type) -> None:
        """Refuses what the call of a class does not take."""
        takes = {k: p for k, p in inspect.signature(kind.__call__).parameters.items() if p.kind is not p.VAR_KEYWORD}
        if unknown := [key for key in self.record if key not in takes]:
            known = ", ".join(key for key in takes if key not in ("self", *_OURS))
            raise ValueError(
                f"{kind.__name__} takes no {', '.join(unknown)}; its call takes {known}. --class chooses another class "
                "of diffusers for the same parts."
            )

    def placed(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The values with arrays where the pipeline is, floats in its dtype."""
        return {
            key: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for key, value in self.values.items()
        }


def run_pipeline(
    source: str,
    call: Call,
    steps: Steps,
    *,
    kind: str | None,
    seed: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    fps: float,
    out: Path,
    as_json: bool,
) -> None:
    """Draws samples and writes their files.

    Raises:
        ValueError, TypeError, OSError, ImportError, RuntimeError: before the first network call, naming the option or
            argument; later if the pipeline cannot be sampled, and nothing is written.
        click.ClickException: if a file cannot be written, or nothing was finished.
        SystemExit: with status 1 if a sample failed or is missing.
    """
    counted = "num_inference_steps" in call.values
    solver, _ = steps.build(counted=counted)
    known = _class(source, kind)
    if known is not None:
        call.check(known)
    if (out / MANIFEST).is_file():
        raise ValueError(f"--out {out} holds a job of `fastsde sample --model`; choose another folder.")
    prepare_folder(out, needed=1 << 20)
    pipe = _opened(source, known if kind else None, dtype)
    call.check(type(pipe))
    pipe.to(device)
    said: dict[str, Any] = {"rtol": steps.rtol, "atol": steps.atol, "nfe": steps.nfe, **call.placed(device, dtype)}
    said |= {"per_sample": call.per_sample, "n": call.n, "seed": seed, "batch_size": batch_size}
    draw = partial(sample_pipeline, pipe, solver=solver, **said)
    drawn, failed = finished(draw)
    media = Media(_rate(pipe), fps, raw=call.values.get("output_type", "pil") != "pil")
    for output in drawn.outputs:
        media.add(output)
    adaptive = solver.adaptive and steps.nfe is None and not counted
    record = {
        **result_record(drawn.result),
        "files": media.files,
        "outputs": media.more,
        "errors": {str(place): f"{type(e).__name__}: {e}" for place, e in drawn.errors.items()},
        "forwards": drawn.forwards,
        "separate": drawn.separate,
        "pipeline": source,
        "class": type(pipe).__name__,
        **_weights(pipe),
        "dtype": str(dtype),
        "arguments": call.record,
        "solver": repr(solver),
        "nfe_budget": steps.nfe,
        "steps": steps.steps,
        "rtol": DEFAULT_RTOL if adaptive and steps.rtol is None else steps.rtol,
        "atol": steps.atol,
        "batch_size": batch_size,
        "device": device.type,
        "versions": versions("diffusers", "transformers"),
    }
    files = _write(out, drawn, media, record)
    more = [f"forwards of the networks: {drawn.forwards}"]
    if drawn.separate and len(drawn.outputs) > 1:
        more.append(f"calls were not joined: {drawn.separate}")
    tell(drawn.result, record, _shown(files), more, as_json=as_json, failed=failed)


def _class(source: str, name: str | None) -> type | None:
    """The class that will be called, read off the index alone; None if that does not tell it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("--pipeline needs diffusers: pip install 'fastsde[diffusers]'.") from error
    folder = Path(source)
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"--pipeline {source}: there is no such folder, and it is no name of the hub (owner/name).")
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"--pipeline {source} holds no model_index.json, so no pipeline; a network is for --model.")
    stated = name
    if stated is None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # loading says what is wrong
            stated = str(diffusers.DiffusionPipeline.load_config(source)["_class_name"])
    kind = getattr(diffusers, stated or "", None)
    if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
        return kind
    if name is not None:
        raise ValueError(f"--class {name}: diffusers {diffusers.__version__} has no such pipeline.")
    return None


def _opened(source: str, kind: type | None, dtype: torch.dtype) -> Any:
    """The pipeline; of another class, its parts put together anew."""
    pipe, _ = load(source, dtype=dtype)
    if not hasattr(pipe, "components"):
        raise ValueError(f"--pipeline {source} is a network, no pipeline; a network is for --model.")
    if kind is None or type(pipe) is kind:
        return pipe
    there = {**pipe.config, **pipe.components}
    places = [p for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD]
    if missing := [p.name for p in places if p.name not in there and p.default is p.empty]:
        raise ValueError(f"--class {kind.__name__} needs {', '.join(missing)}, which {source} has not.")
    return kind(**{p.name: there[p.name] for p in places if p.name in there})


def _weights(pipe: Any) -> dict[str, Any]:
    """Where the networks are from, and their hash: that which fitted solvers are compared with."""
    from fastsde.diffusers.loop import denoisers

    networks = denoisers(pipe)
    if not networks:
        return {"weights_sha256": None, "source": {}}
    one = next(iter(networks.values())) if len(networks) == 1 else nn.ModuleList(networks.values())
    source = {name: getattr(network, "fastsde_source", None) for name, network in networks.items()}
    return {"weights_sha256": weights_hash(one), "source": source}


def _rate(pipe: Any) -> int | None:
    """Samples of sound in a second that the last of the decoders makes."""
    for part in ("vocoder", "vae"):
        config = getattr(getattr(pipe, part, None), "config", None)
        for name in ("output_sampling_rate", "sampling_rate"):
            if rate := getattr(config, name, None):
                return int(rate)
    return None


def _write(out: Path, drawn: PipelineResult, media: Media, record: dict[str, Any]) -> list[Path]:
    """Writes all files, and removes those of an earlier run that are not replaced.

    Last states without an output, as where a decoder failed, go to latents.npz.
    """
    before = _earlier(out)
    writers = media.finish()
    result = drawn.result
    whole = torch.isfinite(result.samples.flatten(1)).all(1)
    bare = [k for k, output in enumerate(drawn.outputs) if output is None and whole[k]]
    if bare:
        latents, index = result.samples[bare].float().cpu().numpy(), result.index[bare].cpu().numpy()
        writers["latents.npz"] = {"arr_0": latents, "index": index}
    writers[_RECORD] = dump_json(record).encode()
    files = write_atomic(out, writers)
    for name in before - writers.keys():
        (out / name).unlink(missing_ok=True)
    return files


def _shown(files: Sequence[Path]) -> list[str]:
    """The files of samples in one line, then the others."""
    made, rest = ([path for path in files if path.name[0].isdigit() is is_made] for is_made in (True, False))
    first = [f"{made[0]}{f' .. {made[-1].name}' if len(made) > 1 else ''}"] if made else []
    return [*first, *map(str, rest)]


def _earlier(out: Path) -> set[str]:
    """Files that an earlier run wrote here, as its record says."""
    names = {"samples.npz", "latents.npz", "grid.png"}
    try:
        files = read_json(out / _RECORD).get("files", [])
    except (OSError, ValueError):
        return names
    lists = [some for some in files if isinstance(some, list)] if isinstance(files, list) else []
    return names | {name for some in lists for name in some if isinstance(name, str) and MADE.fullmatch(name)}
