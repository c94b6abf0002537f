r"""What does a fit buy? `fastsde.fit` beside the default and the peers, on exact problems and on networks.

`error` is the mean over samples of the root mean square difference from the converged probability flow, same start
noise, in thousandths of the data's range; `distance` is on exact problems the Frechet distance to the law's moments
over that of exact samples, on the packaged network the FID. A fit is drawn from other samples than it is judged on; its
price is in calls. Peers are those of `peers_networks.py`, each with every spacing it offers: at 6 calls all of them
run, at other numbers the six that were best there. Rows are kept in the book, results/fitted.csv: what is there is not
run again. Of the networks, flow, shifted and clipped are those of `networks.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import click
import networks
import torch
from common import RESULTS, RUNS, Book, Row, command, fid, labels, table
from peers_networks import peers as peers_of
from problems import make
from torch import Tensor
from tqdm import tqdm

import fastsde

CALLS = (3, 4, 5, 6, 8, 10, 12, 20)
PILOT_CALLS, PRICES = (4, 6), (2_000, 4_000, 20_000)
"""Numbers of calls at which three pilots and other prices are compared."""
FID_CALLS, FID_SEEDS = (3, 4, 5, 6, 8), 3
KEYS = ("problem", "sampler", "calls", "seed", "error", "median", "rms", "distance", "cost")
KEPT = 6


class Case:
    """A model, its start states, their converged ends, and a distance of samples from the law."""

    def __init__(self, name: str, folder: str | None, starts: int, samples: int) -> None:
        self.name, self.distance, self.cond = name, None, None
        if name in networks.NAMES:
            self.model = networks.load(name)
        elif name == "packaged":
            (self.model, _), self.cond = fastsde.pretrained("fashion-mnist"), labels(starts)
        else:
            problem, starts = make(name, samples, folder), samples
            self.model, unit = problem.model(), problem.floor(12)[0]
            self.distance = lambda x: problem.distance(x) / unit
        self.z = torch.randn(starts, *self.model.event_shape, generator=torch.Generator().manual_seed(7))
        flow = isinstance(self.model.sde, fastsde.RectifiedFlow)
        fine = fastsde.Grid.uniform(self.model.sde, 160) if flow else fastsde.Grid.log_snr(self.model.sde, 120)
        self.exact = self.run(controller=fine).samples

    def run(self, **options: object) -> fastsde.SampleResult:
        """Samples of ours from the start states."""
        x = self.z * self.model.sde.prior_std
        return fastsde.sample(self.model, x_init=x, cond=self.cond, batch_size=128, **options)

    def fitted(self, seed: int, **options: object) -> fastsde.FittedSolver:
        """A fit by other samples, of the classes in turn where there are classes."""
        return fastsde.fit(self.model, seed=seed, **({"cond": labels(40)} if self.cond else {}), **options)

    def judged(self, x: Tensor) -> dict[str, float]:
        """The columns of a row."""
        each = (x - self.exact).double().flatten(1).square().mean(1).sqrt() * 500
        row = {"error": float(each.mean()), "median": float(each.median()), "rms": float(each.square().mean().sqrt())}
        return row | ({} if self.distance is None else {"distance": self.distance(x)})


class Results(Book):
    """The rows of results/fitted.csv."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KEYS[:4], KEYS[4:])

    def add(self, problem: str, sampler: str, calls: int, seed: int, work: Callable[[], dict[str, float]]) -> None:
        """Runs what is not there, and writes it with five digits."""
        self.need(problem, sampler, calls, seed, work=lambda: {k: f"{v:.5g}" for k, v in work().items()})

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
                for seed, name in enumerate(("fitted", "second pilots", "third pilots")):
                    line[name] = self.value(problem, "fitted", n, column, seed)
                line["price"] = self.value(problem, "fitted", n, "cost")
                line["peer"], line["who"] = self.best_peer(problem, n, column)
                line["peer at n + 2"], line["who at n + 2"] = self.best_peer(problem, n + 2, column)
                for price in PRICES:
                    line[f"fitted for {price}"] = self.value(problem, f"fitted, {price} calls", n, column)
                if line["default"] is not None or line["fitted"] is not None:
                    found.append(line)
        fids = [row for row in self.rows.values() if "FID" in row["sampler"]]
        return found + [
            {"problem": r["problem"], "measure": r["sampler"], "calls": int(r["calls"]), "fitted": float(r["distance"])}
            for r in fids
        ]


def study(book: Results, case: Case, calls: tuple[int, ...], with_peers: bool, prices: bool, fids: int) -> None:
    """All rows of a problem."""
    name = case.name

    def fitted(seed: int, **options: object) -> dict[str, float]:
        solver = case.fitted(1000 + seed, **options)
        return case.judged(case.run(solver=solver).samples) | {"cost": solver.record["cost"]}

    for n in tqdm(calls, f"{name}: ours", disable=None):
        book.add(name, "default", n, 0, lambda n=n: case.judged(case.run(nfe=n).samples))
        book.add(name, "fitted", n, 0, functools.partial(fitted, 0, nfe=n))
    for n in set(PILOT_CALLS) & set(calls):
        for seed in (1, 2):
            book.add(name, "fitted", n, seed, functools.partial(fitted, seed, nfe=n))
        for price in PRICES if prices else ():
            book.add(name, f"fitted, {price} calls", n, 0, functools.partial(fitted, 0, nfe=n, calls=price))

    def drawn(n: int, seed: int) -> dict[str, float]:  # by the same fit for all seeds
        solver = case.fitted(1000, nfe=n)
        options = {"cond": labels(fids), "seed": seed, "batch_size": 100, "progress": True}
        return {"distance": fid(fastsde.sample(case.model, n=fids, solver=solver, **options).samples)}

    for seed, n in ((seed, n) for seed in range(FID_SEEDS) for n in FID_CALLS if fids and name == "packaged"):
        book.add(name, f"fitted, FID of {fids}", n, seed, functools.partial(drawn, n, seed))
    crowd = peers_of(case.model, cond=case.cond) if with_peers else {}

    def peer(label: str, n: int) -> dict[str, float]:
        found = crowd[label](case.z, n)
        return {} if found is None else case.judged(found[0])

    for label in tqdm(crowd, f"{name}: peers at 6", disable=None):
        book.add(name, label, 6, 0, functools.partial(peer, label, 6))
    known = {label: value for label in crowd if (value := book.value(name, label, 6, "error")) is not None}
    more = sorted({m for n in calls for m in (n, n + 2) if 4 <= m <= 20})
    for n in tqdm(more if crowd else (), f"{name}: peers", disable=None):
        for label in sorted(known, key=lambda label: known[label])[:KEPT]:
            book.add(name, label, n, 0, functools.partial(peer, label, n))


@command(
    __doc__, "fitted", only=["digits"], samples=64, calls=[3], with_peers=False, prices=False, book=RUNS / "fitted.csv"
)
@click.option("--only", multiple=True, default=("digits", "scales", "rare", "packaged", *networks.NAMES))
@click.option("--images", type=click.Path(path_type=Path), help="An IDX image set, for the problem images.")
@click.option("--starts", default=128, help="Start states of networks.")
@click.option("--samples", "-n", default=2000, help="Samples of exact problems.")
@click.option("--calls", type=int, multiple=True, default=CALLS)
@click.option("--peers/--no-peers", "with_peers", default=True)
@click.option("--prices/--no-prices", default=True)
@click.option("--fid", "fids", default=0, help="Samples of each FID of the packaged network, three seeds; 0: none.")
@click.option("--book", type=click.Path(path_type=Path), default=RESULTS / "fitted.csv", show_default=False)
def main(
    only: tuple[str, ...],
    images: Path | None,
    starts: int,
    samples: int,
    calls: tuple[int, ...],
    with_peers: bool,
    prices: bool,
    fids: int,
    book: Path,
) -> list[Row]:
    """Runs what is missing in the book and prints the table."""
    rows = Results(book)
    for name in only:
        study(rows, Case(name, images and str(images), starts, samples), calls, with_peers, prices, fids)
    found = rows.summary()
    table(found, "problem", "measure", "calls", "default", "fitted", "price", "peer", "who", "peer at n + 2")
    return found


if __name__ == "__main__":
    main()
