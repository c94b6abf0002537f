r"""Do restarts pay? `rtol` with finer grids behind the base grid against the plain grid at equal mean calls.

`rtol` alone is the plain grid of as many steps as the tolerance asks for. With restarts (`AdaptiveGrid`), a sample with
E > 1 at one of its steps starts again on a grid of half the steps' lengths, and then of a quarter. Errors are root mean
square distances of a sample to a run with many steps from the same noise, in thousandths of the data range: their mean
over samples, and their root mean square, which few samples rule. `ratio` is the error with restarts over that of the
plain grid, between its two nearest numbers of calls. E is the largest of a sample's steps on the base grid.

    python benchmarks/tolerance.py --images FOLDER    # networks of networks.py where they are trained
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch

# After this folder, which has a networks.py too.
sys.path.append(str(Path(__file__).parent / "peers"))
import networks
from common import packaged_model, save, table
from problems import digits, images, rare, scales
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.arguments import plain_grid, resolve_controller
from fastsde.control.base import Decision

RTOLS = (0.2, 0.1, 0.05, 0.02, 0.01)
Run = Callable[[fastsde.Controller], fastsde.SampleResult]


class Watched(fastsde.AdaptiveGrid):
    """The base grid alone, noting E of all rows at each step: all samples must be one batch, in step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seen", [])

    def update(
        self, t: Tensor, s: Tensor, t_end: float, error: Tensor | None, scale: Tensor | None, carry: dict[str, Tensor]
    ) -> Decision:
        """As of `AdaptiveGrid`."""
        scaled = error / (self.rtol * scale).clamp(min=self.atol)
        self.seen.append(scaled.flatten(1).double().square().mean(1).sqrt())
        return super().update(t, s, t_end, error, scale, carry)


def finer(grid: fastsde.Grid, sde: fastsde.SDE, parts: int) -> fastsde.Grid:
    """The grid with each step in that many, equal in log-SNR, and the same ends."""
    log_snr = sde.log_snr(grid.times)
    inner = log_snr[:-1, None] + log_snr.diff()[:, None] * torch.arange(parts) / parts
    times = torch.cat([sde.t_of_log_snr(inner.flatten()), grid.times[-1:]])
    times[0] = grid.times[0]
    return fastsde.Grid(times)


def problems(
    samples: int, starts: int, folder: str | None
) -> Iterator[tuple[str, fastsde.ScoreModel, int, Tensor | None]]:
    """Name, model, number of samples and classes."""
    exact = [digits(samples), scales(samples), rare(samples)]
    if folder is not None:
        exact.append(images(samples, folder))
    for problem in exact:
        yield problem.name, problem.model(), samples, None
    yield "packaged", packaged_model(untrained=False), starts, torch.arange(starts) % 10
    for name in ("flow", "clipped"):
        if (networks.FOLDER / f"{name}.safetensors").exists():
            yield name, networks.load(name), starts, None


def sampled(
    model: fastsde.ScoreModel, options: dict[str, object], controller: fastsde.Controller
) -> fastsde.SampleResult:
    """The samples of a model with a controller."""
    return fastsde.sample(model, controller=controller, **options)


def study(name: str, run: Run, model: fastsde.ScoreModel) -> list[dict[str, object]]:
    """Rows of the table for one problem."""
    sde, (low, high), rows = model.sde, model.data_range, []
    many = 200 if name in ("digits", "scales", "rare", "images") else 120
    central = plain_grid(sde, 9).ends[1] > sde.t_min  # whose reference then has its shape, and goes to the same end
    reference = run(plain_grid(sde, many) if central else fastsde.Grid.log_snr(sde, many)).samples
    known: dict[int, Tensor] = {}

    def errors(controller: fastsde.Controller) -> tuple[Tensor, Tensor]:
        r = run(controller)
        each = (r.samples - reference).double().flatten(1).square().mean(1).sqrt()
        return each * 1000 / (high - low), r.nfe.double()

    def plain(calls: int) -> Tensor:
        if calls not in known:
            known[calls] = errors(plain_grid(sde, calls - 1))[0]
        return known[calls]

    for rtol in tqdm(RTOLS, name, disable=None):
        solver = fastsde.ExponentialPC()
        base = resolve_controller(model, sde, solver, None, rtol, None).grids[0]
        rule = {"rtol": rtol, "atol": (high - low) / 256}
        watched = Watched([base], **rule)
        each, _ = errors(watched)
        known[base.steps + 1] = each
        largest = torch.stack(watched.seen).amax(0).double()
        row: dict[str, object] = {"problem": name, "rtol": rtol, "calls": base.steps + 1}
        row |= {"mean": float(each.mean()), "rms": float(each.square().mean().sqrt())}
        row |= {f"E {share:.0%}": float(largest.quantile(share)) for share in (0.5, 0.9, 0.97, 1.0)}
        row["again"] = float((largest > 1).double().mean())
        if (largest > 1).any():
            grids = [base, finer(base, sde, 2), finer(base, sde, 4)]
            found, calls = errors(fastsde.AdaptiveGrid(grids, **rule))
            paid = float(calls.mean())
            part, few, more = paid - math.floor(paid), plain(math.floor(paid)), plain(math.floor(paid) + 1)
            row |= {"calls again": paid, "mean again": float(found.mean())}
            row["ratio, mean"] = float(found.mean() / ((1 - part) * few.mean() + part * more.mean()))
            squares = (1 - part) * few.square().mean() + part * more.square().mean()
            row["ratio, rms"] = float((found.square().mean() / squares).sqrt())
        rows.append(row)
    return rows


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=512, help="Samples of the exact problems.")
@click.option("--starts", default=64, help="Samples of the networks.")
@click.option("--images", "folder", help="Folder with an IDX image data set, for a problem with its statistics.")
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/tolerance.json.")
def main(samples: int, starts: int, folder: str | None, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params | {"folder": None if folder is None else Path(folder).name}
    torch.set_num_threads(threads)
    rows = []
    for name, model, n, labels in problems(samples, starts, folder):
        cond = {} if labels is None else {"cond": {"class_labels": labels}}
        options = {"n": n, "seed": 0, "batch_size": n, **cond}
        rows += study(name, partial(sampled, model, options), model)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table(keys, [[f"{v:.3g}" if isinstance(v := row.get(key, "-"), float) else v for key in keys] for row in rows])
    if keep:
        save("tolerance", settings, rows)


if __name__ == "__main__":
    main()
