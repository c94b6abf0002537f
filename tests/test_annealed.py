"""Annealed Langevin and consistent annealed sampling against the propositions of the thesis, chapter 8."""

import itertools
import math

import pytest
import torch
from oracles import (
    LINEAR_BETAS,
    SDES,
    GivenNoise,
    assert_independent,
    bind,
    curved,
    curved_model,
    draw,
    point_mass,
    vector,
)
from stubs import Recorder, never

import fastsde
from fastsde import DDIM, EDM, VESDE, VPSDE, Ancestral, AnnealedLangevin, ConsistentAnnealed, Grid, RectifiedFlow
from fastsde.noise import FreshNoise
from fastsde.score import DatasetScore, GaussianScore
from fastsde.solvers.annealed_langevin import closest_step

POINT = 0.3
PROCESSES = {name: sde for name, sde in SDES.items() if name != "SubVPSDE"}
each_process = pytest.mark.parametrize("sde", PROCESSES.values(), ids=PROCESSES)
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
both = pytest.mark.parametrize("sde", [VESDE(), VPSDE()], ids=["VESDE", "VPSDE"])
each_start = pytest.mark.parametrize(
    "solver",
    [AnnealedLangevin(levels=6, n_sigma=2, eta=0.3), ConsistentAnnealed(levels=6)],
    ids=["ALS", "CAS"],
)


def rho(sde, t):
    return sde.sigma(t) / sde.alpha(t)


def noise_on_the_way(solver, sde, times, steps, draws):
    """Mean and variance of x at the end of each step (t, s), exactly: each is an affine map of x and its noises.

    The map is read off by probing the step with x and each of its normals equal to 0 or 1.
    """
    first = times[:1]
    mean, variance = float(sde.alpha(first)) * POINT, float(sde.sigma(first)) ** 2
    rows = draws + 3
    unit = torch.eye(rows, dtype=torch.float64)[:, :, None]
    for t, s in steps:
        # Column k is 1 in row k alone: row 0 keeps everything at zero, rows 1 and 2 probe x and z, the others a normal.
        noise = GivenNoise(unit[2], normals=unit[3:])
        out = solver.step(bind(point_mass(sde, (1,)), rows), sde, unit[1], t.expand(rows), s.expand(rows), noise, {})
        at_zero, *rest = out.x[:, 0].tolist()
        slope, *weights = (value - at_zero for value in rest)
        mean, variance = slope * mean + at_zero, slope**2 * variance + sum(w * w for w in weights)
        yield mean, variance


# ---- Proposition 1: the noise of annealed Langevin sampling ----------------------------------------------------------


def after_langevin(before, level, eta, n):
    """Noise variance after n Langevin steps at a level of variance `level` (thesis, app. C.6)."""
    kept = (1 - eta) ** (2 * n)
    return before * kept + 2 * level / (2 - eta) * (1 - kept)


@pytest.mark.long
@each_process
@pytest.mark.parametrize("n_sigma", [1, 2, 5])
@pytest.mark.parametrize("eta", [0.03, 0.18, 0.7])
def test_proposition_1(sde, n_sigma, eta):
    times = Grid.log_snr(sde, 11).times
    levels = rho(sde, times) ** 2
    turns = [(times[0], times[0]), *itertools.pairwise(times)]
    variance = levels[0]
    path = noise_on_the_way(AnnealedLangevin(eta=eta, n_sigma=n_sigma), sde, times, turns, n_sigma)
    for i, (mean, measured) in enumerate(path):
        variance = after_langevin(variance, levels[i], eta, n_sigma)
        alpha = sde.alpha(times[i : i + 1])
        # Roundings of weights that are read off as differences: measured below 3e-14.
        assert measured == pytest.approx(float(alpha**2 * variance), rel=1e-12)
        assert mean == pytest.approx(float(alpha * POINT), rel=1e-14)
        assert measured > float(alpha**2 * levels[i])


@pytest.mark.parametrize("gamma", [0.3, 0.7, 0.964, 0.99])
@pytest.mark.parametrize("n_sigma", [1, 2, 5, 20])
def test_the_default_step_size_stays_closest(gamma, n_sigma):
    def resting(eta):
        """The variance over that of the level that a long walk down levels of this ratio settles at."""
        ratio = 1.0
        for _ in range(20_000):
            ratio, before = after_langevin(ratio / gamma**2, 1.0, eta, n_sigma), ratio
            if ratio > 1e6 or abs(ratio - before) < 1e-13:
                break
        return ratio

    eta = closest_step(gamma, n_sigma)
    excess = resting(eta)
    assert 1 < excess < 2
    # A minimum: every other step size, a cell of the searched grid or far away, rests higher (up to roundings).
    for other in (eta - 1e-4, eta + 1e-4, 0.5 * eta, (eta + 1) / 2, 1 - gamma**2 + 1e-3):
        if 0 < other < 1:
            assert resting(other) > excess - 1e-9


# ---- Proposition 2: the noise of consistent annealed sampling --------------------------------------------------------


def random_times(sde):
    inner = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return Grid(
        torch.cat(
            [vector(sde.t_max), sde.t_min + (sde.t_max - sde.t_min) * inner.sort().values.flip(0), vector(sde.t_min)]
        )
    )


GRIDS = {
    "geometric": lambda sde: Grid.log_snr(sde, 10),
    "karras": lambda sde: Grid.karras(sde, 10),
    "random": random_times,
}
ETAS = {
    "DDIM": lambda gamma: 1 - gamma,
    "ancestral": lambda gamma: 1 - gamma**2,
    "default": lambda gamma: None,
    "one": lambda gamma: 1.0,
    "upper": lambda gamma: 1 + gamma,
}


@pytest.mark.long
@each_sde
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("eta", ETAS)
def test_proposition_2(sde, grid, eta):
    times = GRIDS[grid](sde).times
    gamma = float((rho(sde, times[1:]) / rho(sde, times[:-1])).min())
    solver = ConsistentAnnealed(eta=ETAS[eta](gamma))
    solver.check(sde, times)
    path = noise_on_the_way(solver, sde, times, itertools.pairwise(times), 0)
    for s, (mean, variance) in zip(times[1:, None], path, strict=True):
        # Roundings, also of small weights that are read off as differences: measured below 2e-13.
        assert variance**0.5 == pytest.approx(float(sde.sigma(s)), rel=2e-12)
        assert mean == pytest.approx(float(sde.alpha(s)) * POINT, rel=1e-14)


# ---- Proposition 3: the two forms of each update ---------------------------------------------------------------------


@both
def test_proposition_3_langevin(sde):
    t, s, eta = vector(0.6, 0.8), vector(0.5, 0.79), 0.25
    x, z = draw(2, 4), [draw(2, 4, seed=k) for k in (1, 2, 3)]
    alpha, level = sde.alpha(s)[:, None], rho(sde, s)[:, None]
    by_score = by_denoised = x / sde.alpha(t)[:, None]
    for z_k in z:
        # The score of y = x / alpha is alpha times that of x, and H = y + rho^2 score.
        score = alpha * curved(alpha * by_score, s[:, None])
        by_score = by_score + eta * level**2 * score + (2 * eta) ** 0.5 * level * z_k
        denoised = by_denoised + level**2 * alpha * curved(alpha * by_denoised, s[:, None])
        by_denoised = (1 - eta) * by_denoised + eta * denoised + (2 * eta) ** 0.5 * level * z_k
    step = AnnealedLangevin(n_sigma=3, eta=eta).step(
        bind(curved_model(sde), 2), sde, x, t, s, GivenNoise(z[0], normals=z), {}
    )
    # Two orders of the same operations: roundings, of rho^2 up to 40.
    torch.testing.assert_close(step.x, alpha * by_score, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.x, alpha * by_denoised, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("eta", [0.25, None])
def test_proposition_3_consistent(sde, eta):
    # Two rows with different ratios of levels, 0.43 and 0.92 on VE.
    t, s = vector(0.6, 0.8), vector(0.5, 0.79)
    x, z = draw(2, 4), draw(2, 4, seed=1)
    (alpha, alpha_s), (level, level_s) = ((f(t)[:, None], f(s)[:, None]) for f in (sde.alpha, lambda u: rho(sde, u)))
    gamma = level_s / level
    size = 1 - gamma**1.5 if eta is None else torch.full_like(gamma, 0.6)
    y, score = x / alpha, alpha * curved(x, t[:, None])
    beta = (1 - (1 - size) ** 2 / gamma**2).sqrt()
    by_score = y + size * level**2 * score + beta * level_s * z
    by_denoised = (1 - size) * y + size * (y + level**2 * score) + beta * level_s * z
    solver = ConsistentAnnealed(eta=None if eta is None else 0.6)
    step = solver.step(bind(curved_model(sde), 2), sde, x, t, s, GivenNoise(z), {})
    # Two orders of the same operations: roundings, of rho^2 up to 40.
    torch.testing.assert_close(step.x, alpha_s * by_score, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.x, alpha_s * by_denoised, rtol=1e-12, atol=1e-12)


def ratio_of_levels(sde, levels):
    ends = rho(sde, vector(sde.t_max, sde.t_min))
    return float(ends[1] / ends[0]) ** (1 / (levels - 1))


@each_sde
def test_ddim_is_the_lower_end(sde):
    model = GaussianScore(sde, torch.full((5,), 0.2), torch.linspace(0.1, 0.6, 5))
    gamma = ratio_of_levels(sde, 9)
    x = sde.prior_std * draw(3, 5)
    a = fastsde.sample(model, x_init=x, solver=ConsistentAnnealed(levels=9, eta=1 - gamma), denoise=False)
    b = fastsde.sample(model, x_init=x, solver=DDIM(), controller=Grid.log_snr(sde, 8), denoise=False)
    # beta is the root of a rounding of about 1e-15; measured below 6e-8, and most on VP.
    torch.testing.assert_close(a.samples, b.samples, rtol=0, atol=3e-7)


@each_sde
def test_the_ancestral_step_is_one_minus_gamma_squared(sde):
    model = GaussianScore(sde, torch.full((5,), 0.2), torch.linspace(0.1, 0.6, 5))
    levels = 9
    first = ConsistentAnnealed(levels=levels, eta=1 - ratio_of_levels(sde, levels) ** 2)
    a = fastsde.sample(model, n=3, solver=first, denoise=False, dtype=torch.float64)
    for solver in (Ancestral(), DDIM(eta=1.0)):
        grid = Grid.log_snr(sde, levels - 1)
        b = fastsde.sample(model, n=3, solver=solver, controller=grid, denoise=False, dtype=torch.float64)
        # The same noise; roundings of 1 / alpha, which is 1e3 at the start of a flow.
        torch.testing.assert_close(a.samples, b.samples, rtol=1e-9, atol=1e-11)


# ---- what the network and the noise see ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_sigma", [1, 3])
def test_the_network_sees_every_level_n_sigma_times(n_sigma):
    sde, levels = VPSDE(), 5
    network = Recorder()
    solver = AnnealedLangevin(levels=levels, n_sigma=n_sigma, eta=0.1)
    r = fastsde.sample(network, sde, shape=(2, 3), solver=solver, dtype=torch.float64)
    times = Grid.log_snr(sde, levels - 1).times.tolist()
    expected = [t for t in times for _ in range(n_sigma)] + [sde.t_min]  # the last call is the denoised sample
    assert [t.tolist() for _, t, _ in network.calls] == [[t, t] for t in expected]
    assert r.nfe.tolist() == [levels * n_sigma + 1] * 2
    assert r.accepted.tolist() == [levels - 1] * 2


def test_consistent_levels_are_dilated():
    network = Recorder()
    solver = ConsistentAnnealed(levels=5, n_sigma=3)
    r = fastsde.sample(network, VESDE(), shape=(2, 3), solver=solver, dtype=torch.float64)
    assert r.nfe.tolist() == [13, 13]  # (5 - 1) 3 steps and the denoised sample
    sigma = VESDE().sigma(torch.stack([t for _, t, _ in network.calls])[:, 0])
    ratios = sigma[1:] / sigma[:-1]
    # Geometric, up to roundings of times.
    torch.testing.assert_close(ratios, torch.full_like(ratios, ratio_of_levels(VESDE(), 13)), rtol=1e-12, atol=0)


def test_every_langevin_step_has_noise_of_its_own():
    # Under a zero score on VE, the network's states differ by sqrt(2 eta) sigma z, and the first is the prior.
    sde, network, eta, d = VESDE(), Recorder(), 0.1, 4096
    solver = AnnealedLangevin(levels=4, n_sigma=3, eta=eta)
    fastsde.sample(network, sde, shape=(2, d), solver=solver, dtype=torch.float64)
    states = torch.stack([x for x, _, _ in network.calls])
    sigma = sde.sigma(torch.cat([t[:1] for _, t, _ in network.calls]))
    z = states.diff(dim=0) / ((2 * eta) ** 0.5 * sigma[:-1, None, None])
    z = torch.cat([states[:1] / sigma[0], z]).flatten(0, 1)
    assert len(z) == 2 * (4 * 3 + 1)
    assert_independent(z)


@pytest.mark.parametrize("solver", [AnnealedLangevin(n_sigma=2, eta=0.2), ConsistentAnnealed()], ids=["ALS", "CAS"])
def test_the_same_samples_in_every_dressing_of_one_model(solver):
    # In y = x / alpha on the same levels of log-SNR, all linear SDEs are one: the solver must not see which is which.
    log_snr = torch.linspace(-8, 7, 13, dtype=torch.float64)
    y = draw(4, 5, seed=2) * float((-log_snr[0] / 2).exp())
    results = []
    for sde in (VPSDE(), EDM(), RectifiedFlow(t_max=0.9999, t_min=1e-4), fastsde.DiscreteVPSDE(LINEAR_BETAS)):
        times = sde.t_of_log_snr(log_snr)
        model = GaussianScore(sde, torch.full((5,), 0.2), torch.linspace(0.1, 0.6, 5))
        x = y * sde.alpha(times[:1])
        r = fastsde.sample(model, x_init=x, solver=solver, controller=Grid(times), denoise=False, seed=5)
        results.append(r.samples / sde.alpha(times[-1:]))
    for other in results[1:]:
        # Roundings of 1 / alpha, and of times that invert the clock.
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-11)


# ---- start states ----------------------------------------------------------------------------------------------------


@each_start
@both
def test_x_data_starts_from_noisy_data(sde, solver):
    data, t = draw(6, 500, seed=3), vector(sde.t_max)
    starts = {}
    for batch, index in ((2, list(range(6))), (6, [5, 0, 3])):
        options = {"solver": solver, "index": index, "batch_size": batch, "seed": 9, "trajectory": True}
        r = fastsde.sample(point_mass(sde, (500,)), x_data=data[index], **options)
        for i, path in zip(index, r.trajectory, strict=True):
            z = (path.x[0] - sde.alpha(t) * data[i]) / sde.sigma(t)
            starts.setdefault(i, []).append(z)
    own = FreshNoise(9, (500,), torch.float64).prior(torch.arange(6))
    for i, seen in starts.items():
        for z in seen:  # its own noise, wherever it sits in the batch; roundings of the sum
            torch.testing.assert_close(z, own[i], rtol=1e-12, atol=1e-12)
    assert len(torch.unique(own[:, 0])) == 6


@each_sde
def test_a_short_edit_gives_the_data_back(sde):
    # At these levels the noise is far too small to reach another point, whose weight in the denoised sample is then
    # exp(-1000) or less.
    data = draw(5, 8, seed=3)
    times = sde.t_of_log_snr(-2 * vector(0.02, 0.016, 0.012).log())
    model = DatasetScore(sde, data)
    for solver in (AnnealedLangevin(n_sigma=2, eta=0.1), ConsistentAnnealed()):
        order = torch.tensor([3, 0, 4, 1])
        options = {"solver": solver, "controller": Grid(times), "index": order, "batch_size": 3}
        r = fastsde.sample(model, x_data=data[order], **options)
        torch.testing.assert_close(r.samples, data[order], rtol=1e-12, atol=1e-12)  # roundings
        raw = fastsde.sample(model, x_data=data[order], denoise=False, **options)
        spread = (raw.samples / sde.alpha(times[-1:]) - data[order]).abs().max() / 0.012
        assert 1 < float(spread) < 7  # 32 normals, of at most 1.3 times the last level


@both
@pytest.mark.parametrize("name", ["ALS", "CAS"])
def test_the_start_is_forgotten_geometrically(sde, name):
    # On a point, a difference of two starts shrinks by 1 - eta in each step, in y = x / alpha: closed form.
    eta, levels = 0.6, 8
    solver = {"ALS": AnnealedLangevin(levels, 2, eta), "CAS": ConsistentAnnealed(levels, 2, eta)}[name]
    steps = {"ALS": 2 * levels, "CAS": 2 * (levels - 1)}[name]
    starts = [torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    ends = [fastsde.sample(point_mass(sde), x_init=x, solver=solver, denoise=False, trajectory=True) for x in starts]
    for x, r in zip(starts, ends, strict=True):
        assert torch.equal(torch.stack([path.x[0] for path in r.trajectory]), x)
    alpha = sde.alpha(vector(sde.t_max, sde.t_min))
    shrunk = (1 - eta) ** steps * alpha[1] / alpha[0]
    difference = ends[1].samples - ends[0].samples
    # A difference of numbers near 0.3, each with a rounding of 1e-16.
    torch.testing.assert_close(difference, shrunk * (starts[1] - starts[0]), rtol=1e-9, atol=1e-14)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(solver, message, controller=None, sde=None):
    with pytest.raises(ValueError, match=message):
        fastsde.sample(never, sde or VESDE(), shape=(2, 3), solver=solver, controller=controller)


@each_sde
def test_eta_is_admissible_up_to_both_ends(sde):
    gamma = ratio_of_levels(sde, 6)
    message = r"\[1 - gamma, 1 \+ gamma\] = " + rf"\[{1 - gamma:.4g}, {1 + gamma:.4g}\]"
    for eta in (1 - 1.001 * gamma, 1 + 1.001 * gamma):
        refused(ConsistentAnnealed(levels=6, eta=eta), message, sde=sde)
    for eta in (1 - gamma, 1 + gamma):
        r = fastsde.sample(point_mass(sde), n=2, solver=ConsistentAnnealed(levels=6, eta=eta), dtype=torch.float64)
        assert r.success.all()
        assert torch.equal(r.samples, torch.full_like(r.samples, POINT))


def test_the_smallest_ratio_decides():
    sde = EDM(t_min=1.0, t_max=8.0)
    grid = Grid([8.0, 4.0, 1.0])  # ratios 1/2 and 1/4
    for eta in (0.74, 0.5, 1.26):
        refused(ConsistentAnnealed(eta=eta), r"\[0.75, 1.25\].*gamma = 0.25; got", grid, sde)
    for eta in (0.75, 1.25):
        r = fastsde.sample(point_mass(sde), n=2, solver=ConsistentAnnealed(eta=eta), controller=grid)
        assert r.success.all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AnnealedLangevin(levels=1), "levels must be an integer of at least 2; got 1"),
        (lambda: ConsistentAnnealed(levels=1), "levels must be an integer of at least 2; got 1"),
        (lambda: AnnealedLangevin(levels=5, n_sigma=0), "n_sigma must be .*at least 1; got 0"),
        (lambda: ConsistentAnnealed(levels=5, n_sigma=0), "n_sigma must be .*at least 1; got 0"),
        (lambda: AnnealedLangevin(levels=5, eta=0.0), r"eta .* must be in \(0, 1\); got 0.0"),
        (lambda: AnnealedLangevin(levels=5, eta=1.0), r"eta .* must be in \(0, 1\); got 1.0"),
        (lambda: AnnealedLangevin(levels=5, eta=math.nan), r"eta .* must be in \(0, 1\); got nan"),
        (lambda: ConsistentAnnealed(levels=5, eta=math.nan), r"eta .* must be in \(0, 2\); got nan"),
    ],
)
def test_refusals_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_refusals_before_the_first_call():
    grid = Grid.log_snr(VESDE(), 5)
    refused(AnnealedLangevin(), "needs levels=..., or eta=... where a controller gives the levels", grid)
    refused(AnnealedLangevin(levels=5, eta=0.1), "either controller= or solver.steps", grid)
    refused(ConsistentAnnealed(), "needs its number of steps")


def test_two_levels_far_apart_get_a_large_step():
    # No step size settles on so steep a ladder; the largest forgets the most.
    assert closest_step(1e-5, 1) > 0.99
