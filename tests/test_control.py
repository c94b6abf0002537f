"""The step size rule of Algorithm 6, its clamps and failures; and grids that are even in the clock they name."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import LINEAR_BETAS, SDES, vector

from fastsde import EDM, VPSDE, Adaptive, DiscreteVPSDE, Grid
from fastsde.control import Verdict
from fastsde.noise import RESOLUTION

T_END = 1e-3
UNIT = (1 - T_END) * RESOLUTION
"""The smallest step on [T_END, 1]."""
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


def assert_rounded(h, wanted, unit, *, down=False):
    """h is `wanted` to six significant bits of a whole number of units, at most the range of 2^16 units."""
    count, exact = h / unit, min(wanted / unit, 2.0**16)
    # The last of six bits is 1/32 of the number at most; below 64 units the last whole unit is more. 1e-9: roundings.
    last = max(exact / 32, 1)
    assert count - exact <= (1e-9 * exact if down else last / 2)
    assert exact - count <= (last if down else last / 2) + 1e-9 * exact
    assert abs(count - round(count)) < 1e-9 * max(count, 1)
    odd = round(count)
    while odd and odd % 2 == 0:
        odd //= 2
    assert odd < 64


def judge(control, error, scale, t=0.5, h=0.1):
    """The decision on a step of size h from t, for rows of errors and scales given as nested lists."""
    error, scale = torch.tensor(error, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    start = torch.full((len(error),), t, dtype=torch.float64)
    return control.update(start, start - h, T_END, error, scale, control.init(torch.ones_like(start), T_END))


@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 7),
    seed=st.integers(0, 1000),
    rtol=st.floats(1e-3, 1),
    atol=st.floats(1e-3, 1),
    r=st.floats(0.5, 1),
    safety=st.floats(0.1, 1),
    norm=st.sampled_from([2.0, math.inf]),
)
def test_error_acceptance_and_next_step(rows, size, seed, rtol, atol, r, safety, norm):
    error, scale = np.random.default_rng(seed).lognormal(-2, 2, size=(2, rows, size))
    decision = judge(Adaptive(rtol, atol, r, safety, norm=norm), error.tolist(), scale.tolist())
    for row in range(rows):
        ratio = error[row] / np.maximum(atol, rtol * scale[row])
        # ||.||_q / d^(1/q): the root mean square for q = 2, the largest element for q = infinity
        e = np.sqrt(np.sum(ratio**2) / size) if norm == 2 else ratio.max()
        assert (decision.verdict[row] == Verdict.ACCEPT) == (e <= 1)
        wanted = 0.1 * min(safety * e**-r, 10)
        assert_rounded(float(decision.carry["h"][row]), wanted, UNIT, down=e > 1)


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_acceptance_includes_an_error_of_exactly_one(norm):
    # Powers of two, so that the error is exactly 1, and the next larger number is not.
    control = Adaptive(0.25, 0.5, norm=norm)
    assert judge(control, [[0.5, -0.5]], [[1.0, 2.0]]).verdict.tolist() == [Verdict.ACCEPT]
    above = math.nextafter(0.5, 1)
    assert judge(control, [[above, -above]], [[1.0, 2.0]]).verdict.tolist() == [Verdict.REJECT]


def test_norms_divide_by_the_elements_of_one_row():
    control, error, scale = Adaptive(0.1, 0.01), [0.01, 0.03, 0.002], [1.0, 0.2, 0.001]
    alone = judge(control, [error], [scale]).carry["h"]
    # More elements of the same kind, or other rows, change nothing but the order of a mean (roundings).
    wide = judge(control, [error * 50], [scale * 50]).carry["h"]
    beside = judge(control, [[9.0] * 3, error], [[1.0] * 3, scale]).carry["h"][1:]
    torch.testing.assert_close(wide, alone, rtol=1e-13, atol=0)
    assert torch.equal(beside, alone)
    images = judge(control, [[[[e, e], [e, e]] for e in error]], [[[[s, s], [s, s]] for s in scale]]).carry["h"]
    torch.testing.assert_close(images, alone, rtol=1e-13, atol=0)


@given(
    t=st.floats(2 * T_END, 1),
    h=st.floats(1e-6, 10),
)
def test_targets_lie_below_now_and_meet_the_end_exactly(t, h):
    control = Adaptive(0.1, 0.01)
    h_min = control.init(vector(1.0), T_END)["h_min"]
    s = float(control.target(vector(t), T_END, {"h": vector(h), "h_min": h_min}))
    remainder = t - h - T_END
    # Either the full step, leaving at least h_min, or all that is left.
    assert s == (T_END if remainder < float(h_min) else t - h)
    assert T_END <= s < t


def test_remainder_below_the_smallest_step_is_taken_along():
    carry = {"h": vector(0.01, 0.01, math.inf), "h_min": vector(1e-3, 1e-3, 1e-3)}
    # What would be left after the step: 0.9e-3, 1.1e-3; an infinite step.
    t = vector(T_END + 0.0109, T_END + 0.0111, 0.7)
    s = Adaptive(0.1, 0.01).target(t, T_END, carry)
    assert s.tolist() == [T_END, float(t[1]) - 0.01, T_END]


@pytest.mark.parametrize("h_init", [1e-12, 1e-4, 0.01, 0.3, 5.0])
def test_first_step(h_init):
    control = Adaptive(0.1, 0.01, h_init=h_init)
    carry = control.init(vector(1.0), T_END)
    assert carry["h_min"].tolist() == [UNIT]
    # Not below the resolution, where a step would be 0, and not beyond the range.
    assert_rounded(float(carry["h"]), max(h_init, UNIT), UNIT)
    s = float(control.target(vector(1.0), T_END, carry))
    assert T_END <= s < 1
    if h_init > 1:
        assert s == T_END


def test_failures_are_told_per_row():
    # Accepted; rejected; asks for 0.9 * 0.1 * 1e5^-0.9 = 3e-6, a fifth of a unit; NaN; infinite. The tolerance is 0.1.
    decision = judge(Adaptive(0.1, 0.01), [[0.05], [0.2], [1e4], [math.nan], [math.inf]], [[1.0]] * 5)
    # The smallest step is tried before a row gives up.
    expected = [Verdict.ACCEPT, Verdict.REJECT, Verdict.REJECT, Verdict.NOT_FINITE, Verdict.NOT_FINITE]
    assert decision.verdict.tolist() == expected
    assert float(decision.carry["h"][2]) == UNIT


def test_error_zero_takes_the_whole_range_and_nan_scale_fails():
    free = judge(Adaptive(0.1, 0.01), [[0.0]], [[1.0]])
    assert free.verdict.tolist() == [Verdict.ACCEPT]
    assert float(free.carry["h"]) == pytest.approx(1 - T_END, rel=1e-15)
    decision = judge(Adaptive(0.1, 0.01), [[0.1]], [[math.nan]])
    assert decision.verdict.tolist() == [Verdict.NOT_FINITE]


@pytest.mark.parametrize("units", [1.0, 1.3, 1.9])
def test_a_row_gives_up_when_the_next_try_would_be_the_same(units):
    # Below two units from the end no shorter step can be tried: a remainder below one unit is taken along.
    control, h = Adaptive(0.1, 0.01), units * UNIT
    assert judge(control, [[0.2]], [[1.0]], t=T_END + h, h=h).verdict.tolist() == [Verdict.TOO_SHORT]
    # The same step, accepted, is no failure, whatever it would have next; nor is one that can be halved.
    assert judge(control, [[0.1]], [[1.0]], t=0.5, h=UNIT).verdict.tolist() == [Verdict.ACCEPT]
    assert judge(control, [[0.2]], [[1.0]], t=T_END + 2 * UNIT, h=2 * UNIT).verdict.tolist() == [Verdict.REJECT]


def test_a_limit_above_one_rejects_only_what_is_above_it():
    # E = 1, 3, 30 and 31; the next step follows from E as ever.
    decision = judge(Adaptive(0.1, 0.01, limit=30.0), [[0.1], [0.3], [2.9999], [3.1]], [[1.0]] * 4)
    assert decision.verdict.tolist() == [Verdict.ACCEPT, Verdict.ACCEPT, Verdict.ACCEPT, Verdict.REJECT]
    for h, e in zip(decision.carry["h"].tolist(), (1, 3, 29.999, 31), strict=True):
        assert_rounded(h, 0.09 * e**-0.9, UNIT, down=e > 30)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Adaptive(0.0, 0.1), "rtol must be a positive, finite number; got 0.0"),
        (lambda: Adaptive(math.nan, 0.1), "rtol must be a positive, finite number.*got nan"),
        (lambda: Adaptive(0.1, 0.0), "atol must be a positive, finite number; got 0.0"),
        (lambda: Adaptive(0.1, 0.1, r=0.0), "r must be a positive, finite number; got 0.0"),
        (lambda: Adaptive(0.1, 0.1, r=2.5), "r must be positive and at most 2; got 2.5"),
        (lambda: Adaptive(0.1, 0.1, safety=1.1), "safety must be positive and at most 1; got 1.1"),
        (lambda: Adaptive(0.1, 0.1, h_init=-1.0), "h_init must be a positive, finite number.*got -1.0"),
        (lambda: Adaptive(0.1, 0.1, limit=0.5), r"limit must be in \[1, inf\]; got 0.5"),
        (lambda: Adaptive(0.1, 0.1, norm=1.0), "norm must be 2 or math.inf; got 1.0"),
        (lambda: Adaptive(0.1, 0.1).update(vector(1.0), vector(0.9), 0.1, None, None, {}), "no error estimate"),
        (lambda: Grid([1.0]), r"at least 2 numbers; got shape \(1,\)"),
        (lambda: Grid([1.0, 1.0]), "strictly decreasing"),
        (lambda: Grid([1.0, math.nan]), "finite"),
        (lambda: Grid.uniform(VPSDE(), 0), "steps must be an integer of at least 1; got 0"),
        (lambda: Grid([1.0, 0.05]).span(0.1, 1.0), "within t_min=0.1 .. t_max=1.0; it goes from 1.0 to 0.05"),
    ],
)
def test_refusals_name_what_came_and_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Each grid is even in this function of time.
CLOCKS = {
    "uniform": lambda sde, t: t,
    "geometric": lambda sde, t: t.log(),
    "log_snr": lambda sde, t: sde.log_snr(t),
    "karras": lambda sde, t: (sde.sigma(t) / sde.alpha(t)) ** (1 / 7),
}


@each_sde
@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_grids_are_even_in_their_clock_and_end_exactly(sde, name, steps):
    grid = getattr(Grid, name)(sde, steps)
    assert grid.span(sde.t_min, sde.t_max) == (sde.t_max, sde.t_min)
    assert (float(grid.times[0]), float(grid.times[-1]), grid.steps) == (sde.t_max, sde.t_min, steps)
    clock = CLOCKS[name](sde, grid.times)
    # t_of_log_snr gives times to ten digits (test_sde.py), and the clocks span at most 20.
    even = torch.linspace(float(clock[0]), float(clock[-1]), steps + 1, dtype=torch.float64)
    torch.testing.assert_close(clock, even, rtol=1e-9, atol=1e-9)


def test_karras_grid_is_that_of_the_paper():
    i, rho = torch.arange(19, dtype=torch.float64), 7
    # Karras et al. 2022, eq. 5, with 18 steps from 80 to 0.002
    paper = (80 ** (1 / rho) + i / 18 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    # A seventh power of float64 roundings, magnified where the two terms cancel (0.002 is 3 % of its parts).
    torch.testing.assert_close(Grid.karras(EDM(), 18).times, paper, rtol=1e-11, atol=0)


def test_rows_of_a_grid_walk_it_each_at_its_own_place():
    grid = Grid([1.0, 0.7, 0.4, 0.1])
    # The first row is at its warm-up turn, the last one has ended.
    t = vector(1.0, 1.0, 0.4, 0.1)
    carry = {"position": torch.tensor([0, 1, 3, 4])}
    s = grid.target(t, 0.1, carry)
    assert s.tolist() == [1.0, 0.7, 0.1, 0.1]
    decision = grid.update(t, s, 0.1, None, None, carry)
    assert not decision.verdict.any()  # every row takes it and goes on
    assert decision.carry == grid.init(t, 0.1) == {}  # the engine knows where a row is


def test_a_step_of_few_units_shrinks_when_asked_to():
    # Rounded to the nearest, 0.9 of 4 units would be 4 units again, and a rejected step on a kept path would repeat
    # for ever.
    controller = Adaptive(rtol=0.1, atol=1.0)
    span = 1.0
    unit = span * 2.0**-16
    t = torch.full((6,), span, dtype=torch.float64)
    carry = controller.init(t, 0.0)
    h = torch.tensor([2, 3, 4, 5, 31, 33], dtype=torch.float64) * unit
    error = torch.full((6, 1), 1.001, dtype=torch.float64)  # just rejected
    decision = controller.update(t, t - h, 0.0, error, torch.ones(6, 1, dtype=torch.float64), carry)
    assert decision.verdict.tolist() == [Verdict.REJECT] * len(decision.verdict)
    assert (decision.carry["h"] < h).all()


def test_growth_is_capped():
    controller = Adaptive(rtol=0.1, atol=1.0, growth=5.0)
    t = torch.ones(1, dtype=torch.float64)
    carry = controller.init(t, 0.0)
    decision = controller.update(t, t - 2.0**-10, 0.0, torch.full((1, 1), 1e-9), torch.ones(1, 1), carry)
    assert decision.carry["h"].item() == 5 * 2.0**-10
    with pytest.raises(ValueError, match="growth"):
        Adaptive(rtol=0.1, atol=1.0, growth=1.0)


# ---- timesteps of a table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [7, 10, 50, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(spacing, steps):
    schedulers = pytest.importorskip("diffusers")
    table = DiscreteVPSDE(LINEAR_BETAS)
    theirs = schedulers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    levels = Grid.timesteps(table, steps, spacing).times * 1000 - 1
    # 1000 t - 1 gives a level back up to a rounding of t.
    torch.testing.assert_close(levels, theirs.timesteps.double(), rtol=0, atol=1e-9)


def test_timesteps_with_an_offset_and_their_refusals():
    table = DiscreteVPSDE(LINEAR_BETAS)
    offset = Grid.timesteps(table, 50, "leading", offset=1)
    torch.testing.assert_close(offset.times[-1:] * 1000 - 1, vector(1.0), rtol=0, atol=1e-9)
    for arguments, message in [((1,), "from 2 to the table's 1000 levels; got 1"), ((50, "late"), "one of leading")]:
        with pytest.raises(ValueError, match=message):
            Grid.timesteps(table, *arguments)


# ---- stops -----------------------------------------------------------------------------------------------------------


def test_steps_meet_their_stops_and_go_on_as_before():
    control = Adaptive(0.1, 0.01, stops=(0.5, 0.8))
    carry = {"h": vector(0.3, 0.3, 0.3, 0.1), "h_min": vector(*[1e-5] * 4)}
    t = vector(0.9, 0.8, 0.4, 0.95)
    # Cut at 0.8; at 0.5, not at 0.8 again; at the end; not cut.
    assert control.target(t, T_END, carry).tolist() == [0.8, 0.5, 0.4 - 0.3, 0.95 - 0.1]
    cut, error = vector(0.8), torch.full((1, 2), 1e-9)
    decision = control.update(
        vector(0.9), cut, T_END, error, torch.ones(1, 2), {"h": vector(0.3), "h_min": vector(UNIT)}
    )
    # An accepted step that was cut short keeps the length it was meant to have, at least.
    assert float(decision.carry["h"]) >= 0.3


# ---- steps planned in the log-SNR ------------------------------------------------------------------------------------


@each_sde
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_clock_makes_steps_differences_of_log_snr(sde, mirrored):
    control = Adaptive(0.1, 0.01, clock=sde, h_init=0.5, resolution=2.0**-30, mirrored=mirrored)
    t, end = (-sde.t_min, -sde.t_max) if mirrored else (sde.t_max, sde.t_min)
    sign = -1 if mirrored else 1
    carry = control.init(vector(t), end)
    s = control.target(vector(t), end, carry)
    assert end < float(s) < t
    # t_of_log_snr gives times to ten digits, and h has six bits.
    moved = (sde.log_snr(sign * s) - sde.log_snr(sign * vector(t))).abs()
    torch.testing.assert_close(moved, vector(0.5), rtol=1 / 64, atol=1e-6)
    error = torch.full((1, 2), 0.05)
    h = control.update(vector(t), s, end, error, torch.ones(1, 2), carry).carry["h"]
    torch.testing.assert_close(h, moved * 0.9 * 0.5**-0.9, rtol=1 / 32, atol=0)
    # A step beyond the end ends there, exactly.
    assert float(control.target(vector(t), end, {"h": vector(1e3), "h_min": carry["h_min"]})) == end
