"""The engine, driven by stubs: no numerics, so every number here is exact or a sum of a few float64 increments."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import CLOCK, SEED, Recorder, StubController, StubSolver, path, raises_at, run, same

import fastsde
from fastsde import EulerMaruyama, ExtrapolatedEM, SamplingError, ScoreModel, Status
from fastsde.control import Verdict
from fastsde.engine import Engine
from fastsde.job import Options, Samples, make_job
from fastsde.noise import FreshNoise

ROUNDING = {"rtol": 0, "atol": 1e-12}
"""A state is a sum of at most ten float64 increments of size 3, each with a relative rounding of 1e-16."""
UNEVEN = [[8.0], [2.0], [1.0], [3.0], [4.0], [1.5], [2.5]]
"""Samples that take 1, 4, 8, 3, 2, 6 and 4 steps."""


def walked(place, index, t):
    """State of the stub rows at time t: (place, 0) plus the Brownian increment since the start."""
    start = torch.stack([place.double(), torch.zeros(len(place), dtype=torch.float64)], 1)
    return start + path()(index, torch.full_like(t, CLOCK.t_max)) - path()(index, t)


def ended(n, t=CLOCK.t_min):
    rows = torch.arange(n)
    return walked(rows, rows, torch.full((n,), t, dtype=torch.float64))


# Stepping -----------------------------------------------------------------------------------------------------------


def test_rows_step_independently_and_meet_t_min_exactly():
    solver = StubSolver()
    result = run(3, StubController([[3.0], [0.7], [1.0, 6.9, 0.3]]), solver=solver)
    times = {i: [a.t for a in log] + [log[-1].s] for i, log in solver.log.items()}
    assert times[0] == [9, 6, 3, 1]
    assert times[2] == [9, 8, 8 - 6.9, 1]
    assert len(times[1]) == 13  # 11 steps of 0.7 and one of 0.3
    assert all(t[-1] == CLOCK.t_min for t in times.values())
    assert result.accepted.tolist() == [3, 12, 3]
    assert result.nfe.tolist() == [4, 13, 4]  # one call a step and one to denoise
    torch.testing.assert_close(result.samples, ended(3), **ROUNDING)


def test_a_rejection_retries_in_place():
    solver = StubSolver()
    result = run(2, StubController([[2.0], [2.0, 3.0, 1.0, 2.0]], reject={(1, 1), (1, 3)}), solver=solver)
    log = solver.log[1]
    assert [(a.t, a.s) for a in log] == [(9, 7), (7, 4), (7, 6), (6, 4), (6, 4), (4, 2), (2, 1)]
    assert [a.accepted for a in log] == [0, 1, 1, 2, 2, 3, 4]  # the solver's carry moves with acceptance alone
    assert torch.equal(log[1].x, log[2].x)
    assert torch.equal(log[3].x, log[4].x)
    for a in log:  # the noise's carry is W at the time of the state, else a retry would not see the path again
        t, s = (torch.tensor([u], dtype=torch.float64) for u in (a.t, a.s))
        torch.testing.assert_close(a.dw, (path()(torch.tensor([1]), t) - path()(torch.tensor([1]), s))[0], **ROUNDING)
    assert (result.accepted.tolist(), result.rejected.tolist()) == ([4, 5], [0, 2])
    torch.testing.assert_close(result.samples, ended(2), **ROUNDING)  # rejection leaves no trace in the state


@pytest.mark.parametrize("warm_up", [False, True])
def test_a_walk_that_starts_below_t_max_sees_the_path_from_there(warm_up):
    solver = StubSolver()
    solver.warm_up = warm_up
    run(1, StubController([[2.0]]), solver=solver, t_start=5.0)
    assert len(solver.log[0]) == 2 + warm_up
    for a in solver.log[0]:
        t, s = (torch.tensor([u], dtype=torch.float64) for u in (a.t, a.s))
        torch.testing.assert_close(a.dw, (path()(torch.tensor([0]), t) - path()(torch.tensor([0]), s))[0], **ROUNDING)


def test_fresh_noise_is_drawn_anew_after_a_rejection():
    solver = StubSolver()
    noise = FreshNoise(7, (2,), torch.float64)
    run(1, StubController([[8.0]], reject={(0, 0)}), solver=solver, noise=noise)
    first, second = solver.log[0]
    assert not torch.equal(first.dw, second.dw)


class Twin(StubSolver):
    """Its memory is the very tensor that it returns as the state."""

    def init(self, x_t):
        return super().init(x_t) | {"twin": torch.full_like(x_t, torch.nan)}

    def step(self, model, sde, x_t, t, s, noise, carry):
        step = super().step(model, sde, x_t, t, s, noise, carry)
        return dataclasses.replace(step, carry=step.carry | {"twin": step.x})


def test_a_refill_writes_to_no_tensor_that_a_solver_returned():
    # Both slots are refilled in one turn: written in place, the state would be the solver's fresh memory.
    result = run(4, StubController([[4.0]] * 4), solver=Twin(), batch_size=2)
    assert (result.status == Status.SUCCESS).all()
    torch.testing.assert_close(result.samples, ended(4), **ROUNDING)


# Slots and queue ----------------------------------------------------------------------------------------------------


def test_a_slot_is_refilled_in_the_same_turn():
    network, turns = Recorder(), []
    run(4, StubController([[8.0], [3.0], [4.0], [8.0]]), network=network, batch_size=2, callback=turns.append)
    # Sample 0 takes 1 step, 1 takes 3, 2 takes 2 and 3 takes 1: two full slots for three turns, then one.
    steps = [t.tolist() for _, t, _ in network.calls if t.max() > CLOCK.t_min]
    assert steps == [[9, 9], [9, 6], [5, 3], [9]]
    assert [state.index.tolist() for state in turns[:3]] == [[2, 1], [2, 1], [3]]


@st.composite
def scripts(draw):
    n = draw(st.integers(1, 14))
    sizes = [draw(st.lists(st.sampled_from([1.0, 2.5, 4.0, 8.0]), min_size=1, max_size=4)) for _ in range(n)]
    attempts = st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, 3)), max_size=8)
    return (
        draw(st.integers(0, 2)),
        sizes,
        draw(attempts),
        draw(attempts),
        draw(st.integers(1, n)),
        draw(st.permutations(range(n))),
    )


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(scripts())
def test_every_sample_is_drawn_once_and_lands_in_its_place(script):
    lag, sizes, reject, restart, batch, order = script
    solver, controller, n = StubSolver(), StubController(sizes, reject, restart=restart), len(sizes)
    index = torch.tensor(order)
    result = run(n, controller, solver=solver, batch_size=batch, index=index, lag=lag)
    counts = torch.tensor([controller.counts(i) for i in range(n)])
    assert torch.equal(result.accepted, counts[:, 0])
    assert torch.equal(result.rejected, counts[:, 1])
    assert torch.equal(result.nfe, counts.sum(1) + 1)
    assert result.counts() == {"SUCCESS": n}
    assert torch.equal(result.index, index)
    t = torch.full((n,), CLOCK.t_min, dtype=torch.float64)
    torch.testing.assert_close(result.samples, walked(torch.arange(n), index, t), **ROUNDING)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize(("batch", "last"), [(1, [1]), (8, [1]), (15, [2, 1]), (24, [3, 2, 1]), (56, [7, 4, 2, 1])])
def test_the_batch_shrinks_through_eighths_then_halves_and_padding_costs_no_sample(batch, last, together):
    network = Recorder()
    steps = [i // together + 1 for i in range(batch)]  # steps of 1/8 and then one to the end; so many end in each turn
    result = run(batch, StubController([[0.125] * (k - 1) + [8.0] for k in steps]), network=network)
    unit = -(-batch // 8)
    live = [sum(k > turn for k in steps) for turn in range(steps[-1])]
    widths = [len(t) for _, t, _ in network.calls if t.max() > CLOCK.t_min]
    sizes = sorted({*last, *(min(batch, k * unit) for k in range(1, 9))})
    assert widths == [next(size for size in sizes if size >= count) for count in live]
    assert result.nfe.tolist() == [k + 1 for k in steps]  # and one call to denoise


def test_start_states_come_from_the_prior_of_each_index():
    network, index = Recorder(), torch.tensor([5, 0, 2, 11, 5])
    cond = {"number": index}
    start = lambda slots: CLOCK.prior(path().prior(index[slots]), CLOCK.t_max)  # noqa: E731
    result = run(5, StubController(UNEVEN), network=network, index=index, start=start, cond=cond, batch_size=2)
    seen = {}
    for x, t, given_cond in network.calls:
        first = t == CLOCK.t_max
        seen |= dict(zip(given_cond["number"][first].tolist(), x[first], strict=True))
    for number, x in seen.items():
        torch.testing.assert_close(x, 9 * path().prior(torch.tensor([number]))[0], rtol=0, atol=0)
    assert sorted(seen) == [0, 2, 5, 11]
    # The same number twice is the same sample twice, though it walked other steps.
    torch.testing.assert_close(result.samples[0], result.samples[4], **ROUNDING)


@pytest.mark.parametrize(("n", "batch"), [(7, 3), (7, 7), (7, 1)])
def test_conditioning_stays_with_its_sample(n, batch):
    network, index = Recorder(), torch.tensor([4, 0, 6, 1, 3, 5, 2])
    label, rows = 100 + torch.arange(n), torch.randn(n, 2, 3)
    run(n, StubController(UNEVEN), network=network, index=index, batch_size=batch, cond={"label": label, "rows": rows})
    assert max(len(t) for _, t, _ in network.calls) <= batch
    denoised = []
    for x, t, cond in network.calls:
        place = cond["label"] - 100
        torch.testing.assert_close(x, walked(place, index[place], t), **ROUNDING)
        assert torch.equal(cond["rows"], rows[place])
        denoised += place.tolist() if t.max() == CLOCK.t_min else []
    assert sorted(denoised) == list(range(n))


@pytest.mark.long
@pytest.mark.parametrize("solver", [ExtrapolatedEM(), EulerMaruyama(steps=9)], ids=["extrapolated", "euler"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_nfe_is_what_the_network_counts_for_each_sample(solver, batch):
    network = Recorder(lambda x, t, label: -x)  # exact for unit Gaussian data under VP
    sde, controller = fastsde.VPSDE(), fastsde.Adaptive(0.1, 0.1) if solver.adaptive else None
    parts = {"solver": solver, "controller": controller, "batch_size": batch, "cond": {"label": torch.arange(10)}}
    result = fastsde.sample(network, sde, shape=(10, 2), **parts)
    labels = torch.cat([cond["label"] for _, _, cond in network.calls])
    assert torch.equal(result.nfe, labels.bincount(minlength=10))  # at 8 rows or fewer no slot is padding
    if solver.adaptive:
        assert (result.rejected > 0).any()
        assert len(result.nfe.unique()) > 1
        assert torch.equal(result.nfe, 2 * (result.accepted + result.rejected) + 1)
    else:
        assert result.nfe.tolist() == [10] * 10


# Lag: what a GPU does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_reading_flags_a_turn_late_changes_nothing_for_stubs(batch):
    def once(lag):
        controller = StubController(UNEVEN, {(1, 0), (4, 1), (4, 2)}, {(2, 3): Verdict.TOO_SHORT})
        return run(7, controller, solver=StubSolver({(5, 2)}), batch_size=batch, lag=lag, max_nfe=5)

    now, late = once(0), once(1)
    assert now.counts() == {"SUCCESS": 4, "MAX_NFE": 1, "MIN_STEP": 1, "NON_FINITE": 1}
    assert same(now, late)


@pytest.mark.long
@pytest.mark.parametrize("solver", [ExtrapolatedEM(), EulerMaruyama(steps=5)], ids=["extrapolated", "euler"])
def test_reading_flags_a_turn_late_changes_nothing_for_real_solvers(solver):
    sde = fastsde.VPSDE()
    steps = fastsde.Adaptive(0.05, 0.1) if solver.adaptive else fastsde.Grid.uniform(sde, 5)
    samples = Samples(torch.arange(9), (2,), torch.float32, SEED, {})
    job = make_job(ScoreModel(lambda x, t: -x, sde), sde, solver, steps, (1.0, sde.t_min), samples, Options(4))
    assert same(Engine(job).run(), Engine(dataclasses.replace(job, lag=1)).run())


# Failure is data ---------------------------------------------------------------------------------------------------


def test_a_row_that_is_not_finite_harms_no_other():
    clean = run(4, StubController(UNEVEN), batch_size=3)
    result = run(4, StubController(UNEVEN), solver=StubSolver({(1, 2)}), batch_size=3)
    assert result.status.tolist() == [1, Status.NON_FINITE, 1, 1]
    assert result.samples[1].isnan().all()
    assert result.nfe[1] == 3  # the three steps it tried, and no denoising
    assert same(clean, result, [0, 2, 3])


def test_large_samples_are_no_failures():
    x = torch.full((3, 2), 3e38)
    x[1, 0] = -1e38
    result = fastsde.sample(lambda x, t: 0 * x, CLOCK, x_init=x, solver=EulerMaruyama(steps=3))
    assert result.success.all()
    torch.testing.assert_close(result.samples, x)


def test_samples_are_not_lost_where_the_cost_of_their_last_call_cannot_be_told():
    class Costly(ScoreModel):
        def cost(self, t, cond):
            if bool((t == CLOCK.t_min).all()):
                raise RuntimeError("cost")
            return 1

    model = Costly(lambda x, t: 0 * x, CLOCK)
    job = {"solver": EulerMaruyama(), "controller": fastsde.Grid.uniform(CLOCK, 3), "shape": (4, 2), "batch_size": 2}
    with pytest.raises(SamplingError, match="cost") as caught:
        fastsde.sample(model, **job)
    assert caught.value.result.counts() == {"NOT_DENOISED": 2, "PENDING": 2}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_network_that_fails_for_one_row_at_the_denoising_call(bad):
    def answer(x, t, label):
        return torch.where(((t == CLOCK.t_min) & (label == 1))[:, None], bad, torch.zeros_like(x))

    def once(network):
        return run(4, StubController(UNEVEN), network=network, batch_size=3, cond={"label": torch.arange(4)})

    clean, result = once(Recorder()), once(Recorder(answer))
    assert result.status.tolist() == [1, Status.NON_FINITE, 1, 1]
    assert result.samples[1].isnan().all()
    assert same(clean, result, [0, 2, 3])
    assert torch.equal(clean.nfe, result.nfe)


def test_a_row_below_the_smallest_step_ends_where_it_is():
    clean = run(3, StubController(UNEVEN), batch_size=2)
    result = run(3, StubController(UNEVEN, (), {(1, 1): Verdict.TOO_SHORT}), batch_size=2)
    assert result.status.tolist() == [1, Status.MIN_STEP, 1]
    torch.testing.assert_close(result.samples[1], ended(2, t=7.0)[1], **ROUNDING)
    assert result.nfe[1] == 3  # two attempts and the denoising of where it stopped
    assert same(clean, result, [0, 2])


class Twice(ScoreModel):
    """Counts two calls an evaluation, as guidance does."""

    calls = 2


@pytest.mark.long
@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("model_class", [ScoreModel, Twice])
@pytest.mark.parametrize("solver", [ExtrapolatedEM(), EulerMaruyama(steps=7)], ids=["extrapolated", "euler"])
def test_max_nfe_holds_for_every_sample(solver, model_class, denoise):
    model = model_class(lambda x, t: -x, fastsde.VPSDE(), event_shape=(2,))
    step, last = model.calls * solver.calls_per_step, model.calls * denoise
    rtol = 0.5 if solver.adaptive else None
    free = fastsde.sample(model, n=3, rtol=rtol, solver=solver, denoise=denoise)
    for max_nfe in (step + last, step + last + 1, 4 * step + 1, int(free.nfe.min()), int(free.nfe.max())):
        result = fastsde.sample(model, n=3, rtol=rtol, solver=solver, denoise=denoise, max_nfe=max_nfe)
        done = free.nfe <= max_nfe
        assert (result.nfe <= max_nfe).all()
        assert torch.equal(result.success, done)
        assert (result.status[~done] == Status.MAX_NFE).all()
        assert (result.nfe[~done] + step > max_nfe).all()  # no sample gives up while it could afford a step
        assert same(free, result, done)
        assert result.samples.isfinite().all()


# Interruption and errors --------------------------------------------------------------------------------------------


def uneven(network=None, **options):
    """Seven samples in batches of three; the denoised sample is the state plus one."""
    network = network or Recorder(lambda x, t: torch.ones_like(x))
    return run(7, StubController(UNEVEN), network=network, batch_size=3, **options)


def interrupted(*args, **options):
    """What an interrupted run hands over, or the result of one that was not."""
    try:
        return uneven(*args, **options)
    except fastsde.Interrupted as stopped:
        return stopped.result


def one_then(error, call):
    """A network that answers 1 and raises `error` once, at the given call."""
    fails = raises_at(error, call)
    return lambda x, t: fails(x, t) + 1


def is_partial(result, clean):
    """Whether finished rows are those of the clean run and all others are marked as pending."""
    done = result.status != Status.PENDING
    return same(result, clean, done) and result.samples[~done].isnan().all() and not result.nfe[~done].any()


def test_callback_sees_each_turn():
    seen, copies = [], []

    def callback(state):
        seen.append(state)
        copies.append([v.clone() for v in (state.index, state.x, state.t, state.nfe)])

    uneven(callback=callback)
    assert [state.turn for state in seen] == list(range(1, len(seen) + 1))
    finished = [state.finished for state in seen]
    assert finished == sorted(finished)
    assert finished[-1] == 7
    for state, (index, x, t, nfe) in zip(seen, copies, strict=True):
        torch.testing.assert_close(x, walked(index, index, t), **ROUNDING)
        sizes = torch.tensor(UNEVEN, dtype=torch.float64)[index, 0]
        moving = t > CLOCK.t_min
        assert torch.equal(nfe[moving], ((CLOCK.t_max - t) / sizes)[moving].long())
        for kept, then in zip((state.index, state.x, state.t, state.nfe), (index, x, t, nfe), strict=True):
            assert torch.equal(kept, then)  # a state that is kept does not change as sampling goes on


def test_ctrl_c_between_turns_returns_what_is_finished():
    clean, turns = uneven(), []
    uneven(callback=turns.append)
    for stop in (1, 2, 4, len(turns)):

        def callback(state, stop=stop):
            if state.turn == stop:
                raise KeyboardInterrupt

        result = interrupted(callback=callback)
        assert is_partial(result, clean)
        assert int(result.success.sum()) == turns[stop - 1].finished
    assert result.counts() == {"SUCCESS": 7}


@pytest.mark.parametrize("lag", [0, 1])
def test_ctrl_c_inside_any_network_call_loses_no_sample_that_ended(lag):
    """The last call denoises the last pool; before it, with lag 1, rows may have ended unread."""
    network = Recorder(lambda x, t: torch.ones_like(x))
    clean, ended = uneven(network, lag=lag), []
    for call in range(len(network.calls)):
        result = interrupted(Recorder(one_then(KeyboardInterrupt(), call)), lag=lag)
        assert same(result, clean, result.success)
        pending = result.status == Status.PENDING
        assert result.samples[pending].isnan().all()
        assert not result.nfe[pending].any()
        ended.append(int((~pending).sum()))
    assert ended == sorted(ended)
    assert (ended[0], ended[-1]) == (0, 7)


def test_an_error_inside_any_network_call_hands_over_the_finished_samples():
    network = Recorder(lambda x, t: torch.ones_like(x))
    clean, finished = uneven(network), []
    for call in range(len(network.calls)):
        error = ZeroDivisionError("boom")
        with pytest.raises((ZeroDivisionError, SamplingError), match="boom") as caught:
            uneven(Recorder(one_then(error, call)))
        # The original exception comes through as long as there is nothing to hand over.
        assert (caught.value is error) or call
        if caught.value is error:
            assert not finished
            continue
        result = caught.value.result
        assert caught.value.__cause__ is error
        raw = result.status == Status.NOT_DENOISED
        finished.append(int((result.success | raw).sum()))
        assert f"after {finished[-1]} of 7 samples (ZeroDivisionError: boom)" in str(caught.value)
        assert str(result.counts()) in str(caught.value)
        assert (result.nfe[raw] < clean.nfe[raw]).all()
        assert same(result, clean, result.success)
        torch.testing.assert_close(result.samples[raw], clean.samples[raw] - 1, **ROUNDING)
        assert result.samples[~result.success & ~raw].isnan().all()
    assert finished == sorted(finished)
    assert finished[-1] == 7


def test_progress_bar_counts_finished_samples_and_their_mean_nfe(capfd):
    def stop(state):
        if state.turn == 4:
            raise KeyboardInterrupt

    for callback in (None, stop):
        result = interrupted(progress=True, callback=callback)
        done = result.success
        # What the bar says last: what it says in between depends on the clock.
        last = capfd.readouterr().err.split("\r")[-1]
        assert f" {int(done.sum())}/7 " in last
        assert f"mean_nfe={result.nfe[done].double().mean():.1f}" in last
    assert 0 < int(done.sum()) < 7
    uneven(progress=False)
    assert capfd.readouterr().err == ""


def test_a_network_that_works_in_place_disturbs_nothing():
    sde = fastsde.VPSDE()

    def tidy(x, t):
        return -x.clamp(-1, 1)

    def untidy(x, t):
        t.mul_(999)
        return x.clamp_(-1, 1).neg_()

    a, b = (fastsde.sample(f, sde, shape=(3, 4), rtol=0.5, dtype=torch.float64) for f in (tidy, untidy))
    assert torch.equal(a.samples, b.samples)


def test_a_callback_cannot_change_the_run():
    sde = fastsde.VPSDE()

    def scribble(state):
        for tensor in (state.x, state.t, state.nfe, state.index):
            tensor.zero_()

    a, b = (
        fastsde.sample(lambda x, t: -x, sde, shape=(3, 4), rtol=0.5, callback=callback) for callback in (None, scribble)
    )
    assert torch.equal(a.samples, b.samples)
    assert torch.equal(a.nfe, b.nfe)


def test_a_row_at_its_end_leaves_at_once_though_flags_are_read_late():
    def calls(lag):
        network = Recorder()
        # Sample 2 is refused on its way, sample 4 at its end.
        run(5, StubController(UNEVEN, {(2, 1), (4, 1)}), network=network, batch_size=2, lag=lag)
        return [t.tolist() for _, t, _ in network.calls]

    assert calls(1) == calls(0)


# On another device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_device_that_runs_behind_its_host_gives_the_same_samples(device, eta):
    if device.type == "cpu":
        pytest.skip("needs another device than the CPU: pytest --device")

    def two_ends(x, t):
        """D for data at -1/2 or 1/2 in all elements at once."""
        signal = 0.5 * sde.alpha(t.double()) / sde.sigma(t.double()) ** 2
        return 0.5 * torch.tanh(signal * x.sum(1)).to(x.dtype)[:, None].expand(x.shape)

    sde = fastsde.VPSDE()
    model = ScoreModel(two_ends, sde, "sample", event_shape=(6,))
    rule = fastsde.AdaptiveGrid([fastsde.Grid.tapered(sde, 14 << k) for k in range(3)], 0.05, 0.01, limit=0.5)
    options = {"n": 11, "controller": rule, "solver": fastsde.ExponentialPC(eta=eta), "dtype": torch.float64}
    here = fastsde.sample(model, **options)
    assert 0 < (here.rejected > 0).sum() < 11  # so that some start again, and slots are taken over at odd times
    for batch in (11, 3):
        there = fastsde.sample(model, batch_size=batch, device=device, **options)
        for name in ("nfe", "accepted", "rejected", "status"):
            assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
        # Normals round differently on devices, by 1e-6; the flow to either end draws differences together.
        torch.testing.assert_close(there.samples.cpu(), here.samples, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lag", [0, 1])
def test_what_becomes_of_an_empty_slot_is_nobodys_failure(lag):
    # One of sixteen ends first; the batch keeps its slot until two are empty, and the network fails at the last time.
    def network(x, t):
        return torch.where(t[:, None] <= CLOCK.t_min, torch.nan, torch.zeros_like(x))

    def patience(state):
        assert state.turn < 20  # a sample that ends twice leaves the loop without an end

    sizes = [[8.0], *[[1.0]] * 15]
    result = run(16, StubController(sizes), network=network, denoise=False, lag=lag, callback=patience)
    assert result.counts() == {"SUCCESS": 16}
    assert result.nfe.tolist() == [1, *[8] * 15]
