"""`Sampler`: a live queue. Samples of many requests share one batch, and each request has its own settings."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import secrets
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsde.api import job_of, with_range
from fastsde.arguments import as_model
from fastsde.checks import check_count, check_kind, check_number
from fastsde.control.base import Controller
from fastsde.engine import Engine
from fastsde.job import EngineState, Job, Options
from fastsde.lane import Lane, Request
from fastsde.result import SampleResult
from fastsde.score.base import Model
from fastsde.sde.base import SDE
from fastsde.solvers import Solver
from fastsde.types import Carry, Cond, ScoreFn


class SamplerFullError(RuntimeError):
    """The queue of a `Sampler` has no room for a request."""


@dataclasses.dataclass(frozen=True)
class SamplerStats:
    """What a `Sampler` does and has done.

    Attributes:
        waiting: samples in the queue.
        running: samples in slots.
        finished: samples that have ended, with any status.
        requests: requests by how they ended: "finished", "cancelled" and "failed".
        turns: turns of the engine.
        rows: rows that were evaluated, those of ended samples and of empty slots included. A turn evaluates the rows of
            a batch once or more, as its solver does.
        needed: rows of these with a sample that was not ended.
        nfe: how many samples made how many network calls.
    """

    waiting: int
    running: int
    finished: int
    requests: dict[str, int]
    turns: int
    rows: int
    needed: int
    nfe: dict[int, int]


_Q = TypeVar("_Q", bound="RequestQueue")


class RequestQueue(ABC):
    """What samplers have in common: a queue of requests, slots, and a thread that runs the networks.

    Use it in a `with` statement, or close it: it lives until then.

    Args:
        batch_size: number of slots: the most samples that are evaluated at a time.
        max_waiting: the most samples that wait for a slot.
    """

    def __init__(self, batch_size: int, max_waiting: int) -> None:
        self.batch_size = check_count("batch_size", batch_size, 1)
        self.max_waiting = check_count("max_waiting", max_waiting, 1)
        self._queue: deque[Request] = deque()
        self._lanes: list[Lane] = []
        self._alive: set[Request] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._requests: Counter[str] = Counter()
        self._nfe: Counter[int] = Counter()
        self._turns = self._rows = self._needed = self._running = 0
        self._ending: list[tuple[Request, str, BaseException | None]] = []
        self._thread = threading.Thread(target=self._work, name=f"fastsde.{type(self).__name__}", daemon=True)
        self._thread.start()
        atexit.register(self.close, cancel=True)  # a thread that still runs the network would crash the end of Python

    def running(self) -> AbstractContextManager[None]:
        """What the networks need around them while they run, besides being in evaluation mode."""
        return contextlib.nullcontext()

    @abstractmethod
    def lane(self, job: Job) -> Lane:
        """A new batch for jobs that can share one with this job."""

    def enqueue(self, request: Request, timeout: float | None) -> None:
        """Lets a request join the queue; errors as for `submit`."""
        check_kind("callback", request.callback, Callable, "callable")
        if request.n > self.max_waiting:
            raise ValueError(f"n must be at most max_waiting = {self.max_waiting}; got {request.n}.")
        timeout = None if timeout is None else check_number("timeout", timeout, 0.0, threading.TIMEOUT_MAX)
        if threading.current_thread() is self._thread:
            timeout = 0.0  # a callback that waited would wait for itself
        with self._changed:
            room = self._changed.wait_for(lambda: not self.takes_requests or self._room(request), timeout)
            if not self.takes_requests:
                raise RuntimeError(f"this {type(self).__name__} is closed, or of another process.")
            if not room:
                raise SamplerFullError(
                    f"the queue has no room for {request.n} more: {self._waiting()} of {self.max_waiting} samples wait."
                )
            self._queue.append(request)
            self._alive.add(request)
            self._changed.notify_all()

    @property
    def takes_requests(self) -> bool:
        """Whether it is open, and its thread lives."""
        return not self._closed and self._thread.is_alive()

    def stats(self) -> SamplerStats:
        """What the sampler does and has done, now."""
        with self._changed:
            evaluated = self._turns, self._rows, self._needed, dict(self._nfe)
            return SamplerStats(self._waiting(), self._running, self._nfe.total(), dict(self._requests), *evaluated)

    def close(self, *, cancel: bool = False) -> None:
        """Takes no more requests, and returns when those that it has are finished, or cancelled.

        Args:
            cancel: cancel them.
        """
        with self._changed:
            self._closed = True
            left = list(self._alive) if cancel else []
            self._changed.notify_all()
        for request in left:
            request.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self.close)

    def __enter__(self: _Q) -> _Q:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(cancel=kind is not None)

    def _waiting(self) -> int:
        return sum(request.n - request.begun for request in self._queue)

    def _room(self, request: Request) -> bool:
        """Whether a request fits into the queue, which those leave that were cancelled while they waited."""
        if self._waiting() + request.n > self.max_waiting:
            for gone in [other for other in self._queue if other.cancelled() and not other.begun]:
                self._over(gone, "cancelled")
        return self._waiting() + request.n <= self.max_waiting

    def _work(self) -> None:
        """The sampler's thread: turns while there are samples, and else waits."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if not self._queue:
                    return
            try:
                with torch.no_grad(), self.running():
                    while self._admitted():
                        for lane in self._lanes:
                            self._turn(lane)
            except BaseException as error:  # noqa: BLE001 - nobody else could tell those who wait
                self._lanes, self._running = [], 0
                with self._changed:
                    left = list(self._alive)
                for request in left:
                    self._over(request, "failed", error)

    def _admitted(self) -> bool:
        """Gives free slots to samples that wait, after those of cancelled requests; whether there is anything to do."""
        with self._changed:
            cancelled = [request for request in self._alive if request.cancelled()]
        for gone in cancelled:
            self._drop(gone)
            self._over(gone, "cancelled")
        self._lanes = [lane for lane in self._lanes if lane.live or lane.pool]
        self._running = sum(lane.live for lane in self._lanes)
        while self._running < self.batch_size and (request := self._next()) is not None:
            count = min(self.batch_size - self._running, request.n - request.begun)
            try:
                self._lane(request.engine.job).admit(request, count)
            except BaseException as error:  # noqa: BLE001 - of this request's start alone
                self._drop(request)
                self._over(request, "failed", error)
                continue
            self._running += count
            with self._changed:
                if request in self._queue:  # it may have been cancelled just now
                    self._queue.remove(request)
                    if request.begun < request.n:
                        self._queue.append(request)  # a large request takes turns with others
                self._changed.notify_all()
        return bool(self._lanes)

    def _next(self) -> Request | None:
        with self._changed:
            return self._queue[0] if self._queue else None

    def _drop(self, request: Request) -> None:
        for lane in self._lanes:
            lane.drop(request)

    def _lane(self, job: Job) -> Lane:
        """The lane that takes the rows of a job."""
        for lane in self._lanes:
            if lane.takes(job):
                return lane
        self._lanes.append(self.lane(job))
        return self._lanes[-1]

    def _turn(self, lane: Lane) -> None:
        needed = lane.live
        try:
            lane.advance()
        finally:
            with self._changed:
                self._turns += 1
                self._rows, self._needed = self._rows + lane.width, self._needed + needed
                self._running = sum(other.live for other in self._lanes)
            # Only now, so that whoever waits for a request finds its turns counted.
            ending, self._ending = self._ending, []
            for request, how, error in ending:
                self._over(request, how, error)

    def _ended(self, request: Request, row: Carry) -> None:
        """Writes ended samples of a request."""
        request.engine._put(row)
        request.left -= len(row["slot"])
        with self._changed:
            self._nfe.update(row["nfe"].tolist())
        if not request.left:
            self._ending.append((request, "finished", None))

    def _failed(self, request: Request, error: BaseException) -> None:
        """Takes a request out that has failed in a turn."""
        self._drop(request)
        self._ending.append((request, "failed", error))

    def _over(self, request: Request, how: str, error: BaseException | None = None) -> None:
        """Tells whoever waits for a request how it has ended."""
        result = None
        if how == "finished":
            try:
                result = request.whole()
            except BaseException as late:  # noqa: BLE001 - it goes to whoever waits
                how, error = "failed", late
        with self._changed:
            if request not in self._alive:
                return
            self._alive.discard(request)
            if request in self._queue:
                self._queue.remove(request)
            self._requests[how] += 1
            self._changed.notify_all()
        request.close(others=any(lane.requests() for lane in self._lanes))
        with contextlib.suppress(BaseException):  # it was cancelled just now; or who was told raised
            if error is not None:
                request.set_exception(error)
            elif how == "finished":
                request.set_result(result)
        if request.cancelled():
            request.set_running_or_notify_cancel()  # so that concurrent.futures.wait knows, too


class Sampler(RequestQueue):
    r"""Draws samples for requests that may come at any time, from any thread, in one running batch.

        with fastsde.Sampler(model, batch_size=64, rtol=0.05) as sampler:
            request = sampler.submit(n=4, seed=1, cond={"class_labels": labels})
            samples = request.result().samples  # in a coroutine: (await request).samples

    A sample of a new request takes the next free slot, while the samples of other requests are on their way. Each
    request has its own number of steps, seed, start and conditioning. Each of its samples is the one that
    `fastsde.sample` draws with the same arguments, up to the rounding of the network at another batch size.

    Requests with the same solver and process share one forward of the network, whatever their `nfe` is. Solvers that
    choose their steps from errors, such as `ExtrapolatedEM`, share it if the tolerances are the same, too.

    One thread of its own runs the network. If the network fails, each request of the batch is tried alone, and only
    those that fail again get the error.

    Args:
        model: a `ScoreModel` or a score function, as for `sample`, or a token model.
        sde: the process of a score function.
        batch_size: number of slots: the most samples that are evaluated at a time.
        max_waiting: the most samples that wait for a slot.
        max_nfe: as for `sample`, for all requests.
        rtol, atol, nfe, solver: what requests take if they say none of rtol, atol, nfe, solver and controller.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        model: Model | ScoreFn,
        sde: SDE | None = None,
        *,
        batch_size: int = 64,
        max_waiting: int = 1024,
        max_nfe: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        nfe: int | None = None,
        solver: Solver | None = None,
    ) -> None:
        self.model: Model = model if isinstance(model, Model) else as_model(model, sde)
        self._sde = sde if isinstance(model, Model) else None
        self.max_nfe = None if max_nfe is None else check_count("max_nfe", max_nfe, 1)
        self._default: dict[str, Any] = {"rtol": rtol, "atol": atol, "nfe": nfe, "solver": solver}
        super().__init__(batch_size, max_waiting)

    def submit(
        self,
        *,
        model: Model | None = None,
        n: int | None = None,
        shape: Sequence[int] | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        nfe: int | None = None,
        solver: Solver | None = None,
        controller: Controller | None = None,
        seed: int | None = None,
        index: Sequence[int] | Tensor | None = None,
        cond: Cond | None = None,
        x_init: Tensor | None = None,
        x_data: Tensor | None = None,
        strength: float | None = None,
        t_start: float | None = None,
        denoise: bool = True,
        callback: Callable[[EngineState], None] | None = None,
        timeout: float | None = 0.0,
    ) -> Request:
        """Asks for samples.

        Args:
            model: another reading of the sampler's network for this request, such as one with guidance or measurements.
                Its samples are evaluated apart from those of other readings.
            n, shape, rtol, atol, nfe, solver, controller, index, cond, x_init, x_data, strength, t_start, denoise: as
                for `sample`; one sample by default.
            seed: in [0, 2^64); drawn at random by default. `.seed` of the request and of the result says it.
            callback: called after each turn in the thread of the sampler, with an `EngineState` of those of this
                request's samples that are in slots: `index`, `t`, `nfe`, `x` and `x_0`, the denoised prediction. It
                must be quick: all requests wait for it. What it raises fails the request.
            timeout: seconds to wait for room in the queue; 0 to raise at once, None to wait for ever.

        Returns:
            A future of the `SampleResult`, with `cancel()`.

        Raises:
            ValueError, TypeError: before the request joins the queue, naming the argument.
            SamplerFullError: if the queue has no room.
            RuntimeError: if the sampler is closed.
        """
        how: dict[str, Any] = {"rtol": rtol, "atol": atol, "nfe": nfe, "solver": solver, "controller": controller}
        if all(value is None for value in how.values()):
            how |= self._default
        # Copies, as the caller may change his own before their turn.
        x_init, x_data = (v.clone() if isinstance(v, Tensor) else v for v in (x_init, x_data))
        index = index.clone() if isinstance(index, Tensor) else index
        if isinstance(cond, Mapping):
            cond = {key: value.clone() if isinstance(value, Tensor) else value for key, value in cond.items()}
        given = x_init if x_data is None else x_data
        if n is None and shape is None and index is None and given is None:
            n = 1
        check_kind("model", model, Model, "a fastsde.ScoreModel, as that of the sampler")
        job = job_of(
            model or self.model,
            self._sde,
            options=Options(self.batch_size, self.max_nfe),
            n=n,
            shape=shape,
            seed=secrets.randbits(63) if seed is None else seed,
            index=index,
            cond=cond,
            x_init=x_init,
            x_data=x_data,
            strength=strength,
            t_start=t_start,
            denoise=denoise,
            **how,
        )
        if job.solver.across_rows:
            raise ValueError(f"{job.solver!r} takes means over its batch, so that requests would change each other.")
        request = _ModelRequest(job, callback)
        self.enqueue(request, timeout)
        return request

    def lane(self, job: Job) -> Lane:
        return Lane(job, self.batch_size, self._ended, self._failed)


class _ModelRequest(Request):
    """A request whose job is known before it waits."""

    def __init__(self, job: Job, callback: Callable[[EngineState], None] | None) -> None:
        super().__init__(len(job.index), job.noise.seed, callback)
        self.job = job

    def begin(self) -> Engine:
        return Engine(self.job)

    def whole(self) -> SampleResult:
        return with_range(self.engine._result(self.since), self.job)
