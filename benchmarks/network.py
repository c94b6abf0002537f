r"""The packaged Fashion-MNIST network at few calls: how far is each solver from the network's own probability flow?

Every solver starts from the same noise and classes as a reference with 120 calls; the error is the root mean square
difference of pixels in units of the data range, its median over samples, and `apart` the share of samples whose
difference is above 0.1: another garment, not a less precise one. `over log-SNR` is the geometric mean over samples of
the error over that of our solver on equal steps in log-SNR. Peers run as fastsde's implementations of them, which agree
with diffusers' (tests/test_parity.py), on their best grid of two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import torch
from coefficients import Alike, AsItIs
from common import packaged_model, save, table
from tqdm import tqdm

import fastsde

CALLS = (8, 10, 12, 15, 20)
Solvers = dict[str, tuple[fastsde.Solver, Callable[[fastsde.SDE, int], fastsde.Grid]]]
SOLVERS: Solvers = {
    "ExponentialPC": (fastsde.ExponentialPC(), fastsde.Grid.tapered),
    "ExponentialPC, first value as it is": (AsItIs(), fastsde.Grid.tapered),
    "ExponentialPC, first correction alike": (Alike(), fastsde.Grid.tapered),
    "ExponentialPC, short start": (fastsde.ExponentialPC(), partial(fastsde.Grid.tapered, first=1.0)),
    "ExponentialPC, alike and short start": (Alike(), partial(fastsde.Grid.tapered, first=1.0)),
    "ExponentialPC, log-SNR grid": (fastsde.ExponentialPC(), fastsde.Grid.log_snr),
}
for _name, _grid in (("log-SNR", fastsde.Grid.log_snr), ("Karras", fastsde.Grid.karras)):
    SOLVERS |= {
        f"DPM-Solver++ 2, {_name}": (fastsde.DPMSolverPP(order=2), _grid),
        f"DPM-Solver++ 3, {_name}": (fastsde.DPMSolverPP(order=3), _grid),
        f"UniPC 2, {_name}": (fastsde.UniPC(order=2), _grid),
        f"DEIS 3, {_name}": (fastsde.DEIS(order=3), _grid),
    }


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=200)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/network.json.")
def main(samples: int, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    model = packaged_model(untrained=False)
    options = {"n": samples, "cond": {"class_labels": torch.arange(samples) % 10}}
    exact = fastsde.sample(model, controller=fastsde.Grid.log_snr(model.sde, 119), **options).samples
    rows = []
    plain: dict[int, torch.Tensor] = {}

    def distances(r: fastsde.SampleResult) -> torch.Tensor:
        return (r.samples - exact).flatten(1).square().mean(1).sqrt() / 2

    def note(name: str, calls: int, r: fastsde.SampleResult) -> None:
        each = distances(r)
        row = {"solver": name, "budget": calls, "calls": float(r.nfe.double().mean()), "median": float(each.median())}
        row["apart"] = float((each > 0.1).double().mean())
        if calls in plain:  # sample by sample, geometric mean and its standard error
            ratios = (each / plain[calls]).log()
            row["over log-SNR"] = float(ratios.mean().exp())
            row["error"] = float(ratios.std()) / len(ratios) ** 0.5
        rows.append(row)

    for calls in tqdm(CALLS, disable=None):
        controller = fastsde.Grid.log_snr(model.sde, calls - 1)
        plain[calls] = distances(fastsde.sample(model, controller=controller, **options))
        for name, (solver, grid) in SOLVERS.items():
            note(name, calls, fastsde.sample(model, solver=solver, controller=grid(model.sde, calls - 1), **options))
    for rtol in (0.2, 0.1, 0.05, 0.02):
        r = fastsde.sample(model, rtol=rtol, **options)
        note(f"ExponentialPC, rtol {rtol:g}", int(r.nfe.max()), r)
    keys = ("solver", "budget", "calls", "median", "over log-SNR", "error", "apart")
    table(keys, [[f"{v:.4f}" if isinstance(v := row.get(k, "-"), float) else v for k in keys] for row in rows])
    if keep:
        save("network", settings, rows)


if __name__ == "__main__":
    main()
