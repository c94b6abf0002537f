"""`LatentFlow`: start noise of a frozen generator, moved so that what it generates is distributed like data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fastsde import api
from fastsde.arguments import as_model, check_index, warn
from fastsde.checks import check_count, check_instance, check_kind, check_number, check_positive, check_states
from fastsde.control import Grid
from fastsde.engine import Engine
from fastsde.job import Options, Samples, make_job
from fastsde.noise import FreshNoise, StepNoise
from fastsde.result import Status
from fastsde.score.base import BoundModel, ScoreModel, check_shape
from fastsde.score.network import evaluation_mode
from fastsde.sde.base import SDE
from fastsde.sde.edm import EDM
from fastsde.solvers.base import Solver, Step
from fastsde.types import Carry, Coef, Index, ScoreFn, State, Time

_PROCESS = EDM()
"""The engine wants a process; the solver below reads none of it."""
_OF_DATA, _OF_BANK, _BANK_START = 1 << 29, 1 << 30, 1 << 31
"""Positions in the noise of a sample number that steps do not reach: other noise for data, and for the bank."""
_MEDIAN_OF = 1000
"""Points whose distances the default width is the median of."""


class KernelDensity:
    r"""A density from points, by kernel ridge regression in a feature space.

        p(x) = sum_i a_i k(x, x_i),    a = (K / n + ridge I)^-1 1 / n,    K_ij = k(x_i, x_j)
        k(x, x') = mean_j exp(-|f_j(x) - f(x')|^2 / (2 width^2))

    up to a constant factor. f are features, and f_j those of x with the j-th draw of noise: the mollified kernel. For
    ridge to infinity this is the kernel density estimate, a_i = 1 / n. For ridge to 0 it is flat on the points.
    Source: Zhou et al., "Regularized latent optimization", https://arxiv.org/abs/2112.03502, sec. 3 (the weights are
    derived in docs/explanation/sources.md, as the formulas of the text are lost).

    Args:
        points: features of the points, with shape (n, F), finite.
        width: of the kernel, positive.
        ridge: regularisation, positive; infinity for the kernel density estimate. The eigenvalues of K / n add up to 1,
            so that one ridge suits any number of points. (The source's lambda is n times it.)
        noisy: features of the points with noise, with shape (m, n, F), if the kernel is mollified.
    """

    def __init__(self, points: Tensor, width: float, ridge: float, noisy: Tensor | None = None) -> None:
        self.points, self.width = points.double(), width
        count = len(points)
        self.weights = self.points.new_full((count,), 1 / count)
        if ridge < math.inf:
            log_k = self._log_k(self.points[None] if noisy is None else noisy.double())
            gram = log_k.exp().mean(0)
            gram = (gram + gram.T) / 2  # with draws it is symmetric only in the mean
            eye = torch.eye(count, dtype=gram.dtype, device=gram.device)
            # A constant factor changes no gradient; this one keeps the weights near 1 / n.
            self.weights = (1 + ridge) * torch.linalg.solve(gram / count + ridge * eye, self.weights)

    def _log_k(self, features: Tensor) -> Tensor:
        """Of features with shape (m, B, F) and each point, with shape (m, B, n)."""
        squares = features.square().sum(2, keepdim=True) + self.points.square().sum(1)
        distance = (squares - 2 * features @ self.points.T).clamp(min=0)
        return distance / (-2 * self.width**2)

    def log_density(self, features: Tensor, own: Index | None = None) -> Coef:
        """log p of each row, up to a constant, with shape (B,), in float64; differentiable.

        Weights of both signs may add up to no more than 0, far from all points. Such a row is minus infinity, without a
        gradient.

        Args:
            features: with shape (m, B, F); m is 1 without noise.
            own: for each row the point that is the row itself and is left out, with shape (B,).
        """
        log_k = self._log_k(features.double())
        if own is not None:
            places = torch.arange(len(self.points), device=own.device)
            log_k = log_k.masked_fill(own[None, :, None] == places, -math.inf)
        peak = log_k.detach().amax((0, 2))
        total = ((log_k - peak[:, None]).exp().mean(0) * self.weights).sum(1)
        seen = total > 0
        return torch.where(seen, torch.where(seen, total, 1.0).log() + peak, -math.inf)


@dataclasses.dataclass(frozen=True)
class LatentResult:
    """What `LatentFlow.sample` returns, in the order in which samples were asked for.

    Attributes:
        samples: G(z) at the end, with shape (n, *event); NaN where a sample failed.
        latents: z at the end, with shape (n, *latent).
        start: z at the start, draws from the prior N(0, I), with shape (n, *latent).
        forward: evaluations of the generator, with shape (n,); the last one gives `samples`.
        backward: backward passes through generator and features, with shape (n,).
        status: a `Status` for each sample, with shape (n,).
        index: the sample number, with shape (n,).
        seed: the seed.
        unseen: share of evaluated densities that were not positive, and gave no force. Raise `ridge` or `width` if it
            is not near 0.
        bank_forward: evaluations of the generator for the bank, by this call; 0 if it was ready.
        bank_backward: backward passes for the bank.
        seconds: wall time.
    """

    samples: Tensor
    latents: Tensor
    start: Tensor
    forward: Tensor
    backward: Tensor
    status: Tensor
    index: Tensor
    seed: int
    unseen: float
    bank_forward: int
    bank_backward: int
    seconds: float


class LatentFlow:
    r"""Moves the latents of a frozen generator G along a Wasserstein gradient flow (regularised latent optimisation).

        z <- z + step_size grad_z ( w_1 log p(G(z)) + w_2 log p(y | G(z)) - w_3 log q(G(z)) )

    from z ~ N(0, I). p is the density of the data, q that of what the moved latents generate; both are a
    `KernelDensity` of features. Following log p alone, samples collapse on modes; - log q keeps them apart. For w = (1,
    1, 1) and G the identity this is Euler's method for the gradient flow of KL(q | p(x | y)). Through a generator it is
    the flow of the pulled-back functions in the Euclidean metric of z, and nothing keeps z near the prior.

    q would couple the samples of a batch. Here it comes from a bank: particles of their own, moved together first,
    whose features at every step are kept. So sample i depends on (seed, i, size of the bank) and on nothing else. The
    bank is run once for each seed. Source: Zhou et al., https://arxiv.org/abs/2112.03502, eqs. 2 to 6 (in the form
    that docs/explanation/sources.md derives); the bank is ours.

    Args:
        generator: G, `generator(z)` with z of shape (B, *latent), returning (B, *event); differentiable. `sampler_map`
            makes one of a diffusion model.
        data: samples of the data, with shape (N, *event), on the device of the generator.
        latent_shape: shape of one latent.
        features: `features(x)` with x of shape (B, *event), returning (B, F), differentiable; the flattened x by
            default.
        log_likelihood: `log_likelihood(x)`, returning log p(y | x) with shape (B,), differentiable: of a classifier, or
            the logit of a critic. None for no such term.
        weights: (w_1, w_2, w_3), not negative.
        step_size: in units of latent squared per nat, positive. The source chose from 0.1 to 1.
        steps: number of steps, at least 1. The source used 5 to 15.
        width: of the kernel, in units of the features; the median distance between data by default.
        ridge: of `KernelDensity`, positive, or infinity.
        mollifier: standard deviation of the noise that smooths the kernel, in units of x; 0 for none.
        draws: draws of this noise for each density.
        bank: number of particles, at least 2.
        batch_size: rows evaluated at a time.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed; also if what the generator returns
            for 16 latents does not fit the data.

    Warns:
        UserWarning: if data or bank have fewer members than features, or the generator's scale is not that of the data.
    """

    def __init__(
        self,
        generator: Callable[[Tensor], Tensor],
        data: Tensor,
        latent_shape: Sequence[int],
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        log_likelihood: Callable[[Tensor], Tensor] | None = None,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        step_size: float = 0.3,
        steps: int = 10,
        width: float | None = None,
        ridge: float = 1.0,
        mollifier: float = 0.0,
        draws: int = 1,
        bank: int = 256,
        batch_size: int = 64,
    ) -> None:
        check_states("data", data)
        check_instance("generator", generator, Callable, "callable on a batch")
        check_kind("features", features, Callable, "callable on a batch")
        check_kind("log_likelihood", log_likelihood, Callable, "callable on a batch")
        if len(data) < 2:
            raise ValueError(f"data must be at least two samples, with shape (N, *event); got {tuple(data.shape)}.")
        shape = check_shape("latent_shape", tuple(latent_shape) if isinstance(latent_shape, Sequence) else latent_shape)
        assert shape is not None  # None is no sequence
        self.generator, self.features, self.log_likelihood = generator, features, log_likelihood
        self.latent_shape, self.event_shape = shape, tuple(data.shape[1:])
        self.device, self.dtype = data.device, data.dtype
        self.weights = _checked_weights(weights, log_likelihood)
        self.step_size, self.steps = check_positive("step_size", step_size), check_count("steps", steps, 1)
        self.ridge = math.inf if ridge == math.inf else check_positive("ridge", ridge)
        self.mollifier = check_number("mollifier", mollifier, 0.0)
        self.draws, self.bank = check_count("draws", draws, 1), check_count("bank", bank, 2)
        self.batch_size = check_count("batch_size", batch_size, 1)
        self._bank: tuple[int, list[KernelDensity]] | None = None
        self._densities = self._unseen = 0
        with self._evaluating(), torch.no_grad():
            self._check_generator(data)
            points = self._features_of(data)
            if not torch.isfinite(points).all():
                raise ValueError("features of the data are not finite.")
            if min(len(data), self.bank) < points.shape[1]:
                warn(
                    f"features have dimension {points.shape[1]}, with {len(data)} data and a bank of {self.bank}: with "
                    "fewer members than dimensions a density is a guess. Give more of both, or smaller features.",
                    UserWarning,
                )
            self.width = _median_distance(points) if width is None else check_positive("width", width)
            noisy = self._noisy_features(data, FreshNoise(0, self.event_shape, self.dtype), _OF_DATA)
            self.data_density = KernelDensity(points, self.width, self.ridge, noisy)

    def sample(
        self,
        n: int | None = None,
        *,
        index: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> LatentResult:
        """Moves latents from the prior, and generates.

        Args:
            n: number of samples: those with the numbers 0 to n - 1.
            index: the numbers, instead.
            seed: in [0, 2^64).
            progress: show a bar over the bank's steps and one over finished samples.

        Raises:
            ValueError: before the first call of the generator; or if a particle of the bank is no longer finite.
        """
        numbers = torch.arange(check_count("n", n, 1)) if index is None else check_index(index)
        assert numbers is not None  # check_index returns None for None alone
        if n is not None and len(numbers) != n:
            raise ValueError(f"n says {n} samples, and index {len(numbers)}.")
        seed, numbers = check_count("seed", seed, 0), numbers.to(self.device)
        began = time.perf_counter()
        with self._evaluating():
            price = self._prepare(seed, progress)
            self._densities = self._unseen = 0
            start = FreshNoise(seed, self.latent_shape, self.dtype).prior(numbers)
            samples = Samples(numbers, self.latent_shape, self.dtype, seed, {"number": numbers}, start)
            model = _Velocity(self, seed)
            grid = Grid(torch.linspace(0.0, -self.steps, self.steps + 1, dtype=torch.float64))
            options = Options(min(self.batch_size, len(numbers)), progress=progress)
            span = (0.0, float(self.steps))
            r = Engine(make_job(model, _PROCESS, _Euler(self.step_size), grid, span, samples, options)).run()
            x = torch.full((len(numbers), *self.event_shape), torch.nan, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                for rows in (r.status == Status.SUCCESS).nonzero().flatten().split(self.batch_size):
                    if len(rows):
                        x[rows] = self._generate(r.samples[rows]).to(self.dtype)
        finite = torch.isfinite(x.flatten(1)).all(1)
        status = r.status.masked_fill((r.status == Status.SUCCESS) & ~finite, int(Status.NON_FINITE))
        return LatentResult(
            samples=x,
            latents=r.samples,
            start=start,
            forward=r.nfe + (r.status == Status.SUCCESS),
            backward=r.nfe,
            status=status,
            index=numbers,
            seed=seed,
            unseen=float(self._unseen) / max(1, self._densities),
            bank_forward=price[0],
            bank_backward=price[1],
            seconds=time.perf_counter() - began,
        )

    def _gradient(
        self, z: State, noise: Callable[[int], Tensor], bank: KernelDensity | None, own: Index | None = None
    ) -> State:
        """The gradient of w_1 log p + w_2 log p(y | .) - w_3 log q at each z, with shape (B, *latent).

        `noise(j)` is the j-th draw of the mollifier's normals, with shape (B, *event). `bank` is q, and `own` says
        which particle of it a row is, with shape (B,).
        """
        of_data, of_likelihood, of_bank = self.weights
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x = self._generate(z)
            gain = x.new_zeros(len(z), dtype=torch.float64)
            if of_data or of_bank:
                features = self._mollified(x, noise)
            if of_data:
                gain = gain + of_data * self._seen(self.data_density.log_density(features))
            if of_likelihood and self.log_likelihood is not None:
                value = self.log_likelihood(x)
                if value.shape != (len(z),):
                    raise ValueError(f"log_likelihood must return shape {(len(z),)}; it returned {tuple(value.shape)}.")
                gain = gain + of_likelihood * value
            if of_bank and bank is not None:
                gain = gain - of_bank * self._seen(bank.log_density(features, own))
            if not gain.requires_grad:
                raise ValueError("generator, features and log_likelihood must be differentiable; no gradient comes.")
            return torch.autograd.grad(gain.sum(), z)[0]

    def _seen(self, log_density: Tensor) -> Tensor:
        """The log-densities, 0 for rows that the density does not see, which are counted."""
        unseen = log_density == -math.inf
        self._densities += len(unseen)
        self._unseen += int(unseen.sum())
        return log_density.masked_fill(unseen, 0.0)

    def _prepare(self, seed: int, progress: bool) -> tuple[int, int]:
        """Moves the bank of a seed, if it is not there; evaluations of the generator and backward passes of it."""
        if self.weights[2] == 0 or (self._bank is not None and self._bank[0] == seed):
            return 0, 0
        numbers = torch.arange(self.bank, device=self.device)
        z = FreshNoise(seed, self.latent_shape, self.dtype).normal(numbers, torch.full_like(numbers, _BANK_START), 0)
        noise = FreshNoise(seed, self.event_shape, self.dtype)
        densities: list[KernelDensity] = []
        for step in tqdm(range(self.steps), "bank", unit="step", disable=not progress):
            with torch.no_grad():
                x = torch.cat([self._generate(part) for part in z.split(self.batch_size)])
                points = self._features_of(x)
                if not torch.isfinite(points).all():
                    raise ValueError(
                        f"features of the bank are not finite at step {step} of {self.steps}: lower step_size ("
                        f"{self.step_size:g}), or look at the generator."
                    )
                noisy = self._noisy_features(x, noise, _OF_BANK + step)
            densities.append(KernelDensity(points, self.width, self.ridge, noisy))
            parts = []
            for rows in numbers.split(self.batch_size):
                draws = self._draws(noise, rows, _OF_BANK + step)
                parts.append(self._gradient(z[rows], draws, densities[-1], own=rows))
            z = z + self.step_size * torch.cat(parts)
        self._bank = seed, densities
        return 2 * self.bank * self.steps, self.bank * self.steps

    def _generate(self, z: Tensor) -> Tensor:
        x = self.generator(z)
        if not isinstance(x, Tensor) or tuple(x.shape) != (len(z), *self.event_shape) or x.device != self.device:
            came = f"{tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"generator must return samples like the data, with shape {(len(z), *self.event_shape)} on "
                f"{self.device}; it returned {came} for latents with shape {tuple(z.shape)}."
            )
        return x

    def _features(self, x: Tensor) -> Tensor:
        """With shape (B, F)."""
        f = x if self.features is None else self.features(x)
        if not isinstance(f, Tensor) or f.ndim < 1 or len(f) != len(x):
            came = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"features must return one row for each of {len(x)}; they returned {came}.")
        return f.flatten(1)

    def _features_of(self, x: Tensor) -> Tensor:
        return torch.cat([self._features(part) for part in x.split(self.batch_size)])

    def _draws(self, noise: FreshNoise, numbers: Index, position: int) -> Callable[[int], Tensor]:
        return lambda j: noise.normal(numbers, torch.full_like(numbers, position), j)

    def _mollified(self, x: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        """Features of x - e_j, with shape (m, B, F); of x itself without a mollifier, with m = 1."""
        if self.mollifier == 0:
            return self._features(x)[None]
        return torch.stack([self._features(x - self.mollifier * noise(j)) for j in range(self.draws)])

    def _noisy_features(self, x: Tensor, noise: FreshNoise, position: int) -> Tensor | None:
        if self.mollifier == 0:
            return None
        rows = torch.arange(len(x), device=self.device).split(self.batch_size)
        return torch.cat([self._mollified(x[r], self._draws(noise, r, position)) for r in rows], 1)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        with evaluation_mode(self.generator), evaluation_mode(self.features), evaluation_mode(self.log_likelihood):
            yield

    def _check_generator(self, data: Tensor) -> None:
        """Refuses a generator that does not fit the data; warns if its scale does not."""
        numbers = torch.arange(16, device=self.device)
        x = self._generate(FreshNoise(0, self.latent_shape, self.dtype).prior(numbers))
        x = x[torch.isfinite(x.flatten(1)).all(1)]
        if not x.is_floating_point() or not len(x):
            raise ValueError("generator must return finite floating-point samples for latents from N(0, I).")
        reach = [float((part - part.mean()).abs().amax()) for part in (x, data)]
        if not 0.2 < reach[0] / max(reach[1], 1e-30) < 5:
            warn(
                f"the generator's samples reach {reach[0]:.3g} from their mean, the data {reach[1]:.3g}: are both on "
                "one scale?",
                UserWarning,
            )


class _Velocity(ScoreModel):
    """The velocity of a flow in the place of a network; the engine's clock is minus the number of steps made."""

    role = "the generator"

    def __init__(self, flow: LatentFlow, seed: int) -> None:
        noise = FreshNoise(seed, flow.event_shape, flow.dtype)

        densities = [None] * flow.steps if flow._bank is None else flow._bank[1]

        def velocity(z: Tensor, t: Tensor, number: Tensor) -> Tensor:
            # A row whose sample has left stays at the end until the batch shrinks.
            v, made = torch.empty_like(z), (-t).round().long().clamp(max=flow.steps - 1)
            for step in made.unique().tolist():  # one, unless a sample failed and the next took its slot
                rows = (made == step).nonzero().flatten()
                draws = flow._draws(noise, number[rows], step)
                v[rows] = flow._gradient(z[rows], draws, densities[step])
            return v

        super().__init__(velocity, _PROCESS, event_shape=flow.latent_shape)


@dataclasses.dataclass(frozen=True)
class _Euler(Solver):
    """z <- z + step_size velocity(z)."""

    convergence = "1"
    noise = "none"
    deterministic = True
    use = "LatentFlow"
    calls_per_step = 1

    step_size: float

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        return Step(x_t + self.step_size * model.output(x_t, t), {})


def sampler_map(
    score_fn: ScoreModel | ScoreFn, sde: SDE | None = None, *, solver: Solver | None = None, nfe: int | None = None
) -> Callable[[Tensor], Tensor]:
    """A diffusion model as a differentiable generator: from z ~ N(0, I) to the sample of a few-step solver.

    An evaluation costs the calls of a sample, and they are made again in its backward pass: see `differentiable` of
    `fastsde.sample`.

    Args:
        score_fn: as for `sample`, like sde.
        solver: as for `sample`; deterministic. A solver from `fit` needs the fewest calls.
        nfe: budget of the solver's own grid.

    Raises:
        ValueError, TypeError: as `sample`; also for a solver with noise.
    """
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    if solver is not None and isinstance(solver, Solver) and not solver.deterministic:
        raise ValueError(f"a map from latents needs a deterministic solver; {solver!r} draws noise.")

    def generate(z: Tensor) -> Tensor:
        x = process.prior(z)
        r = api.sample(model, sde, x_init=x, solver=solver, nfe=nfe, seed=0, batch_size=len(z), differentiable=True)
        return r.samples

    return generate


def _checked_weights(weights: object, log_likelihood: object) -> tuple[float, float, float]:
    three = tuple(weights) if isinstance(weights, (tuple, list)) else ()
    if len(three) != 3:
        raise ValueError(f"weights must be three numbers, of log p(x), log p(y | x) and - log q(x); got {weights!r}.")
    of_data, of_likelihood, of_bank = (check_number(f"weights[{k}]", w, 0.0) for k, w in enumerate(three))
    if of_data == of_bank == 0 and (of_likelihood == 0 or log_likelihood is None):
        raise ValueError(f"weights must leave at least one term; got {weights!r} and log_likelihood={log_likelihood}.")
    return of_data, of_likelihood, of_bank


def _median_distance(points: Tensor) -> float:
    """Of distinct points, among the first of them."""
    distance = torch.pdist(points[:_MEDIAN_OF].double())
    median = float(distance.median())
    if not median > 0:
        raise ValueError("features of the data are all the same: no width can be chosen from them; give width=.")
    return median
