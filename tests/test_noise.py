"""The generator against its published vectors, and the laws of the noise: normal, independent, Brownian."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import SDES, vector
from scipy import stats

from fastsde import ExponentialPC
from fastsde.noise import RESOLUTION, BrownianPath, FreshNoise, StepNoise, philox4x32
from fastsde.steps import own_grid

T_MIN, T_MAX = 1e-3, 2.0
SPAN = T_MAX - T_MIN
EVENT = (8,)


def path(seed=0, event_shape=EVENT, dtype=torch.float64):
    return BrownianPath(seed, event_shape, dtype, t_min=T_MIN, t_max=T_MAX)


def fresh(seed=0, event_shape=EVENT, dtype=torch.float64):
    return FreshNoise(seed, event_shape, dtype)


def rows(n):
    return torch.arange(n)


def at(u, n=1):
    """The time at share u of the range, for n rows."""
    return torch.full((n,), T_MIN + SPAN * u, dtype=torch.float64)


def assert_white(z):
    """z with shape (n, k): n draws that should be k independent standard normals; 5 standard errors for each moment."""
    n, k = z.shape
    deviation = z.mT @ z / n - torch.eye(k, dtype=z.dtype)
    # The variance of z_i z_j is 1, of z_i^2 it is 2; 5 standard errors: a false alarm once in 1.7 million moments.
    assert (deviation.abs() < 5 * torch.sqrt((1 + torch.eye(k, dtype=z.dtype)) / n)).all()
    assert (z.mean(0).abs() < 5 / math.sqrt(n)).all()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    """kat_vectors of Random123, philox 4x32, 10 rounds."""
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    out = philox4x32(tuple(words), tuple(int(word, 16) for word in key.split()))
    assert " ".join(f"{int(word):08x}" for word in out) == expected


def test_seed_is_the_64_bit_key():
    # Both halves of the key change the numbers.
    seeds = (0, 1, 1 << 32, (1 << 64) - 1)
    draws = [fresh(seed).prior(rows(1)) for seed in seeds]
    assert len({tuple(z.flatten().tolist()) for z in draws}) == len(seeds)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
@pytest.mark.parametrize("make", [path, fresh])
def test_seed_outside_64_bits_is_refused(make, seed):
    with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\^64\); got {seed}"):
        make(seed)


# A Brownian path is made of normals; dividing its value at the end by its deviation gives the root normal.
SOURCES = {
    "prior": lambda n, event: fresh(event_shape=event).prior(rows(n)),
    "fresh": lambda n, event: (
        fresh(event_shape=event).increment(rows(n), rows(n), at(1.0, n), at(0.5, n), {})[0] / math.sqrt(SPAN / 2)
    ),
    "path": lambda n, event: path(event_shape=event)(rows(n), at(1.0, n)) / math.sqrt(SPAN),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_normals_are_normal(source):
    z = source(1000, (100,)).flatten().numpy()
    # The p-value of a right generator is uniform; the seed is fixed, and 1e-4 would be a rare accident. With 1e5
    # numbers the test sees deviations of the distribution function of 0.7 %.
    assert stats.kstest(z, "norm").pvalue > 1e-4
    # The tails, which Kolmogorov and Smirnov do not weigh: 5 standard errors of the count beyond 3.
    expected = len(z) * 2 * stats.norm.sf(3)
    assert abs((np.abs(z) > 3).sum() - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (5,), (2, 3, 7)])
def test_elements_of_an_event_are_independent(shape):
    # Blocks of four normals share a Philox call; 1, 3 and 5 leave a part of a block unused.
    z = path(event_shape=shape).prior(rows(20_000))
    assert z.shape == (20_000, *shape)
    assert_white(z.flatten(1))


def test_samples_and_attempts_are_independent():
    n, k = 2000, 6
    draw = fresh(event_shape=(16,))
    # Sample numbers as variables, and attempts as draws; then the other way round.
    t, s = at(1.0, n), at(0.5, n)
    scale = math.sqrt(SPAN / 2)
    by_sample = [draw.increment(torch.full((n,), i), rows(n), t, s, {})[0].flatten() / scale for i in range(k)]
    by_attempt = [draw.increment(rows(n), torch.full((n,), i), t, s, {})[0].flatten() / scale for i in range(k)]
    assert_white(torch.stack(by_sample, 1))
    assert_white(torch.stack(by_attempt, 1))


def test_start_state_is_independent_of_the_path_and_of_fresh_steps():
    n = 20_000
    index, zero = rows(n), torch.zeros(n, dtype=torch.int64)
    step = fresh().increment(index, zero, at(1.0, n), at(0.0, n), {})[0]
    w = path()(index, at(1.0, n))
    assert_white(torch.stack([fresh().prior(index)[:, 0], step[:, 0] / math.sqrt(SPAN), w[:, 0] / math.sqrt(SPAN)], 1))
    assert torch.equal(path().prior(index[:9]), fresh().prior(index[:9]))


@given(st.permutations([0, 1, 5, 77, 1 << 20, (1 << 32) - 1]), st.integers(1, 6), st.floats(0, 1))
def test_a_row_depends_on_its_sample_number_alone(order, n, u):
    index = torch.tensor(order[:n])
    attempts = 3 * index % 11
    for draw in (path(7), fresh(7)):
        start = draw.start(index, at(1.0, n))
        together = [draw.prior(index), draw.increment(index, attempts, at(1.0, n), at(u, n), start)[0]]
        for row in range(n):
            one = index[row : row + 1]
            start = draw.start(one, at(1.0))
            alone = [draw.prior(one), draw.increment(one, attempts[row : row + 1], at(1.0), at(u), start)[0]]
            # The same numbers, not close ones: bitwise, in any batch and any order.
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
def test_precision_does_not_change_the_noise(u):
    single, double = path(dtype=torch.float32), path(dtype=torch.float64)
    index = rows(50)
    assert torch.equal(single.prior(index).double(), double.prior(index))
    # The sum of 18 terms of the path rounds in its own precision: 18 roundings of 6e-8 of terms up to 4 * sqrt(2).
    torch.testing.assert_close(single(index, at(u, 50)).double(), double(index, at(u, 50)), rtol=0, atol=1e-5)


def test_devices_give_the_same_noise(device):
    if device.type == "cpu":
        pytest.skip("needs another device than the CPU: pytest --device")
    index, t = rows(100), T_MIN + SPAN * torch.linspace(0, 1, 100, dtype=torch.float64)
    words = torch.arange(1000) * 4294967
    there = philox4x32((words.to(device),) * 4, (3, 4))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, philox4x32((words,) * 4, (3, 4)), strict=True))
    # Logarithm, cosine and sine differ between devices by a few roundings of 6e-8, on values up to 6.
    kwargs = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(path().prior(index.to(device)).cpu(), path().prior(index), **kwargs)
    torch.testing.assert_close(path()(index.to(device), t.to(device)).cpu(), path()(index, t), **kwargs)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_path_is_a_function_of_time_in_whatever_order(shares, random):
    shuffled = random.sample(shares, len(shares))
    n = len(shares)
    w = path(3)
    # One sample asked for all its times at once, in another order, and one after another.
    batch = w(torch.full((n,), 9), torch.cat([at(u) for u in shuffled]))
    alone = {u: w(torch.tensor([9]), at(u)) for u in shares}
    for row, u in zip(batch, shuffled, strict=True):
        assert torch.equal(row[None], alone[u])


def test_path_starts_at_zero_exactly():
    assert torch.equal(path()(rows(20), at(0.0, 20)), torch.zeros(20, *EVENT, dtype=torch.float64))


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_increments_add_up_and_a_rejected_step_sees_the_path_again(index, a, b, c):
    s_far, s_mid, t = (T_MIN + SPAN * u for u in sorted((a, b, c)))
    # Beside another sample, which goes the other way at the same time.
    w, i, attempt = path(5), torch.tensor([index, 3]), torch.zeros(2, dtype=torch.int64)
    end, t, s_mid, s_far = vector(T_MAX, T_MIN), vector(t, s_far), vector(s_mid, s_mid), vector(s_far, t)
    top, _, carry = w.increment(i, attempt, end, t, w.start(i, end))
    # A step to s_far is rejected: its carry is dropped. Two smaller steps over the same time see the same increment,
    # whatever the number of attempts.
    before = {key: value.clone() for key, value in carry.items()}
    rejected, *_ = w.increment(i, attempt, t, s_far, carry)
    assert all(torch.equal(carry[key], before[key]) for key in before)
    first, _, middle = w.increment(i, attempt + 1, t, s_mid, carry)
    assert torch.equal(middle["w"], w(i, s_mid))
    second, _, last = w.increment(i, attempt + 2, s_mid, s_far, middle)
    # Sums of values up to 10, rounded a few times.
    torch.testing.assert_close(first + second, rejected, rtol=0, atol=1e-14)
    torch.testing.assert_close(top + rejected + last["w"], w.start(i, end)["w"], rtol=0, atol=1e-14)


def test_fresh_noise_differs_between_attempts_and_repeats_for_the_same():
    draw, zero = fresh(), torch.zeros(4, dtype=torch.int64)
    first = draw.increment(rows(4), zero, at(1.0, 4), at(0.5, 4), {})[0]
    again = draw.increment(rows(4), zero, at(1.0, 4), at(0.5, 4), {})[0]
    other = draw.increment(rows(4), zero + 1, at(1.0, 4), at(0.5, 4), {})[0]
    assert torch.equal(first, again)
    assert not (first == other).any()


def separated_times(generator):
    """Shares of the range at which paths are Brownian: far apart, and pairs no closer than the resolution."""
    base = torch.rand(6, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    near = base[:3] + RESOLUTION * (1 + 2 * torch.rand(3, generator=generator, dtype=torch.float64))
    return torch.cat([base, near, near[:1] + RESOLUTION, vector(1.0)]).sort().values


@pytest.mark.parametrize("seed", range(4))
def test_path_has_the_covariance_of_brownian_motion(seed):
    u = separated_times(torch.Generator().manual_seed(seed))
    assert u.diff().min() >= RESOLUTION * 0.999
    n, w = 2500, path(seed)
    values = torch.stack([w(rows(n), at(float(share), n)).flatten() for share in u], 1)
    # Whitened by the Cholesky factor of min(s, t), whose smallest pivots are the smallest gaps, so the closest pairs
    # weigh as much as the rest.
    factor = torch.linalg.cholesky(SPAN * torch.minimum(u[:, None], u[None]))
    z = torch.linalg.solve_triangular(factor, values.mT, upper=False).mT
    assert_white(z)
    # All 220 000 squares together: a chi-square within 5 of its standard deviations.
    assert abs(float(z.square().sum()) - z.numel()) < 5 * math.sqrt(2 * z.numel())


@pytest.mark.parametrize("power", range(17))
def test_steps_of_every_size_have_their_variance(power):
    h, n = 2.0**-power, 2500
    w, index = path(11), rows(n)
    # Steps at random places of the range, unaligned with the cells of the construction, down to its resolution.
    u = h + (1 - h) * torch.rand(n, generator=torch.Generator().manual_seed(power), dtype=torch.float64)
    t, s = T_MIN + SPAN * u, T_MIN + SPAN * (u - h)
    dw = w.increment(index, torch.zeros_like(index), t, s, w.start(index, t))[0].flatten() / math.sqrt(h * SPAN)
    # 5 standard errors of the variance (sqrt 2 / n) and of the mean of 20 000 normals.
    assert abs(float(dw.square().mean()) - 1) < 5 * math.sqrt(2 / len(dw))
    assert abs(float(dw.mean())) < 5 / math.sqrt(len(dw))


# ---- the clock of the log-SNR ---------------------------------------------------------------------------------------

LENGTH = math.log(T_MAX / T_MIN) * 2


def exponential_path(power, seed=0, event_shape=EVENT):
    """A path in the clock rho^-power of the process with rho = t, whose log-SNR is -2 log t."""
    clock = {"log_snr": lambda t: -2 * t.log(), "power": power}
    return BrownianPath(seed, event_shape, torch.float64, t_min=T_MIN, t_max=T_MAX, **clock)


@pytest.mark.parametrize("power", [0.02, 0.5, 2.0, 8.0])
def test_path_in_the_clock_of_the_log_snr_has_its_covariance(power):
    u = separated_times(torch.Generator().manual_seed(1))
    times = T_MAX * torch.exp(-u * LENGTH / 2)
    n, w = 2500, exponential_path(power, seed=5)
    # tau = t^-power, less its start, as a share of its end.
    tau = (times**-power - T_MAX**-power) / (T_MIN**-power - T_MAX**-power)
    start = torch.full((1,), T_MAX, dtype=torch.float64)
    for time, variance in zip(times, tau, strict=True):
        said = w.increment(rows(1), rows(1), start, time[None], w.start(rows(1), start))[1]
        torch.testing.assert_close(said, variance[None], rtol=1e-9, atol=0)
    values = torch.stack([w(rows(n), time.expand(n)).flatten() for time in times], 1)
    # Independent increments, each scaled by its own deviation: they span eleven orders of magnitude for power 8.
    steps = torch.diff(values, dim=1, prepend=torch.zeros(len(values), 1, dtype=torch.float64))
    assert_white(steps / torch.diff(tau, prepend=torch.zeros(1, dtype=torch.float64)).sqrt())


def test_start_of_the_second_clock_is_zero_and_its_increments_have_unit_normals():
    w, index = exponential_path(2.0), rows(3)
    top, low = torch.full((3,), T_MAX, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)
    carry = w.start(index, top)
    assert torch.equal(carry["w"], torch.zeros(3, *EVENT, dtype=torch.float64))
    noise = StepNoise(w, index, index, index, top, low, carry)
    # In that clock the range has variance 1, as a share of which the log-SNR tells the rest.
    variance = (low**-2 - T_MAX**-2) / (T_MIN**-2 - T_MAX**-2)
    torch.testing.assert_close(noise.z, (0 - w(index, low)) / variance.sqrt()[:, None], rtol=1e-9, atol=0)
    assert torch.equal(
        StepNoise(w, index, index, index, top, top, carry).z, torch.zeros(3, *EVENT, dtype=torch.float64)
    )


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
@pytest.mark.parametrize("steps", [1, 7, 24])
def test_our_own_grids_with_noise_end_on_borders_of_cells_near_by(sde, steps):
    base, grid = (own_grid(sde, ExponentialPC(eta=eta), steps) for eta in (0.0, 1.0))
    moved = sde.log_snr(grid.times) - sde.log_snr(base.times)
    assert grid.times[0] == base.times[0]
    whole = base.times[-1] == sde.t_min  # that of a flow ends where it has cells too
    assert grid.times[-1] == base.times[-1] or not whole
    span = sde.log_snr(vector(sde.t_min)) - sde.log_snr(vector(sde.t_max))
    # Up to a rounding of times, which the log-SNR near the ends of some processes magnifies.
    assert (moved.abs() <= span / steps / 32 * (1 + 1e-6)).all()


def test_noise_is_drawn_only_when_asked_for():
    class Refusing(FreshNoise):
        def increment(self, index, attempt, t, s, carry):
            raise AssertionError("drawn")

    index, t = rows(2), torch.ones(2, dtype=torch.float64)
    noise = StepNoise(Refusing(0, EVENT, torch.float64), index, index, index, t, 0.5 * t, {})
    assert noise.carry == {}
    # Other numbers, other steps and the steps' own increments: independent; the same again after a rejection.
    later = StepNoise(Refusing(0, EVENT, torch.float64), index, index + 7, index, t, 0.1 * t, {})
    assert torch.equal(noise.normal(3), later.normal(3))
    draws = [noise.normal(0), noise.normal(1), StepNoise(fresh(), index, index, index + 1, t, t, {}).normal(0)]
    assert not any(torch.equal(a, b) for a, b in zip(draws, draws[1:] + draws[:1], strict=True))
