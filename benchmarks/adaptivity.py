r"""What do restarts buy? `AdaptiveGrid` against the plain grid at equal mean calls, and who pays.

`rtol` alone walks the plain grid of as many steps as the tolerance asks for. With restarts, a sample with too large an
error at one of its steps starts again on a grid with twice the steps, and then with four times as many. Errors are root
mean square distances of a sample to a run with 400 steps (120 of the packaged network and `clipped`, 160 of the flow)
from the same noise, eta 0, over the data's range, in thousandths: `mean` over samples, and `rms`, which the few that
end in another cluster rule. Each `ratio` is that error over the plain grid's between its two nearest numbers of calls,
the interval that of 200 bootstrap samples. `again` is the share of samples that started again. Samples of exact
problems are hard in 3 of 100 cases (rare), in some components (scales), or all alike (digits, images). Networks are
judged by fewer samples, `--starts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import networks
import torch
from common import Row, command, labels
from problems import make
from torch import Tensor

import fastsde

RTOLS = (0.2, 0.1, 0.05, 0.02, 0.01)
REAL = ("packaged", *networks.NAMES)
Run = Callable[..., fastsde.SampleResult]


def compare(own: Tensor, calls: Tensor, low: Tensor, high: Tensor, power: int) -> tuple[float, list[float]]:
    """Error over that of the grid at the same mean calls, with the range of 95 % of 200 bootstrap samples.

    Args:
        own: errors to a power, with restarts, shape (n,).
        calls: calls of each sample.
        low: errors to the same power of the plain grid at the number of calls below the mean.
        high: those at the number above.
        power: 1 compares means, 2 root mean squares.
    """

    def once(rows: Tensor) -> float:
        part = calls[rows].mean() - math.floor(calls.mean())
        return float(own[rows].mean() / ((1 - part) * low[rows].mean() + part * high[rows].mean())) ** (1 / power)

    generator = torch.Generator().manual_seed(0)
    drawn = sorted(once(torch.randint(len(own), (len(own),), generator=generator)) for _ in range(200))
    return once(torch.arange(len(own))), [drawn[4], drawn[-5]]


def study(name: str, model: fastsde.ScoreModel, run: Run) -> list[Row]:
    """A row for each tolerance."""
    sde, (low, high), rows = model.sde, model.data_range, []
    flow = isinstance(sde, fastsde.RectifiedFlow)
    fine = fastsde.Grid.uniform(sde, 160) if flow else fastsde.Grid.log_snr(sde, 120 if name in REAL else 400)
    exact = run(controller=fine).samples

    def errors(**options: object) -> tuple[Tensor, Tensor]:
        r = run(**options)
        each = (r.samples - exact).double().flatten(1).square().mean(1).sqrt()
        return each * 1000 / (high - low), r.nfe.double()

    for rtol in RTOLS:
        plain, calls = errors(rtol=rtol)
        steps = int(calls.max()) - 1
        row: Row = {"problem": name, "rtol": rtol, "calls": steps + 1, "mean": float(plain.mean())}
        row["rms"] = float(plain.square().mean().sqrt())
        grids = [fastsde.Grid.tapered(sde, steps << k) for k in range(3)]
        own, paid = errors(controller=fastsde.AdaptiveGrid(grids, rtol, (high - low) / 256))
        row |= {"again": float((paid > steps + 1).double().mean()), "calls with restarts": float(paid.mean())}
        if row["again"]:
            few, more = (errors(nfe=math.floor(paid.mean()) + k)[0] for k in range(2))
            for key, power in (("mean", 1), ("rms", 2)):
                parts = (own**power, paid, few**power, more**power, power)
                row[f"ratio, {key}"], row[f"ratio, {key}, 95 %"] = compare(*parts)
        rows.append(row)
    return rows


@command("adaptivity", samples=50, only=["digits"])
def main(
    samples: int = 5000,
    starts: int = 64,
    only: tuple[str, ...] = ("digits", "scales", "rare", "images", *REAL),
    images: Path | None = None,
) -> list[Row]:
    """The table."""
    rows = []
    for name in only:
        options: Row = {"n": starts, "batch_size": starts}
        if name == "packaged":
            model, options["cond"] = fastsde.pretrained("fashion-mnist"), labels(starts)
        elif name in networks.NAMES:
            model = networks.load(name)
        else:
            model = make(name, samples, images).model()
            options = {"n": samples, "batch_size": 2500}
        rows += study(
            name, model, lambda model=model, options=options, **more: fastsde.sample(model, **options, **more)
        )
    return rows


if __name__ == "__main__":
    main()
