"""The live queue: requests share a batch, and each gets what `sample` gives it alone."""

import asyncio
import concurrent.futures
import itertools
import math
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsde
from fastsde import (
    AdaptiveGrid,
    ExponentialPC,
    ExtrapolatedEM,
    Grid,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    ScoreModel,
)
from fastsde.score import Mask, Projection
from fastsde.score.analytic import MixtureScore
from fastsde.tokens import ExactTokens, Unmask

VP = fastsde.VPSDE()
MEANS = torch.tensor([[-0.7, 0.2], [0.5, -0.4]], dtype=torch.float64)
MIXTURE = MixtureScore(VP, torch.tensor([0.4, 0.6]), MEANS, torch.zeros(2, 2, 0), torch.zeros(2, 0), floor=0.01)
EDITED = torch.tensor([[0.3, -0.1], [0.2, 0.6]], dtype=torch.float64)
SETTINGS = {
    "nfe": {"nfe": 5},
    "more calls": {"nfe": 11},
    "rtol": {"rtol": 0.1},
    "noise": {"solver": ExponentialPC(eta=1.0), "nfe": 9},
    "not denoised": {"nfe": 6, "denoise": False},
    "a last call": {"solver": ReverseDiffusion(steps=7)},
    "steps from errors": {"solver": ExtrapolatedEM(), "rtol": 0.3},
    "restarts": {"controller": AdaptiveGrid([Grid.tapered(VP, 6 << k) for k in range(3)], 0.05, 0.01)},
    "edited": {"x_data": EDITED, "strength": 0.6, "nfe": 7},
    "own start": {"x_init": 3 * EDITED, "rtol": 0.2},
    "numbers": {"index": [9, 2, 5], "nfe": 8},
}


def assert_same(one, other):
    """Costs and ends are equal, samples up to what another batch size rounds off in float64."""
    for name in ("nfe", "accepted", "rejected", "status", "index"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.seed == other.seed
    torch.testing.assert_close(one.samples, other.samples, rtol=1e-5, atol=1e-5, equal_nan=True)


class Gate:
    """A zero network that notes the batch sizes it is given, and waits while it is shut."""

    def __init__(self):
        self.open, self.sizes, self.called = threading.Event(), [], threading.Event()
        self.open.set()

    def __call__(self, x, t, **cond):
        self.sizes.append(len(x))
        self.called.set()
        assert self.open.wait(20)
        return -x


@pytest.mark.long
@settings(max_examples=12)
@given(st.lists(st.tuples(st.sampled_from(sorted(SETTINGS)), st.integers(1, 5)), min_size=1, max_size=12))
def test_each_request_gets_what_sample_gives(asked):
    with Sampler(MIXTURE, batch_size=7) as sampler:
        requests = []
        for seed, (name, n) in enumerate(asked):
            how = SETTINGS[name] if {"x_data", "x_init", "index"} & {*SETTINGS[name]} else {**SETTINGS[name], "n": n}
            requests.append((how, seed, sampler.submit(**how, seed=seed)))
        for how, seed, request in requests:
            assert_same(request.result(60), fastsde.sample(MIXTURE, **how, seed=seed))


def test_conditioning_travels_with_its_sample():
    model = ScoreModel(lambda x, t, shift: -(x - shift[:, None]), VP, event_shape=(2,))
    with Sampler(model, batch_size=4, nfe=6) as sampler:
        requests = [sampler.submit(n=3, seed=k, cond={"shift": torch.arange(3.0) + k}) for k in range(5)]
        for k, request in enumerate(requests):
            alone = fastsde.sample(model, n=3, seed=k, nfe=6, cond={"shift": torch.arange(3.0) + k})
            assert_same(request.result(20), alone)


def test_a_request_may_have_another_reading_of_the_network():
    y = torch.tensor([0.5, 0.0], dtype=torch.float64)
    known = Projection(MIXTURE, Mask(torch.tensor([1, 0])), y)
    with Sampler(MIXTURE, batch_size=4, nfe=9) as sampler:
        plain, other = sampler.submit(n=3, seed=1), sampler.submit(model=known, n=3, seed=1)
        assert_same(plain.result(20), fastsde.sample(MIXTURE, n=3, seed=1, nfe=9))
        assert_same(other.result(20), fastsde.sample(known, n=3, seed=1, nfe=9))
        with pytest.raises(TypeError, match="model"):
            sampler.submit(model="another")


def test_tokens_are_those_of_sample():
    joint = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ExactTokens(joint / joint.sum())
    settings = [{"nfe": 2}, {"nfe": 4}, {"rtol": 0.3}, {"solver": Unmask(order="confidence"), "nfe": 3}]
    with Sampler(model, batch_size=5) as sampler:
        requests = [sampler.submit(n=4, seed=k, **how) for k, how in enumerate(settings)]
        for k, (how, request) in enumerate(zip(settings, requests, strict=True)):
            alone = fastsde.sample(model, n=4, seed=k, **how)
            assert torch.equal(request.result(20).samples, alone.samples)
            assert torch.equal(request.result().nfe, alone.nfe)


def test_new_requests_take_free_slots_and_every_evaluated_row_is_needed():
    gate = Gate()
    gate.open.clear()
    with Sampler(ScoreModel(gate, VP, event_shape=(1,)), batch_size=8, nfe=6) as sampler:
        first = sampler.submit(n=3)
        assert gate.called.wait(20)  # it runs with 3 rows
        others = [sampler.submit(nfe=3 + k % 4) for k in range(20)]
        gate.open.set()
        first.result(20)
        assert [len(r.result(20).nfe) for r in others] == [1] * 20
    stats = sampler.stats()
    assert gate.sizes[0] == 3
    assert max(gate.sizes) == 8
    # Each sample of 20 needs as many rows as its calls; only while the last ones end may a slot be empty.
    assert sum(gate.sizes) <= 18 + sum(3 + k % 4 for k in range(20)) + 8
    assert stats.rows == sum(gate.sizes)
    assert stats.nfe == {6: 3 + 5, 3: 5, 4: 5, 5: 5}
    assert stats.finished == 23
    assert stats.running == stats.waiting == 0


def test_cancelling_frees_slots_before_the_next_turn():
    gate = Gate()
    gate.open.clear()
    with Sampler(ScoreModel(gate, VP, event_shape=(1,)), batch_size=4, nfe=50) as sampler:
        running = sampler.submit(n=4)
        assert gate.called.wait(20)
        waiting, gone = sampler.submit(n=2, nfe=5), sampler.submit(n=2)
        assert running.cancel()
        assert gone.cancel()
        gate.open.set()
        waiting.result(20)
        calls = len(gate.sizes)
    assert calls == 1 + 5
    assert gate.sizes == [4] + [2] * 5
    assert sampler.stats().requests == {"cancelled": 2, "finished": 1}


def test_a_full_queue_says_so_and_waits_if_asked():
    gate = Gate()
    gate.open.clear()
    with Sampler(ScoreModel(gate, VP, event_shape=(1,)), batch_size=2, max_waiting=3, nfe=2) as sampler:
        sampler.submit(n=2)
        assert gate.called.wait(20)
        sampler.submit(n=2)
        with pytest.raises(fastsde.SamplerFullError, match="no room for 2 more: 2 of 3 samples wait"):
            sampler.submit(n=2)
        with pytest.raises(fastsde.SamplerFullError):
            sampler.submit(n=2, timeout=0.01)
        with pytest.raises(ValueError, match="n must be at most max_waiting = 3; got 4"):
            sampler.submit(n=4)
        threading.Timer(0.05, gate.open.set).start()
        assert len(sampler.submit(n=2, timeout=20.0).result(20).samples) == 2


@pytest.mark.parametrize("solver", [ExponentialPC(), ReverseDiffusion()], ids=["no last call", "a last call"])
def test_a_request_that_fails_is_alone(solver):
    """Of all that the network is given together, it refuses one row's conditioning: of half of the runs at the end."""

    def network(x, t, bad):
        if bool((bad > t).any()):
            raise IndexError("no such label")
        return -x

    model = ScoreModel(network, VP, event_shape=(2,))
    with Sampler(model, batch_size=6) as sampler:
        requests = []
        for k in range(6):
            bad = torch.full((3,), {2: 2.0, 4: 0.3}.get(k, 0.0), dtype=torch.float64)
            steps = {"nfe": 6 + k} if isinstance(solver, ExponentialPC) else {}
            how = {"solver": solver if steps else ReverseDiffusion(steps=6 + k), **steps}
            requests.append((how, sampler.submit(n=3, seed=k, cond={"bad": bad}, **how)))
        for k, (how, request) in enumerate(requests):
            if k in (2, 4):
                with pytest.raises(IndexError, match="no such label"):
                    request.result(20)
            else:
                zero = torch.zeros(3, dtype=torch.float64)
                assert_same(request.result(20), fastsde.sample(model, n=3, seed=k, cond={"bad": zero}, **how))
    assert sampler.stats().requests == {"failed": 2, "finished": 4}


def test_a_row_that_is_not_finite_ends_alone():
    model = ScoreModel(lambda x, t, bad: -x / bad[:, None], VP, event_shape=(1,))
    with Sampler(model, nfe=5) as sampler:
        result = sampler.submit(n=3, cond={"bad": torch.tensor([1.0, 0.0, 1.0])}).result(20)
    assert result.counts() == {"SUCCESS": 2, "NON_FINITE": 1}


def test_the_callback_sees_its_own_samples_and_fails_its_own_request():
    states = []

    def broken(state):
        raise KeyError("my own mistake")

    with Sampler(MIXTURE, batch_size=8, nfe=6) as sampler:
        other = sampler.submit(n=3, seed=1)
        seen = sampler.submit(index=[4, 7], seed=2, callback=states.append)
        with pytest.raises(KeyError, match="my own mistake"):
            sampler.submit(n=2, callback=broken).result(20)
        assert_same(other.result(20), fastsde.sample(MIXTURE, n=3, seed=1, nfe=6))
        result = seen.result(20)
    assert [state.index.tolist() for state in states] == [[4, 7]] * 6
    assert [state.nfe.tolist() for state in states] == [[k, k] for k in range(1, 7)]
    assert all((after.t < before.t).all() for before, after in itertools.pairwise(states))
    torch.testing.assert_close(states[-1].x_0, result.samples)


@pytest.mark.parametrize("failing", ["network", "callback"])
def test_whoever_is_told_of_a_failure_finds_its_turns_counted(failing):
    gate, stats = Gate(), []
    gate.open.clear()

    def network(x, t):
        out = gate(x, t)
        if failing == "network" and len(gate.sizes) == 3:
            raise IndexError("my own mistake")
        return out

    def callback(state):
        if failing == "callback" and len(gate.sizes) == 3:
            raise IndexError("my own mistake")

    with Sampler(ScoreModel(network, VP, event_shape=(1,)), batch_size=2, nfe=6) as sampler:
        request = sampler.submit(n=3, callback=callback)
        request.add_done_callback(lambda _: stats.append(sampler.stats()))
        gate.open.set()
        with pytest.raises(IndexError, match="my own mistake"):
            request.result(20)
    assert len(stats) == 1
    assert (stats[0].turns, stats[0].rows) == (3, 3 * 2)
    assert stats[0].requests == {"failed": 1}
    assert (stats[0].running, stats[0].waiting) == (0, 0)


def test_closing_finishes_or_cancels():
    gate = Gate()
    sampler = Sampler(ScoreModel(gate, VP, event_shape=(1,)), batch_size=2, nfe=4)
    requests = [sampler.submit(n=2) for _ in range(3)]
    sampler.close()
    assert all(request.done() for request in requests)
    with pytest.raises(RuntimeError, match="closed"):
        sampler.submit()
    gate.open.clear()
    gate.called.clear()
    sampler = Sampler(ScoreModel(gate, VP, event_shape=(1,)), batch_size=2, nfe=4)
    requests = [sampler.submit(n=2) for _ in range(3)]
    assert gate.called.wait(20)
    threading.Timer(0.05, gate.open.set).start()
    sampler.close(cancel=True)
    assert all(request.cancelled() for request in requests)


def test_coroutines_and_threads():
    async def ask(sampler, seed):
        request = sampler.submit(n=2, seed=seed)
        if seed == 3:
            task = asyncio.ensure_future(asyncio.wrap_future(request))
            task.cancel()
            await asyncio.sleep(0)
            return request
        return await request

    async def several(sampler):
        return await asyncio.gather(*(ask(sampler, seed) for seed in range(6)))

    with Sampler(MIXTURE, batch_size=3, nfe=9) as sampler:
        results = asyncio.run(several(sampler))
        found = {}
        threads = [
            threading.Thread(target=lambda k=k: found.update({k: sampler.submit(seed=k).result(20)})) for k in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results[3].cancelled()
    for seed in (0, 1, 2, 4, 5):
        assert_same(results[seed], fastsde.sample(MIXTURE, n=2, seed=seed, nfe=9))
        assert_same(found[seed], fastsde.sample(MIXTURE, n=1, seed=seed, nfe=9))


class Quit(BaseException):
    """As CancelledError and SystemExit are, no Exception."""


def test_whatever_a_callback_raises_is_of_its_request():
    def quits(state):
        raise Quit

    def told(request):
        raise Quit

    with Sampler(MIXTURE, batch_size=4, nfe=6) as sampler:
        other, bad = sampler.submit(n=2, seed=1), sampler.submit(callback=quits)
        other.add_done_callback(told)
        with pytest.raises(Quit):
            bad.result(20)
        assert_same(other.result(20), fastsde.sample(MIXTURE, n=2, seed=1, nfe=6))
        assert_same(sampler.submit(seed=3).result(20), fastsde.sample(MIXTURE, n=1, seed=3, nfe=6))


def test_a_callback_may_submit_and_never_waits():
    found = []

    def more(state):
        try:
            found.append(sampler.submit(nfe=2, timeout=None))
        except fastsde.SamplerFullError as error:
            found.append(error)

    with Sampler(MIXTURE, batch_size=1, max_waiting=1, nfe=6) as sampler:
        sampler.submit(callback=more).result(20)
    assert {isinstance(one, fastsde.SamplerFullError) for one in found} == {True, False}


def test_cancelled_requests_are_told_and_make_room():
    gate = Gate()
    gate.open.clear()
    with Sampler(ScoreModel(gate, VP, event_shape=(1,)), batch_size=1, max_waiting=2, nfe=3) as sampler:
        running = sampler.submit()
        assert gate.called.wait(20)
        for _ in range(50):
            sampler.submit(n=2).cancel()
        assert sampler.stats().waiting <= 2
        last = sampler.submit(n=2)
        running.cancel()
        gate.open.set()
        done, _ = concurrent.futures.wait([running, last], timeout=20)
        assert done == {running, last}
    assert sampler.stats().requests == {"cancelled": 51, "finished": 1}


def test_what_was_given_may_change_afterwards():
    gate = Gate()
    gate.open.clear()
    model = ScoreModel(gate, VP, event_shape=(2,))
    x = torch.ones(1, 2)
    with Sampler(model, batch_size=1, nfe=5) as sampler:
        sampler.submit()
        assert gate.called.wait(20)
        with torch.inference_mode():
            one = sampler.submit(x_init=x, seed=1)
        x.zero_()
        gate.open.set()
        assert_same(one.result(20), fastsde.sample(model, x_init=torch.ones(1, 2), seed=1, nfe=5))


def test_a_sampler_of_another_process_takes_no_requests():
    with Sampler(MIXTURE, nfe=3) as sampler:
        sampler.submit().result(20)
        child = os.fork()
        if not child:
            try:
                sampler.submit()
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_solvers_that_read_the_batch_are_refused():
    solver = PredictorCorrector(corrector=fastsde.Langevin(batch_mean=True))
    with Sampler(MIXTURE) as sampler, pytest.raises(ValueError, match="means over its batch"):
        sampler.submit(solver=solver, nfe=20)


def test_a_seed_is_drawn_and_said():
    with Sampler(MIXTURE, nfe=5) as sampler:
        one, other = sampler.submit(n=2), sampler.submit(n=2)
        assert one.seed == one.result(20).seed != other.seed
    assert_same(one.result(), fastsde.sample(MIXTURE, n=2, seed=one.seed, nfe=5))


def test_large_requests_take_turns_with_small_ones():
    done = []
    with Sampler(MIXTURE, batch_size=4, nfe=5) as sampler:
        for name, n in (("large", 200), ("small", 1), ("next", 1)):
            sampler.submit(n=n).add_done_callback(lambda request, name=name: done.append(name))
    assert done == ["small", "next", "large"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"nfe": 0}, ValueError, "nfe must be"),
        ({"rtol": 0.1, "nfe": 5}, ValueError, "not both"),
        ({"n": 0}, ValueError, "n must be"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"cond": {"x": torch.zeros(2)}}, ValueError, "leading axis"),
        ({"callback": 3}, TypeError, "callback"),
        ({"timeout": math.nan}, ValueError, "timeout must be"),
    ],
    ids=range(7),
)
def test_bad_requests_are_refused_before_they_join(asked, error, message):
    gate = Gate()
    with Sampler(ScoreModel(gate, VP, event_shape=(1,))) as sampler:
        with pytest.raises(error, match=message):
            sampler.submit(**asked)
        assert sampler.stats().waiting == 0
    assert not gate.sizes


@pytest.mark.parametrize("name", ["batch_size", "max_waiting"])
def test_bad_limits_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Sampler(MIXTURE, **{name: 0})
