r"""Who is nearest to the law, at how many network calls? Every peer through its own API, on exact problems, in one run.

    pip install -e '.[bench,peers]'
    python benchmarks/peers/run.py                          # every sampler once, then the best again
    python benchmarks/peers/run.py --images FOLDER          # and a problem with the statistics of an image data set

Rows already in the CSV file are not run again: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import csv
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import RESULTS, save, table
from competitors import Sampler, samplers
from problems import Gaussian as gaussian
from problems import Problem, digits, images, scales
from tqdm import tqdm

CALLS = (10, 12, 15, 20, 30, 50)
FIELDS = ("problem", "family", "kind", "sampler", "budget", "seed", "nfe", "ratio", "seconds")
AGAIN = 3
"""Peers of each kind that are run with every seed, at each number of calls: the best of the first seed."""
Row = dict[str, str]


def key(row: Row) -> tuple[str, ...]:
    """What makes a row: problem, sampler, budget and seed."""
    return tuple(str(row[name]) for name in ("problem", "family", "kind", "sampler", "budget", "seed"))


class Book:
    """The rows of a CSV file, which grows as they come."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {}
        if path.exists():
            with path.open(newline="") as file:
                self.rows = {key(row): row for row in csv.DictReader(file)}

    def run(self, problem: Problem, unit: float, sampler: Sampler, budget: float, seed: int) -> None:
        """Draws, measures and notes, unless that was done before."""
        row = {"problem": problem.name, "family": sampler.family, "kind": sampler.kind, "sampler": sampler.name}
        row |= {"budget": str(budget), "seed": str(seed)}
        if key(row) in self.rows:
            return
        problem.rows, start = 0, time.perf_counter()
        with torch.no_grad():
            x = sampler.draw(problem, problem.n, budget, seed)
        finite = torch.isfinite(x).all()
        ratio = problem.distance(x) / unit if finite else float("inf")
        row |= {"nfe": f"{problem.rows / problem.n:.3f}", "ratio": f"{ratio:.4f}"}
        row["seconds"] = f"{time.perf_counter() - start:.1f}"
        self.rows[key(row)] = row
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)


def grouped(rows: list[Row]) -> dict[tuple[str, ...], list[float]]:
    """Ratios over seeds, by (problem, kind, family, sampler, budget)."""
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        found[row["problem"], row["kind"], row["family"], row["sampler"], row["budget"]].append(float(row["ratio"]))
    return found


def best_peers(rows: list[Row], problem: str, kind: str, budget: int, count: int) -> list[str]:
    """Names of the nearest peers of a kind at a number of calls, after the first seed."""
    of = {
        row["sampler"]: float(row["ratio"])
        for row in rows
        if (row["problem"], row["kind"], row["budget"], row["seed"]) == (problem, kind, str(budget), "0")
        and row["family"] != "fastsde"
        and round(float(row["nfe"])) <= budget
    }
    return sorted(of, key=lambda name: of[name])[:count]


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=8000, help="Samples of each run on the digits; fewer elsewhere.")
@click.option("--seeds", default=3, help="Seeds for ours and for the best peers.")
@click.option("--problem", "only", multiple=True, help="Only these problems.")
@click.option("--images", "folder", help="Folder with an IDX image data set.")
@click.option("--floor-draws", default=12, help="Draws of exact samples behind each floor.")
@click.option("--calls", type=int, multiple=True, default=CALLS, help="Budgets in calls.")
@click.option("--run/--report", "running", default=True, help="Run what is missing, or only report what is there.")
@click.option("--threads", default=2)
@click.option("--name", default="peers", help="Name of the files in results/.")
def main(
    samples: int,
    seeds: int,
    only: tuple[str, ...],
    folder: str | None,
    floor_draws: int,
    calls: tuple[int, ...],
    running: bool,
    threads: int,
    name: str,
) -> None:
    """Runs what is missing in results/NAME.csv, prints the tables and draws the figure."""
    settings = click.get_current_context().params | {"folder": None if folder is None else Path(folder).name}
    torch.set_num_threads(threads)
    problems = {
        "digits": lambda: digits(samples),
        "gaussian": lambda: gaussian(samples // 16),
        "scales": lambda: scales(samples // 4),
    }
    if folder is not None:
        problems["images"] = lambda: images(samples // 4, folder)
    book, everybody, floors = Book(RESULTS / f"{name}.csv"), samplers(), {}
    for label, make in problems.items():
        if only and label not in only:
            continue
        problem = make()
        unit, spread = problem.floor(floor_draws)
        floors[label] = {"floor": unit, "spread": spread / unit, "n": problem.n}
        jobs = [(s, b, 0) for s in everybody for b in (s.tolerances or calls) if s.tolerances or b >= s.fewest]
        # Algorithm 6 at one tolerance elsewhere: noise on a path for hundreds of calls takes longer than all the rest.
        jobs = [(s, b, k) for s, b, k in jobs if label == "digits" or s.name != "Algorithm 6" or b == 0.05]
        if not running:
            continue
        for sampler, budget, seed in tqdm(jobs, desc=label, disable=None):
            book.run(problem, unit, sampler, budget, seed)
        for seed in range(1, seeds):
            for kind in ("ODE", "SDE"):
                for budget in calls:
                    again = best_peers(list(book.rows.values()), label, kind, budget, AGAIN)
                    for sampler in everybody:
                        ours = sampler.family == "fastsde" and sampler.kind == kind and sampler.name[:2] in ("Ex", "Fi")
                        if sampler.name in again or (ours and not sampler.tolerances):
                            book.run(problem, unit, sampler, budget, seed)
    report(book, floors, settings, name)


def report(book: Book, floors: dict[str, dict[str, float]], settings: dict[str, object], name: str) -> None:
    """Ours beside the best peer of each kind, as a table, JSON and a figure."""
    rows = [row for row in book.rows.values() if row["problem"] in floors]
    ratios, summary = grouped(rows), []
    for label, floor in floors.items():
        for kind in ("ODE", "SDE"):
            for budget in CALLS:
                best = best_peers(rows, label, kind, budget, AGAIN)
                of = {s: ratios.get((label, kind, f, s, str(budget)), []) for f, s in who(rows, label, kind)}
                peer = min(best, key=lambda s: mean(of[s]), default=None)
                if not best:
                    continue
                entry = {"problem": label, "kind": kind, "calls": budget, "spread": floor["spread"], "peer": peer}
                entry["peer ratio"] = None if peer is None else round(mean(of[peer]), 3)
                for short, full in OURS[kind].items():
                    if of.get(full):
                        entry[short] = round(mean(of[full]), 3)
                        entry[f"{short} sd"] = round(stdev(of[full]), 3) if len(of[full]) > 1 else None
                summary.append(entry)
    header = ("problem", "kind", "calls", "ours", "fitted / eta 0.5", "best peer", "")
    text = [
        (
            e["problem"],
            e["kind"],
            e["calls"],
            e.get("ours", "-"),
            e.get("fitted", e.get("eta 0.5", "-")),
            e["peer ratio"],
            e["peer"],
        )
        for e in summary
    ]
    table(header, text)
    adaptive = [
        row for row in rows if "." in row["budget"] and (row["family"] != "fastsde" or "rtol" in row["sampler"])
    ]
    adaptive += [row for row in rows if row["sampler"] == "Algorithm 6"]
    print()
    table(
        ("problem", "sampler", "rtol", "calls", "ratio"),
        [(r["problem"], r["sampler"], r["budget"], r["nfe"], r["ratio"]) for r in adaptive],
    )
    save(name, settings, {"floors": floors, "summary": summary})
    figure(rows, floors, RESULTS / f"{name}.png")


OURS = {
    "ODE": {
        "ours": "ExponentialPC",
        "log-SNR": "ExponentialPC, log-SNR grid",
        "fitted": "FittedSolver",
    },
    "SDE": {"ours": "ExponentialPC, eta 1", "eta 0.5": "ExponentialPC, eta 0.5"},
}


def who(rows: list[Row], problem: str, kind: str) -> list[tuple[str, str]]:
    """(family, sampler) of everybody of a kind who ran on a problem."""
    return sorted({(r["family"], r["sampler"]) for r in rows if r["problem"] == problem and r["kind"] == kind})


def figure(rows: list[Row], floors: dict[str, dict[str, float]], path: Path) -> None:
    """Calls against distance over the floor, a column a problem; peers grey, ours and Algorithm 6 in colour."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4 * len(floors), 7), layout="constrained")
    axes = fig.subplots(2, len(floors), squeeze=False, sharex=True, sharey="col")
    colors = {"fastsde": "#D55E00", "Algorithm 6": "#009E73", "adaptive": "#0072B2"}
    for column, (label, floor) in enumerate(floors.items()):
        for ax, kind in zip(axes[:, column], ("ODE", "SDE"), strict=True):
            for family, sampler in who(rows, label, kind):
                own = [r for r in rows if (r["problem"], r["kind"], r["sampler"]) == (label, kind, sampler)]
                points = defaultdict(list)
                for r in own:
                    points[r["budget"]].append((float(r["nfe"]), float(r["ratio"])))
                line = sorted((mean(x for x, _ in p), mean(y for _, y in p)) for p in points.values())
                color = colors.get(sampler if family == "fastsde" else "")
                if family == "fastsde" and color is None:
                    color = colors["adaptive" if "rtol" in sampler else "fastsde"]
                plain = family != "fastsde" or sampler == "Euler-Maruyama"
                style = {"color": "0.75", "linewidth": 0.8, "zorder": 1} if plain else {"color": color, "zorder": 2}
                shown = {"ExponentialPC", "ExponentialPC, eta 1", "Algorithm 6"}
                title = sampler if sampler in shown or "rtol" in sampler else None
                dash = ":" if "eta 0.5" in sampler or "log-SNR grid" in sampler else "-"
                ax.plot(*zip(*line, strict=True), dash, marker="." if plain else "o", ms=3, label=title, **style)
            ax.axhspan(1 - floor["spread"], 1 + floor["spread"], color="0.9", zorder=0)
            ax.axhline(1, color="black", linewidth=0.8)
            ax.set(xscale="log", yscale="log", ylim=(0.6, 100), title=f"{label}, {kind}")
            ax.legend(fontsize=7)
        axes[1, column].set_xlabel("network calls")
    for row in axes:
        row[0].set_ylabel("distance / floor")
    fig.savefig(path, dpi=110)
    print(f"written: results/{path.name}")


if __name__ == "__main__":
    main()
