r"""Tables 10.1, D.2 and D.3 of the thesis: which claims hold with an exact score, and which with a learned one?

`exact`: the digits mixture under the VP and VE processes of the tables. In place of FID the Frechet distance between
the moments of the samples and the exact ones, over that of as many exact samples: 1 is perfect, one draw of exact
samples has a spread of about 12 %. Algorithm 6 redraws the noise of rejected steps, as published, with the published
settings. "same NFE" rows get the calls that it took. DDIM walks the process's own alpha(t); the published one did not
(`ddim.py`). The ablations of D.2 and D.3 are at rtol 0.02 (the thesis does not say at which theirs are).

`network`: the VP column and Table D.2 with the packaged network in bfloat16, classes in turn, one seed for all rows, at
rtol 0.05; the Frechet distance in the features of the packaged classifier. RD & Langevin has half the published steps.
Cells are those of `fastsde bench`: a folder that survives being killed, which several processes share.

`stability`: the linear test equation of appendix D.6, dx = -x dt + sqrt(2) dw, whose stationary variance is 1, by
Euler-Maruyama and by the extrapolated step: equal steps h beside the closed forms, and adaptive ones.

`rejections`: the error of the mean at time 1 by Algorithm 9 (appendix D.3), with the error estimate corrected (the
printed one never becomes small) and a step at most ten times as long as the one before. After a rejection the Brownian
path is kept; or z is, as printed; or z is drawn again. Beside that `fastsde.integrate`, which does not reject, and as
many equal steps. atol is a fifth of rtol. Where the path is kept, the error is that to the solution on the same path:
exact for geometric Brownian motion, 512 equal steps for the double wells. Where it is not, it is that to the exact
mean, with more samples: for the wells by the backward Kolmogorov equation on a grid.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RUNS, Row, command, table, versions
from problems import Mixture, digits

import fastsde
from fastsde.evaluation.features import open_features
from fastsde.evaluation.reference import Reference, packaged_reference
from fastsde.evaluation.statistics import frechet
from fastsde.evaluation.sweep import Cell, Problem, Sweep, result_of
from fastsde.noise import RESOLUTION, BrownianPath

SDES = {"VP": fastsde.VPSDE(), "VE": fastsde.VESDE()}
RTOLS = (0.01, 0.02, 0.05, 0.1, 0.5)
PUBLISHED = {
    ("VP", "RD & Langevin"): (1999, 3.41),
    ("VP", "Euler-Maruyama"): (1000, 2.55),
    ("VP", "DDIM"): (1000, 2.86),
    ("VP", "probability flow"): (142, 3.11),
    ("VE", "RD & Langevin"): (1999, 2.40),
    ("VE", "Euler-Maruyama"): (1000, 2.98),
    ("VE", "probability flow"): (183, 7.64),
}
OURS = {
    "VP": ((329, 2.70), (274, 2.74), (179, 2.59), (147, 2.95), (49, 72.29)),
    "VE": ((738, 2.91), (490, 2.87), (271, 3.23), (170, 8.85), (52, 266.75)),
}
SAME = {
    ("VP", "Euler-Maruyama"): (10.28, 14.18, 25.49, 31.38, 92.99),
    ("VP", "DDIM"): (4.81, 5.75, 9.20, 11.53, 37.24),
    ("VE", "Euler-Maruyama"): (2.99, 3.05, 3.48, 5.12, 169.32),
}
ABLATIONS = {
    "delta(x')": ({"reference": "proposal"}, {}, (4.69, 4166), (4.99, 17514)),
    "no extrapolation": ({"extrapolate": False}, {}, (11.73, 3978), (6.57, 8802)),
    "q = infinity": ({}, {"norm": math.inf}, (4.90, 14462), (5.03, 39500)),
    "r = 0.5": ({}, {"r": 0.5}, (4.69, 4104), (4.87, 9594)),
    "r = 0.8": ({}, {"r": 0.8}, (4.68, 3938), (4.84, 8952)),
    "r = 1": ({}, {"r": 1.0}, (4.69, 4048), (4.93, 8784)),
    "Lamba, r = 0.5": ({"lamba": True, "extrapolate": False}, {"r": 0.5}, (52.98, 1468), (18.28, 2492)),
    "Lamba, r = 0.5, extrapolation": ({"lamba": True}, {"r": 0.5}, (64.65, 1438), (169.78, 2252)),
    "Lamba, r = 0.5, q = infinity": (
        {"lamba": True, "extrapolate": False},
        {"r": 0.5, "norm": math.inf},
        (21.09, 2360),
        (6.80, 5886),
    ),
    "Lamba, r = 0.5, q = infinity, theta = 0.8": (
        {"lamba": True, "extrapolate": False},
        {"r": 0.5, "norm": math.inf, "safety": 0.8},
        (18.82, 2346),
        (6.20, 2970),
    ),
}
"""Arguments of solver and controller, then published FID and NFE (of ten batches together), VP and VE."""
BASE = {"VP": (4.70, 3972), "VE": (4.89, 8856)}


@click.group(help=__doc__)
def main() -> None:
    """Both scores."""


class Study:
    """One process: its model, the floor, and the rows so far."""

    def __init__(self, name: str, problem: Mixture) -> None:
        self.name, self.problem, self.floor, self.rows = name, problem, problem.floor(50), list[Row]()
        self.model = problem.model(SDES[name])

    def run(self, part: str, label: str, known: tuple[float, float] | None, **options: object) -> float:
        """Samples, adds a row, and returns its mean number of calls."""
        r = fastsde.sample(self.model, n=self.problem.n, batch_size=2000, seed=0, **options)
        enough = int(r.success.sum()) > self.problem.d
        distance = self.problem.distance(r.samples[r.success]) if enough else math.inf
        row: Row = {"process": self.name, "part": part, "method": label, "nfe": float(r.nfe.double().mean())}
        row |= {"ratio": distance / self.floor[0], "failed": int((~r.success).sum())}
        self.rows.append(row | {"published_nfe": known and known[0], "published_fid": known and known[1]})
        return row["nfe"]

    def table_10_1(self, steps: int, rtols: tuple[float, ...]) -> None:
        """The rows of Table 10.1."""
        langevin = fastsde.Langevin(snr=0.01 if self.name == "VP" else 0.16)
        baselines = {
            "RD & Langevin": {"solver": fastsde.PredictorCorrector(fastsde.ReverseDiffusion(steps), langevin)},
            "Euler-Maruyama": {"solver": fastsde.EulerMaruyama(steps)},
            "DDIM": {"solver": fastsde.DDIM(steps)},
            "probability flow": {"solver": fastsde.ProbabilityFlow(), "rtol": 1e-5, "atol": 1e-5},
        }
        for label, options in baselines.items():
            if (self.name, label) in PUBLISHED:
                self.run("10.1", label, PUBLISHED[self.name, label], **options)
        for rtol in tqdm(rtols, f"{self.name}, 10.1", disable=None):
            k, solver = RTOLS.index(rtol), fastsde.ExtrapolatedEM(keep_path=False)
            calls = self.run("10.1", f"Algorithm 6, rtol {rtol:g}", OURS[self.name][k], solver=solver, rtol=rtol)
            for name, rival in (("Euler-Maruyama", fastsde.EulerMaruyama()), ("DDIM", fastsde.DDIM())):
                if (self.name, name) in SAME:
                    known = (float(OURS[self.name][k][0]), SAME[self.name, name][k])
                    label = f"{name}, same NFE as rtol {rtol:g}"
                    self.run("10.1", label, known, solver=rival, nfe=max(2, round(calls)))

    def ablations(self, rtol: float) -> None:
        """The rows of Tables D.2 (VP) and D.3 (VE)."""
        low, high = self.model.data_range
        cases = {"no change": ({}, {}, BASE["VP"], BASE["VE"]), **ABLATIONS}
        for label, (solver, rule, vp, ve) in tqdm(cases.items(), f"{self.name}, ablations", disable=None):
            fid, nfe = vp if self.name == "VP" else ve
            controller = fastsde.Adaptive(rtol, (high - low) / 256, **rule)
            method = fastsde.ExtrapolatedEM(keep_path=False, **solver)
            part = "D.2" if self.name == "VP" else "D.3"
            self.run(part, label, (nfe, fid), solver=method, controller=controller)


@command("With an exact score?", "thesis_tables", main, samples=100, processes=["VP"], rtols=[0.5], rtol=0.5, steps=20)
@click.option("--samples", "-n", default=1000)
@click.option("--process", "processes", multiple=True, default=tuple(SDES), type=click.Choice(list(SDES)))
@click.option("--rtol", "rtols", type=float, multiple=True, default=RTOLS, help="Of Table 10.1.")
@click.option("--ablations-rtol", "rtol", default=0.02)
@click.option("--steps", default=1000, help="Of the baselines.")
def exact(samples: int, processes: tuple[str, ...], rtols: tuple[float, ...], rtol: float, steps: int) -> Row:
    """Prints the tables."""
    rows, floors = [], {}
    for name in processes:
        study = Study(name, digits(samples))
        study.table_10_1(steps, rtols)
        study.ablations(rtol)
        floors[name], rows = study.floor, rows + study.rows
    table(rows)
    return {"floors": floors, "rows": rows}


Known = tuple[float, float] | None
Planned = tuple[str, Cell, Known]


def of_the_tolerances(seed: int, rtols: tuple[float, ...]) -> list[Planned]:
    """Algorithm 6 at the tolerances of Table 10.1, which say how many calls the rows beside them get."""
    solver = fastsde.ExtrapolatedEM(keep_path=False)
    cells = [Cell(solver, "Algorithm 6", None, rtol, seed) for rtol in rtols]
    return [("10.1", cell, OURS["VP"][RTOLS.index(cell.rtol)]) for cell in cells]


def others(sde: fastsde.SDE, rtol: float, seed: int) -> Iterator[Planned]:
    """The rows of Table D.2, those of Table 10.1 with a number of calls of their own, and two of ours."""
    for label, (solver, rule, (fid, nfe), _) in ABLATIONS.items():
        method, controller = fastsde.ExtrapolatedEM(keep_path=False, **solver), fastsde.Adaptive(rtol, 2 / 256, **rule)
        yield "D.2", Cell(method, label, None, rtol, seed, controller), (nfe, fid)
    flow = fastsde.ProbabilityFlow()
    # Published with 1e-5, which is below what a network in bfloat16 can be told apart by.
    tight = fastsde.Adaptive(1e-3, 1e-3, flow.error_power, 0.8, 1.0, growth=2.0, resolution=flow.resolution, clock=sde)
    pc = fastsde.PredictorCorrector(fastsde.ReverseDiffusion(), fastsde.Langevin(snr=0.01))
    for cell in (
        Cell(fastsde.ExponentialPC(), "ExponentialPC", None, 0.05, seed),
        Cell(fastsde.ExponentialPC(eta=1.0), "ExponentialPC, eta 1", None, 0.02, seed),
        Cell(flow, "probability flow", None, 1e-3, seed, tight),
        Cell(fastsde.EulerMaruyama(), "Euler-Maruyama", 1000, None, seed),
        Cell(pc, "RD & Langevin", 1001, None, seed),
    ):
        yield "10.1", cell, PUBLISHED.get(("VP", cell.label))


def same_calls(sweep: Sweep, rows: list[Planned], seed: int) -> Iterator[Planned]:
    """Euler-Maruyama and DDIM with the calls that Algorithm 6 took."""
    for _, cell, known in rows:
        calls, k = round(sweep.row(cell)["mean_nfe"]), RTOLS.index(cell.rtol)
        for name, rival in (("Euler-Maruyama", fastsde.EulerMaruyama()), ("DDIM", fastsde.DDIM())):
            label = f"{name}, as rtol {cell.rtol:g}"
            yield "10.1", Cell(rival, label, calls, None, seed), (float(known[0]), SAME["VP", name][k])


def floor_of(reference: Reference, n: int, draws: int = 20) -> Row:
    """Mean and spread of the Frechet distances of n training images at a time."""
    feats, seeded = reference.feats, torch.Generator().manual_seed(0)
    chosen = [torch.randperm(len(feats), generator=seeded)[:n] for _ in range(draws)]
    found = [frechet(feats[k], reference.mean, reference.covariance, draws=2).value for k in chosen]
    return {"mean": float(torch.tensor(found).mean()), "spread": float(torch.tensor(found).std())}


@command(
    "With the packaged network?",
    "thesis_network",
    main,
    samples=130,
    rtols=[0.5],
    rtol=0.5,
    few=1,
    work=RUNS / "quick_thesis",
)
@click.option("--samples", "-n", default=320)
@click.option("--rtol", "rtols", type=float, multiple=True, default=RTOLS, help="Of Table 10.1.")
@click.option("--ablations-rtol", "rtol", default=0.05)
@click.option("--seed", default=0)
@click.option("--few", default=0, help="So many of the other rows; 0: all.")
@click.option("--rank", default=0, help="Which process this is.")
@click.option("--world-size", default=1, help="How many share the work.")
@click.option("--work", type=click.Path(path_type=Path), default=RUNS / "thesis_network", show_default=False)
def network(
    samples: int,
    rtols: tuple[float, ...],
    rtol: float,
    seed: int,
    few: int,
    rank: int,
    world_size: int,
    work: Path,
) -> Row | None:
    """Draws what is missing; the process that finds all rows there prints the table."""
    model, _ = fastsde.pretrained("fashion-mnist")
    nn.Module.to(model.network, torch.bfloat16)
    reference = packaged_reference("fashion-mnist")
    problem = Problem(model, open_features("fashion-mnist"), reference, versions({"dtype": "bfloat16"}), 10)

    def run(rows: list[Planned]) -> Sweep:
        done = Sweep(work, problem, [cell for _, cell, _ in rows], samples, batch_size=80, shard_size=160)
        with tqdm(total=len(rows) * samples, desc=f"rank {rank}", unit="", disable=None) as bar:
            for cell in done.run(rank=rank, world_size=world_size, progress=bar.update):
                tqdm.write(result_of(done.row(cell)))
        return done

    first = of_the_tolerances(seed, rtols)
    more = list(others(model.sde, rtol, seed))[: few or None]
    while len((done := run(first)).rows()) < len(first):  # another process draws the calls that the next rows need
        time.sleep(1)
    rows = first + list(same_calls(done, first, seed))[: few or None] + more
    if len(found := run(rows).rows()) < len(rows):
        return None
    keys = ("mean_nfe", "rejected", "fid", "fid_error")
    results = [
        {"part": part, "method": cell.label, "setting": cell.setting}
        | {key: row[key] for key in keys}
        | {"published_nfe": known and known[0], "published_fid": known and known[1]}
        for (part, cell, known), row in zip(rows, found, strict=True)
    ]
    table(results)
    return {"real_images": floor_of(reference, samples), "rows": results}


def stationary(h: float, extrapolate: bool) -> float:
    """The stationary variance with equal steps: b^2 h / (1 - a^2), x being multiplied by a and the noise by b."""
    a, b = (1 - h + h * h / 2, 1 - h / 2) if extrapolate else (1 - h, 1.0)
    return 2 * h * b * b / (1 - a * a) if abs(a) < 1 else math.inf


@command("Is the extrapolated step as stable, and unbiased?", "stability", main, samples=100, rtols=[0.5])
@click.option("--samples", "-n", default=4000)
@click.option("--rtol", "rtols", type=float, multiple=True, default=(0.02, 0.1, 0.5))
def stability(samples: int, rtols: tuple[float, ...]) -> list[Row]:
    """Prints the table."""
    end, rows = 40.0, list[Row]()

    def variance(elements: int, **options: object) -> Row:
        x0 = torch.randn(samples, elements, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        r = fastsde.integrate(
            lambda x, t: -x, lambda x, t: 2**0.5, x0, 0.0, end, additive=True, batch_size=samples, **options
        )
        square = r.samples.square().mean(1)
        return {"variance": float(square.mean()), "error": float(square.std()) / samples**0.5}

    for extrapolate in (False, True):
        rule = "extrapolated" if extrapolate else "Euler-Maruyama"
        for h in (0.1, 0.5, 1.0, 1.6, 2.5):
            steps = round(end / h)
            row: Row = {"rule": rule, "steps": f"h = {h:g}", "elements": 1}
            found = variance(1, steps=steps, extrapolate=extrapolate)
            rows.append(row | found | {"closed form": stationary(end / steps, extrapolate)})
        for elements in (1, 64):
            for rtol in rtols:
                found = variance(elements, rtol=rtol, atol=rtol / 5, extrapolate=extrapolate)
                rows.append({"rule": rule, "steps": f"rtol = {rtol:g}", "elements": elements} | found)
    table(rows)
    return rows


class Equation(NamedTuple):
    """dx = drift(x) dt + diffusion(x) dw, from x0."""

    drift: Callable[[Tensor], Tensor]
    diffusion: Callable[[Tensor], Tensor]
    x0: float
    ito: bool = False
    additive: bool = False

    def step(self, x: Tensor, h: Tensor, dw: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """The improved Euler step of Algorithm 9 and Euler-Maruyama's."""
        shift = sign * h.sqrt() if self.ito else torch.zeros_like(dw)
        low = x + h * self.drift(x) + self.diffusion(x) * (dw - shift)
        high = (low + x + h * self.drift(low) + self.diffusion(low) * (dw + shift)) / 2
        return high, low + shift * self.diffusion(x)

    def mean(self) -> float:
        """E x(1): u(x0, 1) of du/dt = drift u' + diffusion^2 u'' / 2, u(x, 0) = x, for states within [-4, 4]."""
        x, h = torch.linspace(-4, 4, 801, dtype=torch.float64), 0.01
        g, one = self.diffusion(x), torch.ones(800, dtype=torch.float64)
        slope = self.drift(x) + (0.0 if self.ito else torch.gradient(g, spacing=h)[0] * g / 2)
        first, second = (one.diag(1) - one.diag(-1)) / (2 * h), (one.diag(1) + one.diag(-1)) / h**2
        second -= 2 / h**2 * torch.eye(801, dtype=torch.float64)
        law = slope[:, None] * first + g.square()[:, None] / 2 * second
        law[[0, -1]] = 0.0
        return float((torch.matrix_exp(law) @ x)[round((self.x0 + 4) / h)])

    def solved(self, n: int, elements: int, seed: int, **options: object) -> fastsde.SampleResult:
        """By `fastsde.integrate`."""
        x0 = torch.full((n, elements), self.x0, dtype=torch.float64)
        terms = (lambda x, t: self.drift(x)), (lambda x, t: self.diffusion(x))
        kind = {"ito": self.ito, "additive": self.additive}
        return fastsde.integrate(*terms, x0, 0.0, 1.0, **kind, seed=seed, batch_size=n, **options)


MU, SIGMA = 0.5, 0.8
EQUATIONS = {
    "geometric, Ito": Equation(lambda x: MU * x, lambda x: SIGMA * x, 1.0, ito=True),
    "geometric, Stratonovich": Equation(lambda x: (MU - SIGMA**2 / 2) * x, lambda x: SIGMA * x, 1.0),
    "double well, additive": Equation(lambda x: x - x**3, lambda x: 0.5 + 0 * x, 0.5, additive=True),
    "double well, Stratonovich": Equation(lambda x: x - x**3, lambda x: 0.5 + 0.25 * (3 * x).sin(), 0.5),
}
"""Of the geometric Brownian motions both have x(1) = exp(mu - sigma^2 / 2 + sigma w(1))."""


def brownian(index: Tensor, t: Tensor | float, s: Tensor | float, elements: int, seed: int) -> Tensor:
    """w(s) - w(t) of the path that `integrate` walks, for times in [0, 1]."""
    path = BrownianPath(seed, (elements,), torch.float64, t_min=-1.0, t_max=0.0)
    at = [-torch.as_tensor(time, dtype=torch.float64).expand(len(index)) for time in (t, s)]
    return path(index, at[0]) - path(index, at[1])


def algorithm_9(sde: Equation, n: int, elements: int, rtol: float, noise: str, seed: int) -> tuple[Tensor, float]:
    """States at time 1 and mean calls of the drift."""
    drawn, index = torch.Generator().manual_seed(seed), torch.arange(n)

    def normals(rows: int) -> Tensor:
        return torch.randn(rows, elements, generator=drawn, dtype=torch.float64)

    x = torch.full((n, elements), sde.x0, dtype=torch.float64)
    t, h, calls = torch.zeros(n, dtype=torch.float64), torch.full((n,), 0.01, dtype=torch.float64), torch.zeros(n)
    previous, z, sign = x.clone(), normals(n), normals(n).sign()
    while len(k := (t < 1).nonzero()[:, 0]):
        step = torch.minimum(h[k], 1 - t[k])
        end = torch.where(step < h[k], 1.0, t[k] + step)
        kept = noise == "path kept"
        dw = brownian(index[k], t[k], end, elements, seed) if kept else z[k] * step.sqrt()[:, None]
        high, euler = sde.step(x[k], step[:, None], dw, sign[k])
        tolerance = (rtol * torch.maximum(euler.abs(), previous[k].abs())).clamp(min=rtol / 5)
        error = ((euler - high) / tolerance).square().mean(1).sqrt()
        good = (error <= 1) | (step <= RESOLUTION)
        h[k] = torch.minimum(0.9 * step * error**-0.9, 10 * step).clamp(min=RESOLUTION)
        calls[k] += 2
        on = k[good]
        x[on], previous[on], t[on] = high[good], euler[good], end[good]
        sign[on] = normals(len(on)).sign()
        new = k if noise == "z drawn again" else on
        z[new] = normals(len(new))
    return x, float(calls.mean())


@command("Do rejections bias?", "rejections", main, samples=50, many=100, rtols=[0.05], elements=[2])
@click.option("--samples", "-n", default=10_000, help="On a Brownian path.")
@click.option("--many", default=200_000, help="Where no path is kept.")
@click.option("--rtol", "rtols", type=float, multiple=True, default=(0.05, 0.01, 0.002))
@click.option("--elements", type=int, multiple=True, default=(16, 256), help="Independent wells besides.")
@click.option("--seed", default=3)
def rejections(samples: int, many: int, rtols: tuple[float, ...], elements: tuple[int, ...], seed: int) -> list[Row]:
    """Prints the table."""
    rows, solutions = list[Row](), dict[tuple[str, int], Tensor]()
    jobs = [(name, 1, rtol) for name in EQUATIONS for rtol in rtols]
    for name, d, rtol in tqdm(jobs + [("double well, additive", d, rtols[0]) for d in elements], disable=None):
        sde, n = EQUATIONS[name], max(50, samples // d)
        if (name, d) not in solutions:
            w = SIGMA * brownian(torch.arange(n), 0.0, 1.0, d, seed)
            known = name.startswith("geometric")
            solutions[name, d] = (MU - SIGMA**2 / 2 + w).exp() if known else sde.solved(n, d, seed, steps=512).samples
        exact, mean = solutions[name, d], math.exp(MU) if name.startswith("geometric") else sde.mean()
        adaptive = sde.solved(n, d, seed, rtol=rtol, atol=rtol / 5)
        calls = float(adaptive.nfe.double().mean())
        equal = sde.solved(n, d, seed, steps=round(calls / 2))
        kept, kept_calls = algorithm_9(sde, n, d, rtol, "path kept", seed)
        found = {"rejections, path kept": (kept - exact, kept_calls)}
        for noise in ("z kept", "z drawn again") if d == 1 else ():
            x, own = algorithm_9(sde, many, d, rtol, noise, seed)
            found[f"rejections, {noise}"] = x - mean, own
        found["no rejections, as now"] = adaptive.samples - exact, calls
        found["equal steps"] = equal.samples - exact, float(equal.nfe.double().mean())
        for steps, (errors, own) in found.items():
            each = errors.mean(1)  # elements of a sample share its steps
            row: Row = {"sde": name, "elements": d, "rtol": rtol, "steps": steps, "calls": own}
            rows.append(row | {"error": float(each.mean()), "standard error": float(each.std()) / len(each) ** 0.5})
    table(rows)
    return rows


if __name__ == "__main__":
    main()
