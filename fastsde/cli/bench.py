"""`fastsde bench`."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from fastsde.checks import check_count
from fastsde.cli import options as option
from fastsde.cli.job import single_threaded
from fastsde.cli.measuring import reference_of
from fastsde.cli.models import open_model
from fastsde.cli.options import PATH
from fastsde.cli.output import prepare_folder, versions
from fastsde.cli.solver_options import GRIDS, SOLVER_NAMES, check_request, configured
from fastsde.cli.tokens import SWEPT, is_token_model, token_cells
from fastsde.evaluation.cluster import Make
from fastsde.evaluation.features import open_features
from fastsde.evaluation.jobs import MakeAll
from fastsde.evaluation.report import page, plot
from fastsde.evaluation.sweep import Cell, Problem, Sweep, result_of
from fastsde.files import write_whole
from fastsde.score.base import ScoreModel
from fastsde.steps import affordable
from fastsde.tokens import load_tokens

SOLVERS = "ExponentialPC ExponentialPC:eta=1 DPMSolverPP UniPC DEIS:grid=karras DDIM"


def _numbers(kind: type, text: str, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers, as in 10,20; got {text!r}.") from error


def build_cells(
    model: ScoreModel, solvers: Sequence[str], nfe: Sequence[int], rtol: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """The cells of a sweep, every combination that a solver takes.

    Solvers are such as "DPMSolverPP:order=3,grid=karras". Budgets are for those that walk a grid, and tolerances for
    those that adapt their steps.
    """
    cells = []
    for label in solvers:
        name, _, text = label.partition(":")
        if name not in SOLVER_NAMES:
            raise ValueError(f"--solvers: no solver {name!r}; there are {', '.join(SOLVER_NAMES)}.")
        options = [part for part in text.split(",") if part]
        grids = [part.removeprefix("grid=") for part in options if part.startswith("grid=")]
        solver = configured(SOLVER_NAMES[name](), [part for part in options if not part.startswith("grid=")])
        if grids and grids[-1] not in GRIDS:
            raise ValueError(f"--solvers {label}: no grid {grids[-1]!r}; there are {', '.join(GRIDS)}.")
        settings: list[tuple[int | None, float | None]] = []
        if getattr(type(solver), "adaptive", None) is not True:  # Algorithm 6 has no grid of its own to walk
            settings += [(budget, None) for budget in nfe]
        if solver.adaptive and not grids:
            settings += [(None, tolerance) for tolerance in rtol]
        if not settings:
            raise ValueError(f"--solvers {label} takes {'--nfe' if rtol else '--rtol'}, and none was given.")
        for (budget, tolerance), seed in itertools.product(settings, seeds):
            controller = None
            if grids and budget is not None:
                steps = affordable(model, solver, check_count("nfe", budget, 1), True)
                controller = GRIDS[grids[-1]](model.sde, steps)
            check_request(model, solver, controller, tolerance, None, None if controller else budget)
            cells.append(Cell(solver, label, budget, tolerance, seed, controller))
    return cells


@click.command()
@option.model
@click.option(
    "--solvers",
    default=SOLVERS,
    help="Names with options, separated by spaces: NAME:option=value,grid=karras. Of token models, their solvers.",
)
@click.option("--nfe", default="", help="Budgets of network calls, as in 10,20.", show_default="none")
@click.option("--rtol", default="", help="Tolerances, for adaptive solvers.", show_default="none")
@click.option("-n", "--number", "n", default=10_000, type=click.IntRange(1, 1 << 32), help="Samples of each cell.")
@click.option("--seeds", default=1, type=click.IntRange(1, 10_000), help="Seeds 0 .. SEEDS - 1.")
@option.features
@option.weights
@click.option("--reference", help="A file of `fastsde stats`; by default the one packaged with the features.")
@option.bootstrap
@option.dtype
@option.batch_size
@option.shard_size
@option.rank
@option.world_size
@option.device
@option.ray
@option.workers
@click.option("--out", required=True, type=PATH, help="Folder; the same command goes on in it.")
@click.pass_context
def bench(ctx: click.Context, **asked: Any) -> None:
    """Sample every cell, measure it, and draw NFE against FID.

    Writes results.jsonl and results.csv (a line for each cell), summary.csv (over seeds), plot.png and report.html,
    which needs no other file. Killed at any moment, the same command goes on where it stopped, to the same bytes. Other
    solvers, budgets and seeds may join in the same folder: name all that the tables shall hold, what is there is not
    drawn again. Other settings are refused. Any process that runs the same command in the same folder helps. With
    --rank and --world-size, or under `torchrun` and `accelerate launch`, it begins with shards of its own. With --ray
    the workers of a Ray cluster draw and measure, and this machine writes.

    \b
    Examples:
      fastsde bench --nfe 8,10,12,15 -n 10000 --seeds 3 --out runs/bench
      fastsde bench --solvers "ExponentialPC ExtrapolatedEM" --rtol 0.05,0.1 -n 2000 --out runs/rtol
      fastsde bench --model runs/tokens --nfe 8,18 --rtol 0.1 -n 2000 --out runs/tokens-bench
      torchrun --nproc-per-node 2 -m fastsde bench --nfe 10 --out runs/ten
      fastsde bench --nfe 10 --ray --workers 2 --out runs/ten
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shares = option.shares(ctx)
    place = "cpu" if asked["ray"] is not None else str(asked["device"])  # this process then only gives out work
    out = asked["out"]
    problem, cells = open_cells(asked | {"device": place})
    prepare_folder(out, needed=len(cells) * asked["n"] * math.prod(problem.image_shape) + (1 << 20))
    sweep = _sweep(out, problem, cells, asked)
    try:
        with option.ray_workers(ctx) as workers:
            make_all = None
            if workers is not None:
                open_maker = partial(sweep_maker, asked | {"device": workers.device})
                make_all = partial(workers.make_all, open_maker=open_maker, record=sweep.settings)
            _run(sweep, *shares, make_all)
    except KeyboardInterrupt as error:
        raise click.ClickException(f"interrupted; the same command goes on in {out}.") from error


def open_cells(asked: dict[str, Any]) -> tuple[Problem, list[Cell]]:
    """Opens model, features and reference that the options say, and combines solvers, budgets, tolerances, seeds."""
    model, solvers, features = asked["model"], asked["solvers"], asked["features"]
    device = torch.device(asked["device"])
    budgets, tolerances = _numbers(int, asked["nfe"], "--nfe"), _numbers(float, asked["rtol"], "--rtol")
    if not budgets and not tolerances:
        raise ValueError("give --nfe, --rtol or both.")
    seeds = range(asked["seeds"])
    judge = open_features(features, asked["weights"], device=str(device)), reference_of(asked["reference"], features)
    record = {"model": model, "versions": versions()}
    if is_token_model(model):
        opened = load_tokens(Path(model), device)
        names = (SWEPT if solvers == SOLVERS else solvers).split()
        cells = token_cells(opened, names, budgets, tolerances, seeds)
        record |= {"weights_sha256": opened.weights_sha256}
        problem = Problem(opened.model, *judge, record, opened.classes, opened.images)
    else:
        found = open_model(model, device, asked["dtype"])
        if found.pipe is not None:
            raise ValueError("bench takes score models, not pipelines: they sample through `fastsde sample`.")
        cells = build_cells(found.model, solvers.split(), budgets, tolerances, seeds)
        problem = Problem(found.model, *judge, {**record, **found.source}, found.classes)
    return problem, cells


def _sweep(folder: Path | None, problem: Problem, cells: list[Cell], asked: dict[str, Any]) -> Sweep:
    sizes = {name: asked[name] for name in ("batch_size", "shard_size")}
    return Sweep(folder, problem, cells, asked["n"], draws=asked["bootstrap"], **sizes)


def sweep_maker(asked: dict[str, Any]) -> tuple[Make, dict[str, Any]]:
    """In a worker: opens model and features; what makes shards and figures, and the settings of the sweep."""
    single_threaded(asked["device"])
    sweep = _sweep(None, *open_cells(asked), asked)
    return sweep.make, sweep.settings


def _run(sweep: Sweep, rank: int, world_size: int, make_all: MakeAll | None) -> None:
    with tqdm(total=len(sweep.cells) * sweep.n, desc="samples", unit="", smoothing=0.05, disable=None) as bar:
        for cell in sweep.run(rank=rank, world_size=world_size, progress=bar.update, make_all=make_all):
            tqdm.write(result_of(sweep.row(cell)))
    rows = sweep.rows()
    if len(rows) < len(sweep.cells):
        click.echo(f"{len(rows)} of {len(sweep.cells)} cells are complete; other processes draw the rest.")
        return
    write_report(sweep)
    click.echo(f"{sweep.folder / 'report.html'}")


def write_report(sweep: Sweep) -> None:
    """Writes tables, plot and page of a complete sweep."""
    summary = sweep.write_tables()
    title = f"{sweep.problem.record['model']}: NFE against FID, n = {sweep.n}"
    picture = plot(summary)
    strips = [
        (cell.setting, cell.label, sweep.images(cell, 32)) for cell in sweep.cells if cell.seed == sweep.cells[0].seed
    ]
    strips.sort(key=lambda strip: strip[0] if strip[0].startswith("rtol") else f"nfe {int(strip[0][4:]):9d}")
    provenance = {**sweep.settings, "seeds": sorted({cell.seed for cell in sweep.cells})}
    write_whole(sweep.folder / "plot.png", picture)
    write_whole(sweep.folder / "report.html", page(summary, picture, strips, provenance, title).encode())
