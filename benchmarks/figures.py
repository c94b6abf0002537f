r"""Draws the pictures of docs/images: of stored results, and of samples of the packaged network.

`results`: peers.png, from results/peers.csv; seeds.png, from results/seeds.json; step-sizes.png, from
results/adversarial_images.json.

`samples`: samplers.png, ten garments by each sampler, at a number of calls that suits it; fitted.png, the same with 4,
5 and 6 calls, by default and fitted, from the same noise.
"""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from statistics import mean

import click
import torch
from common import IMAGES, RESULTS, Book, command, described, labels
from matplotlib.figure import Figure
from tables import result
from torch import Tensor

import fastsde
from fastsde.evaluation.report import plot

BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"

main = click.Group(help=__doc__)


def peers() -> Figure:
    """Calls against distance over the floor, a column a problem; peers grey, ours and Algorithm 6 in colour."""
    floors, points, lines = result("peers")["results"]["floors"], defaultdict(list), defaultdict(list)
    for r in Book(RESULTS / "peers.csv", ("problem", "kind", "sampler", "family", "budget", "seed"), ()).rows.values():
        key = r["problem"], r["kind"], r["sampler"], r["family"]
        points[key, r["budget"]].append((float(r["nfe"]), float(r["ratio"])))
    for (key, _), found in points.items():
        lines[key].append(tuple(map(mean, zip(*found, strict=True))))
    colors = {"ExponentialPC": RED, "ExponentialPC, eta 1": RED, "Algorithm 6": GREEN}
    figure = Figure(figsize=(4 * len(floors), 7), layout="constrained")
    axes = figure.subplots(2, len(floors), squeeze=False, sharex=True, sharey="col")
    for (problem, floor), column in zip(floors.items(), axes.T, strict=True):
        for kind, ax in zip(("ODE", "SDE"), column, strict=True):
            for (where, which, sampler, family), line in lines.items():
                if (where, which) == (problem, kind) and (family != "fastsde" or sampler in colors):
                    ours = family == "fastsde"
                    style = {"color": colors[sampler] if ours else "0.75", "zorder": 1 + ours, "lw": 0.8 + ours}
                    x, y = zip(*sorted(line), strict=True)
                    ax.plot(x, y, "-o", ms=3, label=sampler if ours else None, **style)
            ax.axhspan(1 - floor["spread"], 1 + floor["spread"], color="0.9", zorder=0)
            ax.axhline(1, color="black", linewidth=0.8)
            ax.set(xscale="log", yscale="log", ylim=(0.6, 100), title=f"{problem}, {kind}")
            ax.legend(fontsize=7)
        column[1].set_xlabel("network calls")
    for ax in axes[:, 0]:
        ax.set_ylabel("distance / floor")
    return figure


def step_sizes() -> Figure:
    """Figure 8.3: the distance against the step size, every seed."""
    rows = result("adversarial_images")["results"]["rows"]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, kind in zip(panels, ("plain", "adversarial"), strict=True):
        for name, color in (("ALS", RED), ("CAS", BLUE)):
            for key, style, label in (("raw", "--", "not denoised"), ("denoised", "-", "denoised")):
                for seed in sorted({row["seed"] for row in rows}):
                    line = (kind, seed, name, 1)
                    own = [r for r in rows if (r["training"], r["seed"], r["sampler"], r["n_sigma"]) == line]
                    title = f"{name}, {label}" if seed == 0 else None
                    x, y = [r["eta"] for r in own], [r[key] for r in own]
                    panel.plot(x, y, style, color=color, marker="o", ms=3, label=title)
        panel.set(xscale="log", yscale="log", title=f"{kind}, n_sigma = 1", xlabel="step size, eps / sigma_L$^2$")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("Frechet distance")
    panels[0].legend(fontsize=8)
    return figure


@command(None, main)
def results() -> None:
    """Draws the pictures of stored results."""
    IMAGES.mkdir(exist_ok=True)
    peers().savefig(IMAGES / "peers.png", dpi=80)
    step_sizes().savefig(IMAGES / "step-sizes.png", dpi=90)
    summary = result("seeds")["results"]["summary"]
    (IMAGES / "seeds.png").write_bytes(plot([line for line in summary if line["mean_nfe"] < 20]))


def rows_of(pictures: dict[str, Tensor], width: float) -> Figure:
    """A row of images in [-1, 1] for each label, with shape (n, 1, H, W)."""
    figure = Figure(figsize=(width, 0.62 * len(pictures)))
    for axis, (label, samples) in zip(
        figure.subplots(len(pictures), 1, squeeze=False)[:, 0], pictures.items(), strict=True
    ):
        row = torch.cat(list(samples[:, 0].clamp(-1, 1)), 1)
        axis.imshow(row, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        axis.text(-6, 14, label, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(left=0.27, right=0.995, top=0.995, bottom=0.005, hspace=0.06)
    return figure


def gallery(sde: fastsde.SDE) -> list[dict[str, object]]:
    """The arguments of `sample` for each row of samplers.png."""
    solvers = [
        fastsde.ExponentialPC(11),
        fastsde.ExponentialPC(19, eta=1.0),
        fastsde.DDIM(20),
        fastsde.DPMSolverPP(11),
        fastsde.DPMSolverPP(19, eta=1.0),
        fastsde.UniPC(11, order=3),
        fastsde.DEIS(11),
        fastsde.SASolver(19),
        fastsde.EulerMaruyama(200),
        fastsde.ReverseDiffusion(200),
        fastsde.Ancestral(200),
        fastsde.PredictorCorrector(fastsde.ReverseDiffusion(100), fastsde.Langevin(0.01)),
        fastsde.AnnealedLangevin(200),
        fastsde.ConsistentAnnealed(100),
    ]
    adaptive = (fastsde.ExponentialPC(), fastsde.ExtrapolatedEM(), fastsde.ProbabilityFlow())
    heun = {"solver": fastsde.Heun(), "controller": fastsde.Grid.karras(sde, 17)}
    return [*({"solver": s, "rtol": 0.05} for s in adaptive), heun, *({"solver": s} for s in solvers)]


@command(None, main, few=1)
def samples(seed: int = 0, few: int = 0) -> None:
    """Draws the pictures of samples: 5 minutes."""
    model, sde = fastsde.pretrained("fashion-mnist")
    ten = {"n": 10, "seed": seed, "cond": labels(10)}
    pictures = {}
    for options in gallery(sde)[: few or None]:
        r = fastsde.sample(model, **ten, **options)
        name = described(options["solver"]) + (f", rtol {options['rtol']:g}" if "rtol" in options else "")
        lines = textwrap.wrap(re.sub("=(?=[A-Z])", "= ", name), 36)  # a solver inside another may start a line
        pictures["\n".join([*lines, f"{r.nfe.double().mean():.0f} calls"]).replace("= ", "=")] = r.samples
    samplers, pictures = rows_of(pictures, 7.8), {}
    for n in (4, 5, 6)[: few or None]:
        solver = fastsde.fit(model, nfe=n, cond=labels, calls=2000 if few else None, progress=True)
        pictures[f"{n} calls, default"] = fastsde.sample(model, nfe=n, **ten).samples
        pictures[f"{n} calls, fitted"] = fastsde.sample(model, solver=solver, **ten).samples
    controller = fastsde.Grid.log_snr(sde, 59)
    pictures["60 calls"] = fastsde.sample(model, controller=controller, **ten).samples
    if not few:
        samplers.savefig(IMAGES / "samplers.png", dpi=110)
        rows_of(pictures, 7.6).savefig(IMAGES / "fitted.png", dpi=110)


if __name__ == "__main__":
    main()
