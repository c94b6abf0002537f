"""Parts without numerics that drive the real engine, and networks that record what they are asked."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch

from fastsde import EDM, Controller, ScoreModel, Solver
from fastsde.control import Decision, Verdict
from fastsde.engine import Engine
from fastsde.job import Job
from fastsde.noise import BrownianPath
from fastsde.solvers import Step

CLOCK = EDM(t_min=1.0, t_max=9.0)
"""A process with alpha = 1: under a zero score, denoising returns the state as it is."""
SEED = 7


class Attempt(NamedTuple):
    """What the solver was given for one active row."""

    t: float
    s: float
    x: torch.Tensor
    dw: torch.Tensor
    accepted: int


class StubSolver(Solver):
    """x_s = x_t + dW after one network call. Keeps a log of the attempts of each active row, by place in the queue.

    `nan` holds pairs (place in the queue, attempt) whose proposal is not a number.
    """

    convergence, noise, calls_per_step, adaptive, use = "none", "path", 1, True, "tests"

    def __init__(self, nan=()):
        self.log, self.nan, self.started = defaultdict(list), set(nan), 0

    def init(self, x_t):
        place = torch.arange(self.started, self.started + len(x_t))
        self.started += len(x_t)
        return {"place": place, "accepted": torch.zeros_like(place)}

    def step(self, model, sde, x_t, t, s, noise, carry):
        dw = noise.dw
        x = x_t + dw + 0 * model(x_t, t).score
        for row in model.active.nonzero().flatten().tolist():
            place, accepted = int(carry["place"][row]), int(carry["accepted"][row])
            if (place, len(self.log[place])) in self.nan:
                x[row, 0] = torch.nan
            self.log[place].append(Attempt(float(t[row]), float(s[row]), x_t[row].clone(), dw[row].clone(), accepted))
        return Step(x, {"place": carry["place"], "accepted": carry["accepted"] + 1}, x, x)


class StubController(Controller):
    """Attempt k of sample i has size `sizes[i][k]`, is rejected if (i, k) is in `reject`, ends it if in `fail`.

    If (i, k) is in `restart`, the sample goes back to its start. The count of attempts goes on.

    Attempts beyond the end of a row of `sizes` repeat its last size.
    """

    adaptive = True

    def __init__(self, sizes, reject=(), fail=None, restart=()):
        self.sizes, self.reject, self.fail, self.started = sizes, set(reject), fail or {}, 0
        self.restart = set(restart)

    def init(self, t, t_end):
        place = torch.arange(self.started, self.started + len(t))
        self.started += len(t)
        return {"place": place, "attempt": torch.zeros_like(place)}

    def _script(self, carry):
        return list(zip(carry["place"].tolist(), carry["attempt"].tolist(), strict=True))

    def target(self, t, t_end, carry):
        sizes = [self.sizes[i][min(k, len(self.sizes[i]) - 1)] for i, k in self._script(carry)]
        return (t - torch.tensor(sizes, dtype=torch.float64)).clamp(min=t_end)

    def update(self, t, s, t_end, error, scale, carry):
        script = self._script(carry)
        verdicts = dict.fromkeys(self.reject, Verdict.REJECT) | dict.fromkeys(self.restart, Verdict.RESTART) | self.fail
        verdict = torch.tensor([int(verdicts.get(attempt, Verdict.ACCEPT)) for attempt in script])
        return Decision(verdict, {"place": carry["place"], "attempt": carry["attempt"] + 1})

    def counts(self, i, t=CLOCK.t_max, t_end=CLOCK.t_min):
        """Accepted and rejected steps of sample i, from the script alone."""
        accepted = rejected = 0
        while t > t_end:
            k = accepted + rejected
            if (i, k) in self.restart:
                accepted, rejected, t = 0, k + 1, CLOCK.t_max
            elif (i, k) in self.reject:
                rejected += 1
            else:
                accepted, t = accepted + 1, t - self.sizes[i][min(k, len(self.sizes[i]) - 1)]
        return accepted, rejected


class Recorder:
    """A network that answers `answer(x, t, **cond)`, zero by default, and keeps every (x, t, cond) it was given."""

    def __init__(self, answer=None):
        self.answer, self.calls = answer or (lambda x, t, **cond: torch.zeros_like(x)), []

    def __call__(self, x, t, **cond):
        self.calls.append((x.clone(), t.clone(), {key: value.clone() for key, value in cond.items()}))
        return self.answer(x, t, **cond)


def never(x, t, **cond):
    """A network that must not be called."""
    raise AssertionError("the network was called")


def raises_at(error, call):
    """A zero score whose call number `call`, counted from 0, raises `error`."""
    count = iter(range(1 << 30))

    def answer(x, t, **cond):
        if next(count) == call:
            raise error
        return torch.zeros_like(x)

    return answer


class Stopped(Exception):
    """What `stop_at` raises."""


def stop_at(last):
    """A callback of a training that stops it."""

    def callback(step, history, network):
        if step == last:
            raise Stopped

    return callback


def equal(a, b):
    """Whether two dicts of tensors have the same keys and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def path(sde=CLOCK, event=(2,)):
    """The Brownian path that the stub runs walk."""
    return BrownianPath(SEED, event, torch.float64, t_min=sde.t_min, t_max=sde.t_max)


def run(n, controller, *, solver=None, network=None, sde=CLOCK, **options):
    """Drives the real engine with n stub rows that start at x = (place in the queue, 0)."""
    start = torch.zeros(n, 2, dtype=torch.float64)
    start[:, 0] = torch.arange(n)
    defaults = {
        "index": torch.arange(n),
        "cond": {},
        "start": start.__getitem__,
        "denoise": True,
        "max_nfe": 1000,
        "batch_size": n,
        "progress": False,
        "callback": None,
        "lag": 0,
        "noise": path(sde),
        "t_start": sde.t_max,
        "t_end": sde.t_min,
    }
    model = ScoreModel(network or Recorder(), sde)
    job = Job(model=model, sde=sde, solver=solver or StubSolver(), controller=controller, **(defaults | options))
    return Engine(job).run()


def same(a, b, rows=slice(None)):
    """Whether two results agree bit for bit (NaN equals NaN) in the given rows."""
    names = ("samples", "nfe", "accepted", "rejected", "status", "index")
    pairs = [(getattr(a, name)[rows].double(), getattr(b, name)[rows].double()) for name in names]
    return all(torch.equal(x.nan_to_num(nan=1e99), y.nan_to_num(nan=1e99)) for x, y in pairs)
