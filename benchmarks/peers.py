r"""Who is nearest to the law, at how many network calls? Every peer through its own API, on exact problems.

Some 50 samplers of diffusers, k-diffusion, azula, torchdiffeq and torchsde, each with the spacings it offers
(peers_exact.py), and ours. `ratio` is the Frechet distance to the law's moments over that of as many exact samples. All
start from the same noise. Needs `pip install -e '.[bench,peers]'`. Rows already in the book, results/peers.csv, are not
run again: an interrupted run goes on where it stopped. Every sampler runs once, ours and the best three peers of each
kind and number of calls with every seed.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from common import RESULTS, RUNS, Book, Row, command
from peers_exact import samplers
from problems import Problem, make
from tqdm import tqdm

CALLS = (10, 12, 15, 20, 30, 50)
SHARES = {"digits": 1, "gaussian": 16, "scales": 4, "images": 4}
"""Problems, and of how many samples one is drawn there."""
KEY = ("problem", "family", "kind", "sampler", "budget", "seed")
AGAIN = 3
OURS = {
    "ODE": {"ours": "ExponentialPC"},
    "SDE": {"ours": "ExponentialPC, eta 1", "eta 0.5": "ExponentialPC, eta 0.5"},
}


class Results(Book):
    """The rows of results/peers.csv."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KEY, ("nfe", "ratio", "seconds"))

    def best(self, problem: str, kind: str, budget: int) -> list[str]:
        """Names of the nearest peers of a kind within a number of calls, after the first seed."""
        of = {
            row["sampler"]: float(row["ratio"])
            for row in self.rows.values()
            if (row["problem"], row["kind"], row["budget"], row["seed"]) == (problem, kind, str(budget), "0")
            if row["family"] != "fastsde" and round(float(row["nfe"])) <= budget
        }
        return sorted(of, key=lambda name: of[name])[:AGAIN]

    def summary(self) -> list[Row]:
        """Ours beside the best peer of each kind at each number of calls, and what takes tolerances."""
        ratios, found = defaultdict(list), list[Row]()
        for row in self.rows.values():
            ratios[row["problem"], row["kind"], row["sampler"], row["budget"]].append(float(row["ratio"]))
        for problem in dict.fromkeys(row["problem"] for row in self.rows.values()):
            for kind, calls in ((kind, calls) for kind in OURS for calls in CALLS):
                of = {name: ratios[problem, kind, name, str(calls)] for name in self.best(problem, kind, calls)}
                if not of:
                    continue
                peer = min(of, key=lambda name: mean(of[name]))
                line: Row = {"problem": problem, "kind": kind, "calls": calls, "peer": peer}
                line["peer ratio"] = round(mean(of[peer]), 3)
                for short, full in OURS[kind].items():
                    if own := ratios[problem, kind, full, str(calls)]:
                        line[short] = round(mean(own), 3)
                        line[f"{short} sd"] = round(stdev(own), 3) if len(own) > 1 else None
                found.append(line)
        for row in self.rows.values():
            if "." in row["budget"] and row["seed"] == "0":
                line = {"problem": row["problem"], "kind": row["kind"], "rtol": float(row["budget"])}
                found.append(line | {"sampler": row["sampler"], "nfe": float(row["nfe"]), "ratio": float(row["ratio"])})
        return found


def study(rows: Results, problem: Problem, unit: float, calls: tuple[int, ...], seeds: int) -> None:
    """Runs what is missing on a problem."""
    everybody = {sampler.key: sampler for sampler in samplers()}

    def measure(_: str, family: str, kind: str, name: str, budget: float, seed: int) -> Row:
        problem.rows, start = 0, time.perf_counter()
        with torch.no_grad():
            x = everybody[family, kind, name].draw(problem, problem.n, budget, seed)
        ratio = problem.distance(x) / unit if torch.isfinite(x).all() else float("inf")
        row = {"nfe": f"{problem.rows / problem.n:.3f}", "ratio": f"{ratio:.4f}"}
        return row | {"seconds": f"{time.perf_counter() - start:.1f}"}

    jobs = [(s, b) for s in everybody.values() for b in (s.tolerances or calls) if s.tolerances or b >= s.fewest]
    # Algorithm 6 at one tolerance elsewhere: noise on a path for hundreds of calls takes longer than all the rest.
    jobs = [(s, b) for s, b in jobs if problem.name == "digits" or s.name != "Algorithm 6" or b == 0.05]
    for sampler, budget in tqdm(jobs, desc=problem.name, disable=None):
        rows.need(measure, problem.name, *sampler.key, budget, 0)
    for seed, kind, budget in itertools.product(range(1, seeds), OURS, calls):
        again = [*rows.best(problem.name, kind, budget), *OURS[kind].values()]
        for key in (key for key in everybody if key[1] == kind and key[2] in again):
            rows.need(measure, problem.name, *key, budget, seed)


@command("peers", samples=64, seeds=1, only=["digits"], calls=[10], book=RUNS / "peers_quick.csv")
def main(
    samples: int = 8000,
    seeds: int = 3,
    only: tuple[str, ...] = ("digits", "gaussian", "scales", "images"),
    images: Path | None = None,
    calls: tuple[int, ...] = CALLS,
    book: Path = RESULTS / "peers.csv",
) -> Row:
    """Runs what is missing in the book."""
    rows, floors = Results(book), {}
    for problem in [make(label, max(64, samples // SHARES[label]), images) for label in only]:
        unit, spread = problem.floor(12)
        floors[problem.name] = {"floor": unit, "spread": spread / unit, "n": problem.n}
        study(rows, problem, unit, calls, seeds)
    return {"floors": floors, "summary": rows.summary()}


if __name__ == "__main__":
    main()
