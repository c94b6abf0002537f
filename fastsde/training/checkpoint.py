"""Checkpoints of a training run: all that it needs to go on to the same numbers, in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastsde.files import as_json, differences, write_whole

History = dict[str, list[float]]
"""The losses of every step so far, by name."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, by name, and its metadata.

    Raises:
        ValueError: if it is damaged, naming it.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def save_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    settings: dict[str, Any],
    history: History,
) -> None:
    """Writes weights, averages, optimiser states, settings and losses to one safetensors file, atomically."""
    tensors = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{i}.{k}": v for k, v in state.items()}
    tensors |= {f"history.{name}": torch.tensor(values, dtype=torch.float64) for name, values in history.items()}
    meta = {"step": str(len(history["loss"])), "config": json.dumps(settings)}
    write_whole(path, save({k: v.contiguous() for k, v in tensors.items()}, meta))


def load_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    settings: dict[str, Any],
    losses: list[str],
) -> History:
    """Restores what `save_checkpoint` wrote and returns the losses so far; their number is the next step.

    `steps` may differ from the run that wrote it: the schedule of the learning rate follows the new value.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if settings or network differ from those of the checkpoint, or the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; start without --resume.")
    tensors, meta = read_tensors(path)
    if not {"step", "config"} <= meta.keys():
        raise ValueError(f"{path} is no checkpoint of `fastsde train`.")
    wanted = as_json(settings)
    if changed := differences(json.loads(meta["config"]) | {"steps": wanted["steps"]}, wanted):
        raise ValueError(f"{path} was written with other settings ({changed}).")
    history = {name: tensors.get(f"history.{name}", torch.zeros(0)).tolist() for name in losses}
    if any(str(len(values)) != meta["step"] for values in history.values()):
        raise ValueError(f"{path} does not hold the losses of its {meta['step']} steps: another version wrote it.")
    if int(meta["step"]) > int(wanted["steps"]):
        raise ValueError(f"{path} is at step {meta['step']}, beyond the {wanted['steps']} steps asked for.")
    for name, module in modules.items():
        part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(f"{path} holds another network: {error}") from error
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{name}."):
                i, field = key.removeprefix(f"{name}.").split(".", 1)
                state.setdefault(int(i), {})[field] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return history
