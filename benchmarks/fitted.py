r"""What does a fit buy? `fastsde.fit` beside the default and the peers, on exact problems and on networks.

`error` is the mean over samples of the root mean square difference from the converged probability flow, same start
noise, in thousandths of the data's range; `distance` is on exact problems the Frechet distance to the law's moments
over that of exact samples, on the packaged network the FID. A fit is drawn from other samples than it is judged on; its
price is in calls. `log-SNR` is the default on equal steps in log-SNR. Peers are those of `peers_networks.py`, each with
every spacing it offers: at 6 and 15 calls all of them run, at other numbers the six that were best at the nearer of
these. Rows are kept in the book, results/fitted.csv: what is there is not run again. Of the networks, flow, shifted and
clipped are those of `networks.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import networks
import torch
from common import RESULTS, RUNS, Book, Row, command, fid, labels
from peers_networks import peers as peers_of
from problems import make
from torch import Tensor
from tqdm import tqdm

import fastsde

CALLS = (3, 4, 5, 6, 8, 10, 12, 15, 20)
PILOT_CALLS = (4, 5, 6, 8)
PRICED_CALLS, PRICES = (4, 5, 6), (2_000, 4_000, 20_000)
"""Numbers of calls at which three pilots and other prices are compared."""
MANY, MANY_CALLS = 512, (4, 5, 6, 8)
"""On exact problems, whose calls cost little: so many pilots, and all the steps that they need."""
FID_CALLS, FID_SEEDS = (3, 4, 5, 6, 8), 3
KEYS = ("problem", "sampler", "calls", "seed", "error", "median", "rms", "distance", "cost")
RANKED, KEPT = (6, 15), 6


class Case:
    """A model, its start states, their converged ends, and a distance of samples from the law."""

    def __init__(self, name: str, folder: Path | None, starts: int, samples: int, device: str = "cpu") -> None:
        self.name, self.distance, self.cond = name, None, None
        if name in networks.NAMES:
            self.model = networks.load(name, device)
        elif name == "packaged":
            (self.model, _), self.cond = fastsde.pretrained("fashion-mnist", device=device), labels(starts)
        else:
            problem, starts = make(name, samples, folder), samples
            self.model, unit = problem.model(), problem.floor(12)[0]
            self.distance = lambda x: problem.distance(x) / unit
        self.z = torch.randn(starts, *self.model.event_shape, generator=torch.Generator().manual_seed(7))
        self.z = self.z.to(self.model.device)
        self.flow = isinstance(self.model.sde, fastsde.RectifiedFlow)
        fine = fastsde.Grid.uniform(self.model.sde, 160) if self.flow else fastsde.Grid.log_snr(self.model.sde, 120)
        self.exact = self.run(controller=fine).samples

    def run(self, **options: object) -> fastsde.SampleResult:
        """Samples of ours from the start states."""
        x = self.z * self.model.sde.prior_std
        return fastsde.sample(self.model, x_init=x, cond=self.cond, batch_size=128, **options)

    def fitted(self, seed: int, **options: object) -> fastsde.FittedSolver:
        """A fit by other samples, of the classes in turn where there are classes."""
        return fastsde.fit(self.model, seed=seed, cond=labels if self.cond else None, **options)

    def judged(self, x: Tensor) -> dict[str, float]:
        """The columns of a row."""
        each = (x - self.exact).double().flatten(1).square().mean(1).sqrt() * 500
        row = {"error": float(each.mean()), "median": float(each.median()), "rms": float(each.square().mean().sqrt())}
        return row | ({} if self.distance is None else {"distance": self.distance(x)})


class Results(Book):
    """The rows of results/fitted.csv."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KEYS[:4], KEYS[4:])

    def value(self, problem: str, sampler: str, calls: int, column: str, seed: int = 0) -> float | None:
        """A figure, if it is there."""
        row = self.rows.get((problem, sampler, str(calls), str(seed)))
        return float(row[column]) if row and row.get(column) else None

    def best_peer(self, problem: str, calls: int, column: str) -> tuple[float, str] | tuple[None, None]:
        """The lowest figure of a peer, and whose it is."""
        found = [
            (float(row[column]), row["sampler"])
            for row in self.rows.values()
            if (row["problem"], row["calls"]) == (problem, str(calls)) and row.get(column)
            if not row["sampler"].startswith(("default", "fitted"))
        ]
        return min(found, default=(None, None))

    def summary(self) -> list[Row]:
        """Default, fitted and the best peer at as many and at two more calls, by problem and column."""
        found = []
        for problem in dict.fromkeys(row["problem"] for row in self.rows.values()):
            for column, n in ((column, n) for column in ("error", "distance") for n in CALLS):
                line: Row = {"problem": problem, "measure": column, "calls": n}
                line["default"] = self.value(problem, "default", n, column)
                line["log-SNR"] = self.value(problem, "default, log-SNR", n, column)
                for seed, name in enumerate(("fitted", "second pilots", "third pilots")):
                    line[name] = self.value(problem, "fitted", n, column, seed)
                line["price"] = self.value(problem, "fitted", n, "cost")
                line["peer"], line["who"] = self.best_peer(problem, n, column)
                line["peer at n + 2"], line["who at n + 2"] = self.best_peer(problem, n + 2, column)
                for price in PRICES:
                    line[f"fitted for {price}"] = self.value(problem, f"fitted, {price} calls", n, column)
                many = f"fitted, {MANY} pilots"
                line["many pilots"], line["many cost"] = (self.value(problem, many, n, key) for key in (column, "cost"))
                if line["default"] is not None or line["fitted"] is not None:
                    found.append(line)
        fids = dict[tuple[str, str, int], list[float]]()
        for row in self.rows.values():
            if "FID" in row["sampler"]:
                fids.setdefault((row["problem"], row["sampler"], int(row["calls"])), []).append(float(row["distance"]))
        for (problem, sampler, calls), values in sorted(fids.items()):
            ends = [min(values), max(values)] if len(values) > 1 else None
            line = {"problem": problem, "measure": sampler, "calls": calls}
            found.append(line | {"fitted": statistics.fmean(values), "range": ends})
        return found


def study(book: Results, case: Case, calls: tuple[int, ...], fids: int) -> None:
    """All rows of a problem."""
    crowd = peers_of(case.model, cond=case.cond)

    def equal_steps(n: int, _: int) -> Row:
        grid = fastsde.Grid.log_snr(case.model.sde, n - 1)
        return case.judged(case.run(controller=grid).samples)

    def fitted(n: int, seed: int, **options: int) -> Row:
        solver = case.fitted(1000 + seed, nfe=n, **options)
        return case.judged(case.run(solver=solver).samples) | {"cost": solver.record["cost"]}

    fit_once = cache(partial(case.fitted, 1000))

    def of_images(n: int, seed: int) -> Row:  # by the same fit for all seeds
        solver = fit_once(nfe=n)
        options = {"cond": labels(fids), "seed": seed, "batch_size": 100, "progress": True}
        return {"distance": fid(fastsde.sample(case.model, n=fids, solver=solver, **options).samples.cpu())}

    def peer(label: str, n: int, _: int) -> Row:
        found = crowd[label](case.z, n)
        return {} if found is None else case.judged(found)

    ways: dict[str, Callable[[int, int], Row]] = {
        "default": lambda n, seed: case.judged(case.run(nfe=n).samples),
        "default, log-SNR": equal_steps,
        "fitted": fitted,
        **{f"fitted, {price} calls": partial(fitted, calls=price) for price in PRICES},
        f"fitted, {MANY} pilots": partial(fitted, pilots=MANY, calls=1_000_000),
        f"fitted, FID of {fids}": of_images,
        **{label: partial(peer, label) for label in crowd},
    }

    def row(_: str, sampler: str, n: int, seed: int) -> Row:
        return {key: f"{value:.5g}" for key, value in ways[sampler](n, seed).items()}

    own = ("default", "fitted") if case.flow else ("default", "default, log-SNR", "fitted")
    jobs = [(sampler, n, 0) for n in calls for sampler in own]
    jobs += [("fitted", n, seed) for n in set(PILOT_CALLS) & set(calls) for seed in (1, 2)]
    jobs += [(f"fitted, {price} calls", n, 0) for n in set(PRICED_CALLS) & set(calls) for price in PRICES]
    if case.distance is not None:
        jobs += [(f"fitted, {MANY} pilots", n, 0) for n in set(MANY_CALLS) & set(calls)]
    if fids and case.name == "packaged":
        jobs += [(f"fitted, FID of {fids}", n, seed) for seed in range(FID_SEEDS) for n in FID_CALLS]
    jobs += [(label, n, 0) for n in RANKED for label in crowd]
    for job in tqdm(jobs, case.name, disable=None):
        book.need(row, case.name, *job)
    for n in sorted(m for m in {*calls, *(m + 2 for m in calls)} if 4 <= m <= 20):
        near = min(RANKED, key=lambda ranked: abs(ranked - n))
        known = {label: value for label in crowd if (value := book.value(case.name, label, near, "error")) is not None}
        for label in tqdm(sorted(known, key=lambda label: known[label])[:KEPT], f"peers at {n}", disable=None):
            book.need(row, case.name, label, n, 0)


@command("fitted", only=["digits"], samples=64, calls=[3], book=RUNS / "fitted_quick.csv")
def main(
    only: tuple[str, ...] = ("digits", "scales", "rare", "packaged", *networks.NAMES),
    images: Path | None = None,
    starts: int = 128,
    samples: int = 2000,
    calls: tuple[int, ...] = CALLS,
    fids: int = 0,
    book: Path = RESULTS / "fitted.csv",
    device: str = "cpu",
) -> list[Row]:
    """Runs what is missing in the book; `fids` are the samples of each FID of the packaged network, 0 for none."""
    rows = Results(book)
    for name in only:
        study(rows, Case(name, images, starts, samples, device), calls, fids)
    return rows.summary()


if __name__ == "__main__":
    main()
