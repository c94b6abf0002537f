r"""How far from the exact posterior is each way to sample given linear measurements?

The data are five Gaussians in 16 dimensions with full covariances (standard deviations 0.5 down to 0.16),
whose means are five times closer in the first eight elements than in the others. Measurements with noise of standard
deviation 0.05: the first eight elements (`inpainting`), which tell little about the component, and means over four
neighbours, every second one (`blur`, seven numbers). Given a measurement the exact law is a mixture again, so there is
nothing to tune and no network error: what is left is the bias of the method, and the solver's error. The four numbers
of docs/measured/inverse.md are over the samples of one measurement, then averaged over measurements, with the standard
deviation of that average over seeds. VP, ExponentialPC on its grid; Ancestral, with each step taken once or ten times,
on as many in log-SNR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from common import Row, command
from torch import Tensor
from torch.distributions import MultivariateNormal

import fastsde
from fastsde.score import MixtureScore
from fastsde.score.inverse import DPS, MMPS, PiGDM, Projection
from fastsde.score.operators import Linear, LinearOperator, Mask
from fastsde.solvers.resampling import Resampling

D, COMPONENTS, NOISE = 16, 5, 0.05
METRICS = ("mean", "trace", "weights", "misfit")


def prior() -> tuple[MixtureScore, Tensor]:
    """The data, and their covariances with shape (K, d, d)."""
    generator = torch.Generator().manual_seed(0)
    means = 0.6 * torch.randn(COMPONENTS, D, dtype=torch.float64, generator=generator)
    means[:, : D // 2] *= 0.2
    bases = torch.linalg.qr(torch.randn(COMPONENTS, D, D, dtype=torch.float64, generator=generator))[0]
    variances = 0.25 * torch.logspace(0, -1, D, dtype=torch.float64)
    covariances = bases * variances @ bases.mT
    weights = torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=torch.float64)
    return MixtureScore.from_covariances(fastsde.VPSDE(), weights, means, covariances), covariances


class Posterior:
    """The exact law given y = A x + noise: components updated by the Kalman formulas, weights by their evidence."""

    def __init__(self, model: MixtureScore, covariances: Tensor, a: Tensor, y: Tensor) -> None:
        seen = a @ covariances @ a.mT + NOISE**2 * torch.eye(len(a), dtype=torch.float64)
        gain = torch.linalg.solve(seen, a @ covariances).mT
        evidence = MultivariateNormal(model.means @ a.mT, seen).log_prob(y)
        weights = (model.weights.log() + evidence).softmax(0)
        means = model.means + ((y - model.means @ a.mT)[:, None] @ gain.mT)[:, 0]
        narrowed = covariances - gain @ a @ covariances
        narrowed = (narrowed + narrowed.mT) / 2
        self.law = MixtureScore.from_covariances(model.sde, weights, means, narrowed)
        self.components = MultivariateNormal(means, narrowed)
        self.mean, self.covariance = self.law.moments()

    def compare(self, x: Tensor) -> tuple[float, float, float]:
        """Errors of mean, trace and weights of samples with shape (n, d)."""
        size = self.covariance.trace()
        share = (self.components.log_prob(x[:, None]) + self.law.weights.log()).softmax(1).mean(0)
        return (
            float((x.mean(0) - self.mean).norm() / size.sqrt()),
            float(x.T.cov().trace() / size),
            float((share - self.law.weights).abs().sum() / 2),
        )


def operators() -> dict[str, tuple[LinearOperator, Tensor]]:
    """The two maps, and their matrices."""
    eye = torch.eye(D, dtype=torch.float64)

    def blur(x: Tensor) -> Tensor:
        return x.unfold(1, 4, 2).mean(2)

    a = blur(eye).mT
    pinv = torch.linalg.pinv(a)
    return {
        "inpainting": (Mask(torch.arange(D) < D // 2), eye[: D // 2]),
        "blur": (Linear(blur, (D,), adjoint=lambda y: y @ a, pinv=lambda y: y @ pinv.mT), a),
    }


def methods(model: MixtureScore, operator: LinearOperator, steps: int) -> Iterator[tuple[str, Row]]:
    """Label and arguments of `sample` of everything that is compared."""
    size = float((model.moments()[1].trace() / D).sqrt())
    guided = {
        "Projection": Projection(model, operator),
        "DPS": DPS(model, operator, NOISE),
        "PiGDM": PiGDM(model, operator, NOISE),
        f"PiGDM, data_std {size:.2f}": PiGDM(model, operator, NOISE, data_std=size),
        **{f"MMPS, {k} iteration{'s'[: k > 1]}": MMPS(model, operator, NOISE, iterations=k) for k in (1, 3, 8)},
    }
    for label, wrapped in guided.items():
        for eta in (0.0, 1.0):
            solver = fastsde.ExponentialPC(steps=steps, eta=eta)
            yield f"{label}, eta {eta:g}", {"score_fn": wrapped, "solver": solver}
    for repeats in (1, 10):
        solver = Resampling(fastsde.Ancestral(), repeats)
        grid = fastsde.Grid.log_snr(model.sde, steps)
        options = {"score_fn": guided["Projection"], "solver": solver, "controller": grid}
        yield f"Projection, Ancestral x {repeats}", options


def measure(posteriors: list[Posterior], residual: Callable[[Tensor], Tensor], runs: list[Tensor]) -> Row:
    """Metrics of several runs, each with as many samples for every measurement in turn: averages and spreads."""
    found = []
    for x in runs:
        parts = zip(posteriors, x.chunk(len(posteriors)), strict=True)
        each = torch.tensor([posterior.compare(part) for posterior, part in parts])
        misfit = residual(x).square().sum(1).mean().sqrt() / NOISE
        found.append(torch.cat([each.mean(0), misfit[None]]))
    values = torch.stack(found)
    spread = values.std(0) if len(runs) > 1 else torch.zeros(len(METRICS))
    row: Row = dict(zip(METRICS, values.mean(0).tolist(), strict=True))
    return row | {f"{name}, spread": v for name, v in zip(METRICS, spread.tolist(), strict=True)}


def study(name: str, measurements: int, n: int, seeds: int, steps: tuple[int, ...]) -> Iterator[Row]:
    """Rows of the table for one operator."""
    model, covariances = prior()
    operator, a = operators()[name]
    generator = torch.Generator().manual_seed(1)
    x = model.draw(measurements, generator)
    y = x @ a.mT + NOISE * torch.randn(measurements, len(a), dtype=torch.float64, generator=generator)
    posteriors = [Posterior(model, covariances, a, one) for one in y]
    each = y.repeat_interleave(n, 0)

    def residual(x: Tensor) -> Tensor:
        return (each - x @ a.mT) / len(a) ** 0.5

    exact = [torch.cat([p.law.draw(n, generator) for p in posteriors]) for _ in range(seeds)]
    row: Row = {"operator": name, "method": "exact", "steps": 0, "calls": 0}
    yield row | measure(posteriors, residual, exact)
    # A mask reads a measurement in the shape of a sample.
    options = {"cond": {"measurement": each @ a if isinstance(operator, Mask) else each}}
    options |= {"n": len(each), "batch_size": len(each), "dtype": torch.float64}
    for count in steps:
        for label, given in methods(model, operator, count):
            runs = [fastsde.sample(**given, **options, seed=k) for k in range(seeds)]
            row = {"operator": name, "method": label, "steps": count, "calls": int(runs[0].nfe.max())}
            yield row | measure(posteriors, residual, [r.samples for r in runs])


@command("posterior", measurements=1, samples=8, seeds=1, steps=[4])
def main(measurements: int = 8, samples: int = 200, seeds: int = 3, steps: tuple[int, ...] = (20, 100)) -> list[Row]:
    """How biased, on a mixture?"""
    return [row for name in operators() for row in study(name, measurements, samples, seeds, steps)]


if __name__ == "__main__":
    main()
