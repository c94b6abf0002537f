r"""Which error of a step says which samples will end up wrong?

Every sample walks the base grid of a tolerance; its measure is the largest over its steps. Columns: the share of the
total squared error (from a run with 300 steps, the same noise, eta 0) that the 3 % of samples with the largest measure
hold; `the error itself` is the most that any can. `over noise` is `ExponentialPC`'s; `as it is` the same without the
weight 1 / sqrt(rho^2 + 0.1^2); `over D alone` without the absolute tolerance, too.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from common import save, table
from problems import Mixture, digits, rare, scales
from torch import Tensor
from tqdm import tqdm

import fastsde

ATOL = 2 / 256
"""One 8-bit level of the data's range, as `sample` takes it."""


def row_norm(x: Tensor) -> Tensor:
    """Root mean square of each row, with shape (B,)."""
    return x.flatten(1).double().square().mean(1).sqrt()


@dataclasses.dataclass(frozen=True)
class Watched(fastsde.ExponentialPC):
    """Notes difference, size of D and noise of every step, all with shape (B,)."""

    steps_seen: list[tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=list)

    def estimate(self, difference: Tensor, x_0: Tensor, h: Tensor, lam: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """As it is, with a note."""
        self.steps_seen.append((row_norm(difference), row_norm(x_0), torch.exp(-lam)))
        return super().estimate(difference, x_0, h, lam)


def study(problem: Mixture, rtol: float, calls: int) -> dict[str, object]:
    """One row of the table."""
    model, solver = problem.model(), Watched()
    options = {"n": problem.n, "batch_size": problem.n}
    exact = fastsde.sample(model, controller=fastsde.Grid.log_snr(model.sde, 300), **options).samples
    base = fastsde.AdaptiveGrid([fastsde.Grid.tapered(model.sde, calls - 1)], rtol, ATOL)
    x = fastsde.sample(model, solver=solver, controller=base, **options).samples
    square = (x - exact).double().square().mean(1)
    error, size, noise = (torch.stack(parts, 1) for parts in zip(*solver.steps_seen[1:], strict=True))
    scaled = error / (rtol * size).clamp(min=ATOL)
    measures = {
        "over noise": scaled / (noise**2 + 0.1**2).sqrt(),
        "as it is": scaled,
        "over D alone": error / size,
    }
    count = problem.n * 3 // 100
    shares = {
        name: float(square[m.max(1).values.topk(count).indices].sum() / square.sum()) for name, m in measures.items()
    }
    best = float(square.topk(count).values.sum() / square.sum())
    return {"problem": problem.name, "rtol": rtol, "calls": calls} | shares | {"the error itself": best}


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=8000)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/hardness.json.")
def main(samples: int, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    cases = [(p, rtol, calls) for p in (rare, digits, scales) for rtol, calls in ((0.2, 9), (0.1, 12), (0.05, 16))]
    rows = [study(problem(samples), rtol, calls) for problem, rtol, calls in tqdm(cases, disable=None)]
    table(list(rows[0]), [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    if keep:
        save("hardness", settings, rows)


if __name__ == "__main__":
    main()
