r"""What does a fit buy? `fastsde.fit` beside the default and the peers, at 3 to 20 calls.

`error` is the mean over samples of the root mean square difference from the converged probability flow, same start
noise, in thousandths of the data's range; `distance` is on exact problems the Frechet distance to the law's moments
over that of exact samples, on the packaged network the FID. A fit is drawn from other samples than it is judged on;
its price is in calls. With `--fid` the packaged network's FID is of as many samples, three seeds. Peers are those of
`peers/networks.py`, each with every spacing it offers; at 6 calls all of them run, at other numbers the six that were
best there. Rows are kept in results/fitted.csv: what is there is not run again.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import click
import networks
import torch
from common import RESULTS, packaged_model, save, table
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.evaluation.features import open_features
from fastsde.evaluation.images import to_uint8
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import Moments, frechet_distance

sys.path.append(str(Path(__file__).parent / "peers"))
from problems import digits, images, rare, scales

CALLS = (3, 4, 5, 6, 8, 10, 12, 20)
PEER_CALLS = (4, 5, 6, 7, 8, 10, 12, 20)
PILOT_CALLS = (4, 6)
"""Numbers of calls at which three pilots are compared."""
FID_CALLS, FID_SEEDS = (3, 4, 5, 6, 8), 3
PRICES = (2_000, 4_000, 8_000, 20_000)
KEYS = ("problem", "sampler", "calls", "seed", "error", "median", "rms", "distance", "cost")
KEPT = 6


def peers_of(model: fastsde.ScoreModel, cond: dict[str, Tensor] | None) -> dict[str, Callable[..., object]]:
    """The peers of a network, from the module next door whose name another one has here."""
    path = Path(__file__).parent / "peers" / "networks.py"
    spec = importlib.util.spec_from_file_location("peer_networks", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("peer_networks", importlib.util.module_from_spec(spec))
    if not hasattr(module, "peers"):
        spec.loader.exec_module(module)
    found: dict[str, Callable[..., object]] = module.peers(model, cond=cond)
    return found


class Case:
    """A model, its start states, their converged ends, and a distance of samples from the law."""

    def __init__(
        self,
        name: str,
        model: fastsde.ScoreModel,
        n: int,
        distance: Callable[[Tensor], float] | None,
        cond: dict[str, Tensor] | None = None,
    ) -> None:
        self.name, self.model, self.n, self.distance, self.cond = name, model, n, distance, cond
        assert model.event_shape is not None
        self.z = torch.randn(n, *model.event_shape, generator=torch.Generator().manual_seed(7))
        flow = isinstance(model.sde, fastsde.RectifiedFlow)
        fine = fastsde.Grid.uniform if flow else fastsde.Grid.log_snr
        self.exact = self.run(controller=fine(model.sde, 160 if flow else 120)).samples

    def run(self, **options: object) -> fastsde.SampleResult:
        """Samples of ours from the start states."""
        x = self.z * self.model.sde.prior_std
        return fastsde.sample(self.model, x_init=x, cond=self.cond, batch_size=128, **options)

    def judged(self, x: Tensor) -> dict[str, float]:
        """The columns of a row."""
        each = (x - self.exact).double().flatten(1).square().mean(1).sqrt() * 500
        row = {"error": float(each.mean()), "median": float(each.median()), "rms": float(each.square().mean().sqrt())}
        return row | ({} if self.distance is None else {"distance": self.distance(x)})


def fid(x: Tensor) -> float:
    """FID in the features of the packaged classifier."""
    features, reference = open_features("fashion-mnist"), packaged_reference("fashion-mnist")
    pixels = torch.as_tensor(to_uint8(x, (-1.0, 1.0))).permute(0, 3, 1, 2)
    own = Moments.of(features.of(pixels.split(500))[0].double())
    return frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)


def labels(n: int) -> dict[str, Tensor]:
    """Classes in turn."""
    return {"class_labels": torch.arange(n) % 10}


def case(name: str, folder: str | None, starts: int) -> Case:
    """One of the problems."""
    if name in networks.NAMES:
        return Case(name, networks.load(name), starts, None)
    if name == "packaged":
        return Case(name, packaged_model(untrained=False), starts, None, labels(starts))
    make = {"digits": digits, "scales": scales, "rare": rare}.get(name)
    problem = images(2000, folder or "") if make is None else make(2000)
    unit, _ = problem.floor(12)
    return Case(name, problem.model(), 2000, lambda x: problem.distance(x) / unit)


class Rows:
    """The rows of results/NAME.csv, by what they are of."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, dict[tuple[str, ...], dict[str, str]]()
        if path.exists():
            with path.open() as file:
                self.rows = {tuple(row[k] for k in KEYS[:4]): row for row in csv.DictReader(file)}

    def need(self, problem: str, sampler: str, calls: int, seed: int, work: Callable[[], dict[str, float]]) -> None:
        """Runs what is not there, and writes it."""
        key = (problem, sampler, str(calls), str(seed))
        if key in self.rows:
            return
        row = dict(zip(KEYS, key, strict=False)) | {k: f"{v:.5g}" for k, v in work().items()}
        self.rows[key] = row
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, KEYS)
            writer.writeheader()
            writer.writerows(self.rows.values())

    def value(self, problem: str, sampler: str, calls: int, column: str, seed: int = 0) -> float | None:
        """A figure, if it is there."""
        row = self.rows.get((problem, sampler, str(calls), str(seed)))
        return float(row[column]) if row and row.get(column) else None


def drawn(model: fastsde.ScoreModel, n: int, seed: int, count: int) -> dict[str, float]:
    """FID of so many samples of a seed, by the same fit for all seeds."""
    solver = fastsde.fit(model, nfe=n, seed=1000, cond=labels(40))
    r = fastsde.sample(model, n=count, cond=labels(count), seed=seed, solver=solver, batch_size=100, progress=True)
    return {"distance": fid(r.samples), "cost": solver.record["cost"]}


def study(rows: Rows, problem: Case, calls: tuple[int, ...], with_peers: bool, prices: bool, fids: int = 0) -> None:
    """All rows of a problem."""
    name, model = problem.name, problem.model

    def default(n: int) -> dict[str, float]:
        return problem.judged(problem.run(nfe=n).samples)

    def fitted(n: int, seed: int, price: int | None = None, pilots: int = 0) -> dict[str, float]:
        cond = None
        if problem.cond:  # whose classes are the pilots'
            cond, pilots = labels(pilots or 40), 0
        options = {"pilots": pilots} if pilots else {}
        solver = fastsde.fit(model, nfe=n, seed=1000 + seed, cond=cond, calls=price, **options)
        return problem.judged(problem.run(solver=solver).samples) | {"cost": solver.record["cost"]}

    for n in tqdm(calls, f"{name}: ours", disable=None):
        rows.need(name, "default", n, 0, functools.partial(default, n))
        rows.need(name, "fitted", n, 0, functools.partial(fitted, n, 0))
    if fids:
        for seed, n in itertools.product(range(FID_SEEDS), FID_CALLS):
            rows.need(name, f"fitted, FID of {fids}", n, seed, functools.partial(drawn, model, n, seed, fids))
    for n in PILOT_CALLS:
        for seed in (1, 2):
            rows.need(name, "fitted", n, seed, functools.partial(fitted, n, seed))
        for price in PRICES if prices else ():
            rows.need(name, f"fitted, {price} calls", n, 0, functools.partial(fitted, n, 0, price))
    if not with_peers:
        return
    crowd = peers_of(model, problem.cond)

    def peer(draw: Callable[..., object], n: int) -> dict[str, float]:
        drawn = draw(problem.z, n)
        return {} if drawn is None else problem.judged(drawn[0])  # type: ignore[index]

    for label, draw in tqdm(crowd.items(), f"{name}: peers at 6", disable=None):
        rows.need(name, label, 6, 0, functools.partial(peer, draw, 6))
    known = {label: rows.value(name, label, 6, "error") for label in crowd}
    best = sorted((label for label, value in known.items() if value is not None), key=lambda x: known[x] or 0)[:KEPT]
    for n in tqdm(PEER_CALLS, f"{name}: peers", disable=None):
        for label in best:
            rows.need(name, label, n, 0, functools.partial(peer, crowd[label], n))


def best_peer(rows: Rows, problem: str, calls: int, column: str) -> tuple[float, str] | None:
    """The lowest figure of a peer, and whose it is."""
    own = ("default", "fitted")
    found = [
        (float(row[column]), row["sampler"])
        for row in rows.rows.values()
        if row["problem"] == problem and row["calls"] == str(calls) and row.get(column)
        if not row["sampler"].startswith(own)
    ]
    return min(found) if found else None


def summary(rows: Rows) -> list[dict[str, object]]:
    """Default, fitted and the best peer at as many and at two more calls, by problem and column."""
    found = []
    for problem in dict.fromkeys(row["problem"] for row in rows.rows.values()):
        for column in ("error", "distance"):
            for n in CALLS:
                line: dict[str, object] = {"problem": problem, "measure": column, "calls": n}
                line["default"] = rows.value(problem, "default", n, column)
                seeds = [rows.value(problem, "fitted", n, column, seed) for seed in range(3)]
                line["fitted"], line["other pilots"] = seeds[0], " ".join(f"{v:.3g}" for v in seeds[1:] if v)
                line["price"] = rows.value(problem, "fitted", n, "cost")
                for more in (0, 2):
                    peer = best_peer(rows, problem, n + more, column)
                    line[f"peer at n + {more}"] = None if peer is None else peer[0]
                    line["who" if not more else "who at n + 2"] = "" if peer is None else peer[1]
                if line["fitted"] is not None:
                    found.append(line)
    return found


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--only", multiple=True, help="digits, images, scales, rare, packaged, flow, shifted, clipped.")
@click.option("--images", "folder", type=click.Path(exists=True), help="A folder with an IDX image set, for images.")
@click.option("--starts", default=128, help="Start states of networks.")
@click.option("--calls", type=int, multiple=True, default=CALLS)
@click.option("--peers/--no-peers", default=True)
@click.option("--prices/--no-prices", default=True)
@click.option("--fid", "fids", default=0, help="Samples of each FID of the packaged network, three seeds; 0: none.")
@click.option("--threads", default=2)
@click.option("--name", default="fitted", help="Of the files in results/.")
def main(
    only: tuple[str, ...],
    folder: str | None,
    starts: int,
    calls: tuple[int, ...],
    peers: bool,
    prices: bool,
    fids: int,
    threads: int,
    name: str,
) -> None:
    """Runs what is missing in results/NAME.csv and prints the table."""
    settings = click.get_current_context().params | {"folder": None}
    torch.set_num_threads(threads)
    rows = Rows(RESULTS / f"{name}.csv")
    for problem in only or ("digits", "images", "scales", "rare", "packaged", *networks.NAMES):
        study(rows, case(problem, folder, starts), calls, peers, prices, fids if problem == "packaged" else 0)
    lines = summary(rows)
    keys = list(lines[0])
    table(keys, [[f"{v:.3g}" if isinstance(v, float) else v for v in line.values()] for line in lines])
    save(name, settings, lines)


if __name__ == "__main__":
    main()
