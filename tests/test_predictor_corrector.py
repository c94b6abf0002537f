"""Predictor-corrector sampling, algorithms 2 and 3 of the thesis, against independent transcriptions."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import (
    LINEAR_BETAS,
    MILD,
    GivenNoise,
    assert_independent,
    bind,
    curved,
    curved_model,
    draw,
    exact_variance,
    vector,
)
from stubs import Recorder, never

import fastsde
from fastsde import (
    DDIM,
    VESDE,
    VPSDE,
    Ancestral,
    DiscreteVPSDE,
    EulerMaruyama,
    Grid,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
    ScoreModel,
)
from fastsde.score import GaussianScore

PREDICTORS = [ReverseDiffusion(), Ancestral(), Ancestral(posterior=False)]
T, S = vector(0.9, 0.5, 0.02), vector(0.85, 0.499, 0.01)


# ---- one step of the predictors, by hand -----------------------------------------------------------------------------


def abar(t):
    """alpha^2 of VP with its published constants (Song et al. 2021, eq. 33)."""
    return np.exp(-(0.1 * t + 0.5 * 19.9 * t**2))


def predicted(solver, sde, x, t, s, z):
    """Algorithms 2 and 3, lines 3 to 5, and ancestral sampling, one element at a time in NumPy."""
    score = curved(x, t)
    if isinstance(sde, VESDE):
        high, low = 0.01 * 5000**t, 0.01 * 5000**s
        beta, kept, later, noisier = high**2 - low**2, 1.0, low**2, high**2
        mean = x + beta * score
    else:
        beta = 1 - abar(t) / abar(s)
        kept, later, noisier = np.sqrt(1 - beta), 1 - abar(s), 1 - abar(t)
        mean = (x + beta * score) / kept
    if isinstance(solver, ReverseDiffusion):
        return (2 - kept) * x + beta * score + np.sqrt(beta) * z
    return mean + np.sqrt(beta * later / noisier if solver.posterior else beta) * z


@pytest.mark.parametrize("sde", [VESDE(), VPSDE()], ids=["VESDE", "VPSDE"])
@pytest.mark.parametrize("solver", PREDICTORS, ids=repr)
def test_predictors_are_the_published_ones(solver, sde):
    x, z = draw(3, 4), draw(3, 4, seed=1)
    step = solver.step(bind(curved_model(sde), 3), sde, x, T, S, GivenNoise(z), {})
    expected = predicted(solver, sde, *(a.numpy() for a in (x, T[:, None], S[:, None], z)))
    # Differences such as 1 - abar cancel three digits in the transcription.
    np.testing.assert_allclose(step.x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", PREDICTORS, ids=repr)
def test_on_a_table_beta_is_the_entry_of_the_table(solver):
    sde, k = DiscreteVPSDE(LINEAR_BETAS), torch.tensor([999, 500, 1])
    beta, bars = LINEAR_BETAS[k, None], (1 - LINEAR_BETAS).cumprod(0)
    x, z, t = draw(3, 4), draw(3, 4, seed=1), (k + 1).double() / 1000
    score = curved(x, t[:, None])
    step = solver.step(bind(curved_model(sde), 3), sde, x, t, k.double() / 1000, GivenNoise(z), {})
    if isinstance(solver, ReverseDiffusion):
        expected = (2 - (1 - beta).sqrt()) * x + beta * score + beta.sqrt() * z
    else:
        small = beta * (1 - bars[k - 1, None]) / (1 - bars[k, None])  # DDPM, eq. 7
        expected = (x + beta * score) / (1 - beta).sqrt() + (small if solver.posterior else beta).sqrt() * z
    # A level k / N as a floating-point time moves log alpha by roundings; beta is as small as 1e-4 of it.
    torch.testing.assert_close(step.x, expected, rtol=1e-9, atol=1e-9)


# ---- one step of the corrector, by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["per sample", "batch_mean", "annealed"])
@pytest.mark.parametrize("sde", [VESDE(), VPSDE()], ids=["VESDE", "VPSDE"])
def test_langevin_step_is_the_published_one(sde, kind):
    x, z, snr = draw(3, 4, 2) * vector(0.1, 1.0, 5.0)[:, None, None], draw(3, 4, 2, seed=1), 0.16
    options = {} if kind == "per sample" else {kind: True}
    model = ScoreModel(lambda x, t: curved(x, t[:, None, None]), sde)
    shrink = vector(1.0, 0.98, 0.5)
    got = Langevin(snr, **options).correct(bind(model, 3), sde, x, S, shrink, lambda _: z)
    state, noise = x.numpy(), z.numpy()
    score = curved(state, S.numpy()[:, None, None])
    norms = [(np.linalg.norm(z_i), np.linalg.norm(s_i)) for z_i, s_i in zip(noise, score, strict=True)]
    mean = np.mean(norms, axis=0)
    for i, (above, below) in enumerate(norms):
        level = 0.01 * 5000 ** float(S[i]) if isinstance(sde, VESDE) else math.sqrt(1 - abar(float(S[i])))
        ratio = {"per sample": above / below, "batch_mean": mean[0] / mean[1], "annealed": level}[kind]
        eps = 2 * (snr * ratio) ** 2 * float(shrink[i])
        expected = state[i] + eps * score[i] + math.sqrt(2 * eps) * noise[i]
        # Roundings; 1 - abar loses two digits at t = 0.01.
        np.testing.assert_allclose(got[i], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("corrector_first", [False, True])
def test_the_step_shrinks_by_the_alpha_of_the_predictor(corrector_first):
    # Algorithm 5 of Song et al.: eps carries alpha_i = 1 - beta_i of the step, whichever end is corrected.
    sde, x, z, normals = VPSDE(), draw(3, 4), draw(3, 4, seed=1), [draw(3, 4, seed=k) for k in (2, 3)]
    shrink = torch.from_numpy(abar(T.numpy()) / abar(S.numpy()))
    corrector = Langevin(0.3)
    pc = PredictorCorrector(ReverseDiffusion(), corrector, 2, corrector_first)
    model = bind(curved_model(sde), 3)
    got = pc.step(model, sde, x, T, S, GivenNoise(z, normals=[None, *normals]), {}).x  # number 0 is the predictor's
    assert model.nfe.tolist() == [3] * 3

    def corrected(x, t):
        for noise in normals:
            score = curved(x, t[:, None])
            eps = 2 * (0.3 * noise.norm(dim=1) / score.norm(dim=1)) ** 2 * shrink
            x = x + eps[:, None] * score + (2 * eps).sqrt()[:, None] * noise
        return x

    def stepped(x):
        return torch.from_numpy(
            predicted(ReverseDiffusion(), sde, *(a.numpy() for a in (x, T[:, None], S[:, None], z)))
        )

    expected = stepped(corrected(x, T)) if corrector_first else corrected(stepped(x), S)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)  # roundings, three evaluations deep


@pytest.mark.parametrize("options", [{}, {"annealed": True}], ids=["snr", "annealed"])
def test_rows_of_a_correction_do_not_see_each_other(options):
    sde, n = VPSDE(), 5
    x, z = draw(n, 4) * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None], draw(n, 4, seed=1)
    x[2] = math.inf
    t, shrink = torch.linspace(0.1, 1, n, dtype=torch.float64), torch.linspace(1, 0.5, n, dtype=torch.float64)
    joint = Langevin(**options).correct(bind(curved_model(sde), n), sde, x, t, shrink, lambda _: z)
    for i in range(n):
        row = slice(i, i + 1)
        alone = Langevin(**options).correct(
            bind(curved_model(sde), 1), sde, x[row], t[row], shrink[row], lambda _, row=row: z[row]
        )
        # Vectorised and scalar kernels may round elementary functions differently by an ulp.
        torch.testing.assert_close(joint[row], alone, rtol=1e-14, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"annealed": True}, {"batch_mean": True}], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_score_of_zero_is_no_disaster(options, dtype):
    model = bind(ScoreModel(lambda x, t: torch.zeros_like(x), VESDE()), 2)
    x, z = draw(2, 4).to(dtype), draw(2, 4, seed=1).to(dtype)
    x = Langevin(**options).correct(model, VESDE(), x, vector(0.5, 0.5), vector(1.0, 1.0), lambda _: z)
    assert torch.isfinite(x).all()
    # The largest level is 50: nothing meaningful is beyond a thousand of them.
    assert float(x.abs().max()) < 5e4


# ---- the whole walk --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "predictor",
    [ReverseDiffusion(12), Ancestral(12), DDIM(12, eta=0.7), EulerMaruyama(12), EulerMaruyama(12, True)],
    ids=repr,
)
@pytest.mark.parametrize("corrector_first", [False, True])
def test_without_corrections_it_is_its_predictor(predictor, corrector_first):
    model = curved_model(VPSDE(), event_shape=(5,))
    a, b = (
        fastsde.sample(model, n=5, solver=solver, seed=3, batch_size=2, dtype=torch.float64)
        for solver in (predictor, PredictorCorrector(predictor, n_corrector=0, corrector_first=corrector_first))
    )
    assert torch.equal(a.samples, b.samples)
    assert torch.equal(a.nfe, b.nfe)


@pytest.mark.parametrize("n_corrector", [1, 3])
@pytest.mark.parametrize("corrector_first", [False, True])
def test_order_of_the_calls(n_corrector, corrector_first):
    sde, steps = VPSDE(), 4
    network = Recorder(lambda x, t: -x)
    solver = PredictorCorrector(ReverseDiffusion(steps), Langevin(0.1), n_corrector, corrector_first)
    r = fastsde.sample(network, sde, shape=(2, 3), solver=solver, dtype=torch.float64)
    times = Grid.uniform(sde, steps).times.tolist()
    # First: n_corrector calls and one of the predictor at t. After: the predictor's at t, then n_corrector at s.
    walk = [
        [t] * (n_corrector + 1) if corrector_first else [t] + [s] * n_corrector for t, s in itertools.pairwise(times)
    ]
    assert [t.tolist() for _, t, _ in network.calls] == [[t, t] for t in [*itertools.chain(*walk), sde.t_min]]
    assert r.nfe.tolist() == [steps * (1 + n_corrector) + 1] * 2
    assert r.accepted.tolist() == [steps] * 2


@pytest.mark.parametrize("corrector_first", [False, True])
def test_every_step_and_correction_has_noise_of_its_own(corrector_first):
    # Under a zero score on VE, the network's states differ by known multiples of z: b in the predictor, from
    # sigma_t^2 - sigma_s^2 = b^2, and 2 snr sigma in an annealed correction.
    sde, network, steps, snr, d = VESDE(), Recorder(), 3, 0.2, 4096
    solver = PredictorCorrector(ReverseDiffusion(steps), Langevin(snr, annealed=True), 3, corrector_first)
    fastsde.sample(network, sde, shape=(2, d), solver=solver, dtype=torch.float64)
    states = torch.stack([x for x, _, _ in network.calls])
    sizes = [float(sde.sigma(vector(sde.t_max)))]
    for t, s in itertools.pairwise(Grid.uniform(sde, steps).times):
        high, low = sde.sigma(torch.stack([t, s])).tolist()
        corrections = [2 * snr * (high if corrector_first else low)] * 3
        step = [math.sqrt(high**2 - low**2)]
        sizes += corrections + step if corrector_first else step + corrections
    z = torch.cat([states[:1], states.diff(dim=0)]) / torch.tensor(sizes, dtype=torch.float64)[:, None, None]
    z = z.flatten(0, 1)
    assert len(z) == 2 * (3 * 4 + 1)
    assert_independent(z)


def test_a_predictor_and_its_corrector_never_share_noise():
    # Heun's method with churn draws extra normals of its own.
    sde, d = fastsde.EDM(), 4096
    drawn = []

    class Noted(GivenNoise):
        def normal(self, k=0):
            drawn.append(k)
            return torch.zeros_like(self.dw)

    pc = PredictorCorrector(fastsde.Heun(churn=0.3), Langevin(), 2)
    model = bind(ScoreModel(lambda x, t: -x, sde), 1)
    pc.step(model, sde, draw(1, d), vector(2.0), vector(1.0), Noted(draw(1, d)), {})
    assert len(drawn) == len(set(drawn)) == 3


def variance_in_many_dimensions(sde, std, snr, times):
    """Variance under PC with the snr rule on a centred Gaussian, in the limit of many dimensions.

    The norms are then their expectations, |z|^2 / |score|^2 = m^2 / v for model variance m and actual variance v, so
    that each step is a known number times x and of noise.
    """
    variance = float(sde.prior_std) ** 2
    for t, s in itertools.pairwise(times[:, None]):
        kept, beta = (
            sde.alpha(t) / sde.alpha(s),
            sde.sigma(t) ** 2 - (sde.alpha(t) / sde.alpha(s)) ** 2 * sde.sigma(s) ** 2,
        )
        variance = (2 - kept - beta / exact_variance(sde, std, t)) ** 2 * variance + beta
        m = exact_variance(sde, std, s)
        eps = 2 * snr**2 * m**2 / variance * kept**2
        variance = (1 - eps / m) ** 2 * variance + 2 * eps
    return float(variance)


@pytest.mark.long
@pytest.mark.parametrize("sde", [MILD["VESDE"], MILD["VPSDE"], VPSDE()], ids=repr)
def test_variance_on_gaussian_data(sde):
    std, snr, n, d = 0.5, 0.2, 8, 8192
    model = GaussianScore(sde, torch.zeros(d), torch.full((d,), std))
    exact = float(exact_variance(sde, std, vector(sde.t_min)))
    limits = {}
    for steps in (8, 32, 128):
        grid = Grid.log_snr(sde, steps)
        limits[steps] = variance_in_many_dimensions(sde, std, snr, grid.times)
        solver = PredictorCorrector(ReverseDiffusion(), Langevin(snr))
        r = fastsde.sample(model, n=n, solver=solver, controller=grid, denoise=False)
        # A variance of n d normals has a relative standard error of sqrt(2 / (n d)); five of them. The norms
        # fluctuate: noise and its size are correlated, which adds at most 4 / d.
        assert abs(float(r.samples.double().square().mean()) / limits[steps] - 1) < 5 * (2 / (n * d)) ** 0.5 + 4 / d
    errors = [abs(limit / exact - 1) for limit in limits.values()]
    assert errors[0] > errors[1] > errors[2]
    # Langevin steps of relative size h = 2 snr^2 rest at 1 / (1 - h / 2) times the variance.
    # At 128 steps measured within 0.004 of that.
    assert limits[128] / exact == pytest.approx(1 / (1 - snr**2), abs=0.005)


def test_steps_are_where_the_predictor_wants_them():
    # Solvers whose steps are uniform in log-SNR keep them when corrected.
    solver = PredictorCorrector(fastsde.Heun(6), n_corrector=0)
    model = ScoreModel(lambda x, t: -x, VPSDE(), event_shape=(3,))
    a, b = (fastsde.sample(model, n=2, solver=s, trajectory=True).trajectory[0].t for s in (solver, fastsde.Heun(6)))
    assert torch.equal(a, b)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PredictorCorrector("ancestral"), TypeError, "predictor must be a Solver, .*got 'ancestral'"),
        (lambda: PredictorCorrector(ReverseDiffusion), TypeError, "predictor must be a Solver"),
        (lambda: PredictorCorrector(corrector=0.16), TypeError, "corrector must be a Corrector.*got float"),
        (lambda: PredictorCorrector(n_corrector=-1), ValueError, "n_corrector must be .*at least 0; got -1"),
        (lambda: PredictorCorrector(n_corrector=True), ValueError, "n_corrector must be an integer"),
        (lambda: PredictorCorrector(fastsde.ExtrapolatedEM()), ValueError, "ExtrapolatedEM cannot be a predictor"),
        (lambda: PredictorCorrector(fastsde.UniPC(5)), ValueError, "UniPC cannot be a predictor: use ReverseDiffusion"),
        (lambda: Langevin(snr=0.0), ValueError, r"snr must be in \(0, inf\)"),
        (lambda: Langevin(snr=math.nan), ValueError, r"snr must be in \(0, inf\)"),
        (lambda: ReverseDiffusion(0), ValueError, "steps must be an integer of at least 1; got 0"),
        (lambda: Ancestral(0), ValueError, "steps must be an integer of at least 1; got 0"),
    ],
)
def test_refusals_at_construction(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_refusals_before_the_first_call():
    grid = Grid.uniform(VPSDE(), 5)
    for solver, controller, message in (
        (PredictorCorrector(), None, "needs its number of steps"),
        (PredictorCorrector(ReverseDiffusion(5)), grid, "either controller= or solver.steps"),
        (PredictorCorrector(), fastsde.Adaptive(0.05, 0.01), "no error estimate"),
        # What the predictor cannot walk, PC cannot either.
        (PredictorCorrector(fastsde.ConsistentAnnealed(eta=1e-6)), grid, r"\[1 - gamma, 1 \+ gamma\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fastsde.sample(never, VPSDE(), shape=(2, 3), solver=solver, controller=controller)
    r = fastsde.sample(lambda x, t: -x, VPSDE(), shape=(2, 3), solver=PredictorCorrector(), controller=grid)
    assert r.accepted.tolist() == [5, 5]
