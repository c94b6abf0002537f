"""`fastsde sample` and `fastsde bench` for a folder with a token model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastsde import tokens
from fastsde.cli.job import Request, Source, draw
from fastsde.cli.output import versions
from fastsde.cli.solver_options import Steps, configured
from fastsde.evaluation.images import to_uint8
from fastsde.evaluation.sweep import Cell

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

    Solvers are such as "Unmask:order=confidence,choice_temperature=4.5".
    """
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
    """The solver that the options mean; None where `default` stands for nothing said: rtol or nfe then chooses."""
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
    return cast(tokens.TokenSolver, steps.counted(configured(solver, steps.options)))


def open_tokens(request: Request, default: str, labels: Callable[[int, Tensor], Tensor | None]) -> Source:
    """A token model as `fastsde sample` draws from it; `labels` says the classes of samples, of how many there are."""
    opened, steps = tokens.load_tokens(Path(request.model), request.device), request.steps
    solver = token_solver(steps, default, opened.critic)
    asked: dict[str, Any] = {"solver": solver, "rtol": steps.rtol, "nfe": steps.nfe}
    tokens.resolve(opened.model, controller=None, event=opened.model.event_shape or (), **asked)
    record: dict[str, Any] = {"model": request.model, "weights_sha256": opened.weights_sha256}
    record |= {"solver": repr(solver), "rtol": steps.rtol, "nfe_budget": steps.nfe}
    record |= {"batch_size": request.batch_size, "device": torch.device(request.device).type, "versions": versions()}

    drawn = partial(draw, opened.model, seed=request.seed, batch_size=request.batch_size, **asked)
    images = None if opened.book is None else lambda kept: to_uint8(opened.images(kept), (-1.0, 1.0))
    return Source(drawn, partial(labels, opened.classes), images, record)
