"""`log_likelihood`: the density of data under the probability flow."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastsde.arguments import as_model, resolve_samples
from fastsde.batching import expand_like
from fastsde.checks import check_count, check_flags, check_positive, check_states
from fastsde.control import Controller
from fastsde.engine import Engine
from fastsde.job import Options, Samples, make_job
from fastsde.noise import FreshNoise, StepNoise
from fastsde.result import Interrupted, SampleResult, Status
from fastsde.score.base import BoundModel, ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.solvers.forward import Forward
from fastsde.solvers.probability_flow import ProbabilityFlow
from fastsde.solvers.runge_kutta import noise_level, runge_kutta_step
from fastsde.solvers.tableaus import DORMAND_PRINCE, Tableau
from fastsde.steps import resolve_controller
from fastsde.types import Carry, Cond, ScoreFn, State, Time


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods, in the order of the data.

    Attributes:
        log_prob: log p(x) in nats, averaged over probes and dequantisations, with shape (n,); NaN where it failed.
        bits_per_dim: -log2 p(x) / d, minus log2 of the bin width if the data were dequantised, with shape (n,).
        standard_error: that of `bits_per_dim`, from probes or dequantisations, with shape (n,); 0 for the exact trace,
            NaN where a single draw cannot tell. From k of them, errors divided by it follow about Student's t with
            k - 1 degrees of freedom.
        nfe: network calls, each with one backward pass for each probe (d for the exact trace), with shape (n,).
        status: a `Status` for each, with shape (n,).
        seconds: wall time.
    """

    log_prob: Tensor
    bits_per_dim: Tensor
    standard_error: Tensor
    nfe: Tensor
    status: Tensor
    seconds: float


def log_likelihood(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    x: Tensor,
    probes: int = 4,
    exact: bool = False,
    gaussian: bool = False,
    bin_width: float | None = None,
    draws: int = 1,
    rtol: float | None = None,
    atol: float | None = None,
    tableau: Tableau = DORMAND_PRINCE,
    controller: Controller | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    cond: Cond | None = None,
    max_nfe: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Likelihood:
    r"""Log-likelihood of data under the probability flow, with a standard error.

        log p(x) = log N(y_T; 0, rho_T^2 I) + integral over rho from rho_0 to rho_T of div eps(y) drho - d log alpha_0

    along dy / drho = eps, with y = x / alpha and rho = sigma / alpha, from t_min to t_max. Each sample has its own step
    size. Steps are chosen in log rho, because the divergence is smooth there. The density is that of x_t at `t_min`,
    with noise sigma(t_min). The divergence is estimated by Hutchinson's v^T (d eps / dy) v. The `probes` random vectors
    v are the same at all times of a sample. With `exact` it is computed by d backward passes. Source: Song et al.,
    https://arxiv.org/abs/2011.13456, app. D; Grathwohl et al., https://arxiv.org/abs/1810.01367, sec. 3.

    A sample costs 100 to 200 network calls at the default tolerances. Each has `probes` backward passes (d with
    `exact`). Four images of 28 x 28 take half a minute with the packaged model on two cores.

    Args:
        score_fn: as for `sample`; differentiable in x by autograd.
        sde: as for `sample`.
        x: data, with shape (n, *event).
        probes: number of vectors v for each sample. Each costs one backward pass at each call. The standard error needs
            two or more probes, or two or more draws.
        exact: compute the trace exactly, without probes.
        gaussian: take normal probes. By default they are random signs (Rademacher), which have less variance.
        bin_width: spacing of the values of quantised data, in units of x (2 / 255 for 8 bits in [-1, 1]). Uniform noise
            over a bin is added to the data. The bits are then an upper bound of those of the quantised data. None for
            continuous data.
        draws: how many times this noise is drawn for each sample.
        rtol: relative tolerance, 1e-4 by default.
        atol: absolute tolerance, in units of the data and of nats per dimension, 1e-4 by default.
        tableau: Runge-Kutta method.
        controller: a `Grid`, instead of tolerances.
        seed: of probes and dequantisation; sample i depends on (seed, i) alone.
        batch_size, cond, max_nfe, dtype, progress: as for `sample`.
        device: that of `x` by default.

    Raises:
        ValueError, TypeError, SamplingError: as `sample`.
        Interrupted: at Ctrl-C. A `Likelihood` is in `.result`, with NaN for what is not finished.
    """
    check_states("x", x)
    check_flags(exact=exact, gaussian=gaussian)
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    asked = resolve_samples(model, given=x, name="x", seed=seed, cond=cond, dtype=dtype, device=device)
    n, event, dtype, device = len(asked.index), asked.event, asked.dtype, asked.device
    probes, draws = check_count("probes", probes, 1), check_count("draws", draws, 1)
    bin_width = None if bin_width is None else check_positive("bin_width", bin_width)
    if bin_width is None and draws > 1:
        raise ValueError("draws is the number of dequantisations; it needs bin_width=.")
    flow = ProbabilityFlow(tableau=tableau)
    if controller is None:
        if not flow.adaptive:
            raise ValueError(f"tableau {tableau} has no error estimate to choose steps by; give controller=Grid(...).")
        rtol, atol = 1e-4 if rtol is None else rtol, 1e-4 if atol is None else atol
    controller = resolve_controller(model, process, flow, controller, rtol, atol)
    t_start, t_end = controller.span(process.t_min, process.t_max)

    index = torch.arange(n * draws, device=device)
    data = x.to(device, dtype).repeat_interleave(draws, 0)
    if bin_width is not None:
        # The normal distribution function makes a uniform draw of a normal one.
        data = data + bin_width * (torch.special.ndtr(FreshNoise(asked.seed, event, dtype).prior(index)) - 0.5)
    ends, columns = torch.tensor([t_end, t_start], dtype=torch.float64, device=device), 1 if exact else probes
    y_start = data.reshape(len(data), -1) / float(process.alpha(ends)[0])
    d = y_start.shape[1]
    samples = Samples(
        index=index,
        event=(d + columns,),
        dtype=dtype,
        seed=asked.seed,
        cond={key: value.repeat_interleave(draws, 0) for key, value in asked.cond.items()},
        start=torch.nn.functional.pad(y_start, (0, columns)),
    )
    solver = Forward(_Density(tableau, event, columns, exact, gaussian))
    options = Options(batch_size, max_nfe, progress=progress)
    job = make_job(model, process, solver, controller.reversed(), (t_end, t_start), samples, options)
    rho, log_alpha = float(noise_level(process, ends)[1]), float(process.log_alpha(ends)[0])

    def told(result: SampleResult) -> Likelihood:
        y, gained = result.samples[:, :d].double(), result.samples[:, d:].double()
        prior = -0.5 * (y / rho).square().sum(1) - d * (math.log(rho) + 0.5 * math.log(2 * math.pi))
        log_prob = (prior[:, None] + d * (gained - log_alpha)).reshape(n, draws, columns)
        return _averaged(result, log_prob, d, bin_width, certain=exact and bin_width is None)

    try:
        return told(Engine(job).run())
    except Interrupted as interruption:
        raise Interrupted(told(interruption.result)) from None


def _averaged(result: SampleResult, log_prob: Tensor, d: int, bin_width: float | None, *, certain: bool) -> Likelihood:
    """The likelihoods from estimates of log p with shape (n, draws, columns) in d dimensions; `certain` if exact."""
    status = result.status.reshape(log_prob.shape[:2])
    log_prob = log_prob.masked_fill((status != Status.SUCCESS).any(1)[:, None, None], torch.nan)
    average, bits = log_prob.mean((1, 2)), d * math.log(2)
    # Over the draws if there are several, else over the columns.
    values = log_prob.mean(2) if log_prob.shape[1] > 1 else log_prob[:, 0]
    count = values.shape[1]
    error = values.std(1) / math.sqrt(count) if count > 1 else torch.full_like(average, torch.nan)
    return Likelihood(
        average,
        -average / bits - (0.0 if bin_width is None else math.log2(bin_width)),
        0 * average if certain else error / bits,
        result.nfe.reshape(status.shape).sum(1),
        status.max(1).values.masked_fill((status == Status.PENDING).any(1), int(Status.PENDING)),
        result.seconds,
    )


@dataclasses.dataclass(frozen=True)
class _Density(Solver):
    """Runge-Kutta for y and, in further columns, the integral of the divergence per dimension, one for each probe."""

    deterministic = True

    tableau: Tableau
    event: tuple[int, ...]
    columns: int
    exact: bool
    gaussian: bool

    @property
    def calls_per_step(self) -> int:
        return len(self.tableau.c) - self.warm_up

    @property
    def adaptive(self) -> bool:
        return self.tableau.error is not None

    @property
    def warm_up(self) -> bool:  # type: ignore[override]
        return self.tableau.first_same_as_last

    def init(self, x_t: State) -> Carry:
        return {"slope": torch.zeros_like(x_t)} if self.warm_up else {}

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        vectors = self._vectors(x_t, noise)

        def slope(packed: State, at: Time) -> State:
            with torch.enable_grad():
                y = packed[:, : -self.columns].detach().requires_grad_()
                x = (expand_like(sde.alpha(at), y) * y).reshape(-1, *self.event)
                eps = model(x, at).epsilon.reshape(len(y), -1)
            products = [(torch.autograd.grad(eps, y, v, retain_graph=True)[0] * v).sum(1) for v in vectors]
            per_dim = torch.stack(products, 1)
            if self.exact:
                per_dim = per_dim.sum(1, keepdim=True)
            return torch.cat([eps.detach(), per_dim / y.shape[1]], 1)

        y, error, last = runge_kutta_step(self.tableau, slope, sde, x_t, t, s, carry.get("slope"), logarithmic=True)
        return Step(y, {"slope": last} if self.warm_up else {}, error, torch.maximum(x_t.abs(), y.abs()))

    def _vectors(self, packed: State, noise: StepNoise) -> list[Tensor]:
        d = packed.shape[1] - self.columns
        if self.exact:
            return list(torch.eye(d, dtype=packed.dtype, device=packed.device)[:, None].expand(-1, len(packed), -1))
        # Fixed along the path: drawn at position 0 of the sample's stream, whatever the step.
        normals = [noise.fixed(k)[:, :d] for k in range(self.columns)]
        return normals if self.gaussian else [z.sign() for z in normals]
