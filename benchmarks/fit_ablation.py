r"""What of a fit matters? Levels or weights alone, pilots, history, price; and three pilots.

Digits and images (exact, `peers/problems.py`): distance over the floor of 2000 samples and `error`, as in `fitted.py`;
and one of the networks of `networks.py`: error alone. Medians of three pilots, with the lowest and the highest.
"""

from __future__ import annotations

import statistics

import click
import torch
from common import save, table
from fitted import Case, case
from tqdm import tqdm

import fastsde

SEEDS = 3


def settings_of(n: int, sde: fastsde.SDE) -> dict[str, dict[str, object]]:
    """What is tried, by name."""
    own = fastsde.Grid.tapered(sde, n - 1).times.tolist()
    found: dict[str, dict[str, object]] = {
        "default": {},
        "weights alone, on the tapered grid": {"times": own},
        "levels alone": {"nfe": n, "history": 0},
        "both": {"nfe": n},
    }
    found |= {f"history {h}": {"nfe": n, "history": h} for h in (1, 2, 3, 6)}
    found |= {
        f"{p} pilots, 20,000 calls and more": {"nfe": n, "pilots": p, "calls": max(20_000, 400 * p)}
        for p in (8, 16, 32, 64, 128)
    }
    return found


def study(problem: Case, n: int) -> list[dict[str, object]]:
    """A row for each setting."""
    rows = []
    for name, options in tqdm(settings_of(n, problem.model.sde).items(), f"{problem.name}, {n} calls", disable=None):
        found, price = [], []
        for seed in range(SEEDS if options else 1):
            if options:
                solver = fastsde.fit(problem.model, seed=2000 + seed, **options)
                price.append(int(solver.record["cost"]))
                found.append(problem.judged(problem.run(solver=solver).samples))
            else:
                found.append(problem.judged(problem.run(nfe=n).samples))
        row: dict[str, object] = {"problem": problem.name, "calls": n, "setting": name}
        for key in ("distance", "error"):
            values = [entry[key] for entry in found if key in entry]
            if values:
                row[key] = f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
        rows.append(row | {"price": round(statistics.median(price)) if price else 0})
    return rows


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--only", multiple=True, default=("digits", "images"), help="Problems, by the names of fitted.py.")
@click.option("--images", "folder", type=click.Path(exists=True), help="A folder with an IDX image set, for images.")
@click.option("--calls", type=int, multiple=True, default=(4, 6))
@click.option("--starts", default=64, help="Start states of networks.")
@click.option("--threads", default=2)
@click.option("--name", default="fit_ablation", help="Of the file in results/.")
def main(
    only: tuple[str, ...], folder: str | None, calls: tuple[int, ...], starts: int, threads: int, name: str
) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params | {"folder": None}
    torch.set_num_threads(threads)
    rows = []
    for problem in only:
        made = case(problem, folder, starts)
        for n in calls:
            rows += study(made, n)
    keys = ("problem", "calls", "setting", "distance", "error", "price")
    table(keys, [[row.get(k, "") for k in keys] for row in rows])
    save(name, settings, rows)


if __name__ == "__main__":
    main()
