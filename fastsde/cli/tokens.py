"""`fastsde sample` and `fastsde bench` for a folder with a token model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastsde import api, tokens
from fastsde.cli.output import dump_json, finished, prepare_folder, result_record, tell, versions, write_atomic
from fastsde.cli.solver_options import Steps, configured
from fastsde.evaluation.images import image_grid, to_uint8
from fastsde.evaluation.sweep import Cell
from fastsde.files import Content
from fastsde.result import SampleResult

NAMES = {solver.__name__: solver for solver in tokens.SOLVERS}
SWEPT = "EntropyBudget Unmask Unmask:order=confidence,choice_temperature=4.5"
"""Solvers of a sweep where nobody says."""


def is_token_model(name: str) -> bool:
    """Whether `--model` names a folder with a token model."""
    return (Path(name) / tokens.folder.CARD).is_file()


def token_cells(
    opened: tokens.TokenFolder, solvers: Sequence[str], nfe: Sequence[int], rtol: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """The cells of a sweep over token solvers, every combination that a solver takes.

    Args:
        opened: the folder, with the model and perhaps a critic.
        solvers: such as "EntropyBudget", "Unmask:order=confidence,choice_temperature=4.5".
        nfe: budgets, for solvers that take a number of steps.
        rtol: tolerances, for solvers that take one.
        seeds: seeds.

    Raises:
        ValueError: if a solver or an option is unknown, or a solver takes none of budgets and tolerances.
    """
    if not nfe and not rtol:
        raise ValueError("give --nfe, --rtol or both.")
    cells, event = [], opened.model.event_shape or ()
    for label in solvers:
        name, _, text = label.partition(":")
        solver = token_solver(Steps(solver=name, options=tuple(filter(None, text.split(",")))), "", opened.critic)
        found, refused = [], ""
        for budget, tolerance in (*((v, None) for v in nfe), *((None, v) for v in rtol)):
            try:
                tokens.resolve(opened.model, solver=solver, controller=None, rtol=tolerance, nfe=budget, event=event)
            except ValueError as error:
                refused = str(error)
            else:
                found += [Cell(cast(Any, solver), label, budget, tolerance, seed) for seed in seeds]
        if not found:
            raise ValueError(f"--solvers {label}: {refused}")
        cells += found
    return cells


def token_solver(steps: Steps, default: str, critic: tokens.Critic | None) -> tokens.TokenSolver | None:
    """The solver that the options mean; None where nothing is said, so that a tolerance or a budget chooses.

    Args:
        steps: what the command line says.
        default: the name that stands for nothing said.
        critic: that of the folder.

    Raises:
        ValueError: if options are for score models, the name is none of tokens, or the critic is missing.
    """
    if others := [f"--{name}" for name in ("atol", "grid", "fitted") if getattr(steps, name) is not None]:
        raise ValueError(f"{', '.join(others)} is for score models; this one has tokens.")
    name = "Unmask" if steps.solver == default and steps.steps is not None else steps.solver
    if name == default:
        if steps.options:
            raise ValueError(f"-o needs --solver, one of {', '.join(NAMES)}.")
        return None
    if name not in NAMES:
        raise ValueError(f"--solver {name} is for score models; solvers of tokens are {', '.join(NAMES)}.")
    if name == "TokenCritic" and critic is None:
        raise ValueError("--solver TokenCritic needs a folder with a critic.")
    solver = tokens.TokenCritic(critic) if name == "TokenCritic" else NAMES[name]()
    solver = cast(tokens.TokenSolver, configured(solver, steps.options))
    if steps.steps is None:
        return solver
    if "steps" not in {field.name for field in dataclasses.fields(cast(Any, solver))}:
        raise ValueError(f"--solver {name} takes no number of steps; give --rtol or --nfe.")
    return dataclasses.replace(cast(Any, solver), steps=steps.steps)


def sample_tokens(
    name: str,
    steps: Steps,
    default: str,
    labels: Any,
    *,
    n: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    out: Path,
    as_json: bool,
) -> None:
    """Draws from a token model and writes samples.npz (tokens; images under arr_0), grid.png and samples.json.

    Args:
        name: the folder.
        steps: what the command line says of solver and steps.
        default: the solver's name that stands for nothing said.
        labels: classes for (number of classes, sample numbers), or None.
        n, seed, batch_size, device, out, as_json: as the options.
    """
    opened = tokens.load_tokens(Path(name), device)
    solver = token_solver(steps, default, opened.critic)
    index = torch.arange(n)
    chosen = labels(opened.classes, index)
    prepare_folder(out, needed=1 << 24)
    cond = None if chosen is None else {"class_labels": chosen}
    asked = {"solver": solver, "rtol": steps.rtol, "nfe": steps.nfe, "seed": seed, "batch_size": batch_size}
    result, failed = finished(
        lambda: api.sample(opened.model, index=index, cond=cond, progress=True, **asked)  # type: ignore[arg-type]
    )
    record = result_record(result) | {"model": name, "weights_sha256": opened.weights_sha256}
    record |= {"solver": repr(solver), "rtol": steps.rtol, "nfe_budget": steps.nfe, "versions": versions()}
    record |= {"report": {key: value.tolist() for key, value in (result.report or {}).items()}}
    record["label"] = None if chosen is None else chosen.tolist()
    files = _write(out, result, chosen, record, opened)
    tell(result, record, files, as_json=as_json, failed=failed)


def _write(
    out: Path, result: SampleResult, labels: Tensor | None, record: dict[str, Any], opened: tokens.TokenFolder
) -> list[Path]:
    """Writes the files; samples with a mask left appear in the record alone."""
    whole = (result.samples != tokens.MASK).flatten(1).all(1)
    record["in_npz"] = result.index[whole].tolist()
    kept = result.samples[whole]
    arrays = {"tokens": kept.cpu().numpy()} | ({} if labels is None else {"arr_1": labels[whole.cpu()].numpy()})
    writers: dict[str, Content] = {"samples.json": dump_json(record).encode()}
    if opened.book is not None and len(kept):
        images = to_uint8(opened.images(kept), (-1.0, 1.0))
        arrays["arr_0"] = images
        writers["grid.png"] = image_grid(images[:64]).save
    else:
        (out / "grid.png").unlink(missing_ok=True)
    return write_atomic(out, {"samples.npz": arrays, **writers})
