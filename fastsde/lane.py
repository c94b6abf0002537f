"""A batch that samples of many requests share: `Sampler` lets it turn.

The engine runs a batch in which each row has its own time. So a row may belong to any request. The rows of a request
are made from the request's own job, as `sample` makes it, and its samples are written to its own result.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable, Container, Generator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from fastsde.batching import select_rows
from fastsde.control.base import Controller, Decision
from fastsde.engine import Engine, Row, joined, selected
from fastsde.job import EngineState, Job
from fastsde.solvers.base import Plan
from fastsde.types import Carry, Index, State, Time


class Request(Future[Any]):
    """What `submit` of a sampler returns: a future with the result.

    `request.result()` waits for it, `await request` does so in a coroutine. `request.cancel()` takes its samples out of
    queue and batch before the next turn.

    Attributes:
        n: number of samples.
        seed: the seed of their noise.
    """

    def __init__(self, n: int, seed: int, callback: Callable[[EngineState], None] | None) -> None:
        super().__init__()
        self.n, self.seed, self.callback = n, seed, callback
        self.begun, self.left, self.since = 0, n, time.perf_counter()

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine that makes its rows and has its result; it begins at its first use, in the sampler's thread."""
        return self.begin()

    def begin(self) -> Engine:
        """A fresh `engine`."""
        raise NotImplementedError

    def whole(self) -> Any:
        """Its result, when all samples have ended."""
        raise NotImplementedError

    def close(self, *, others: bool) -> None:
        """Told when it has ended in any way, and whether others still run; in the thread of the sampler."""


class _Grids(Controller):
    """The grids of a lane, one after another, of which each place walks one. Plans of steps are in the same order.

    Attributes:
        times: the times of all grids; the last of each twice, for rows that have ended.
        begin: where the grid of each place begins, with shape (places,).
    """

    adaptive = False

    def __init__(self, places: int, device: torch.device) -> None:
        self.times = torch.zeros(1, dtype=torch.float64, device=device)
        self.begin = torch.zeros(places, dtype=torch.int64, device=device)

    def plan_row(self, carry: Carry) -> Index:
        # A row whose sample has left still reads one.
        return (self.begin.take(carry["place"]) + carry["position"]).clamp(max=len(self.times) - 1)

    def init(self, t: Time, t_end: float) -> Carry:
        raise NotImplementedError("a lane knows the places of its rows")

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        return self.times.take(self.plan_row(carry))

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        return Decision(torch.zeros_like(carry["position"]), {"place": carry["place"]})


class Lane(Engine):
    """A batch of samples of several requests, whose jobs have the same solver, process and kind of noise.

    To the engine a sample is its place, from 0 to `places` - 1. A place is free again when its sample has ended.

    Args:
        job: the first job.
        places: how many samples there may be.
        ended: told of ended samples: their request and their rows, which are of its job again.
        failed: told of a request that failed.
        any_model: whether the first job's model stands for those of all others.
    """

    def __init__(
        self,
        job: Job,
        places: int,
        ended: Callable[[Request, Carry], None],
        failed: Callable[[Request, BaseException], None],
        *,
        any_model: bool = False,
    ) -> None:
        self.any_model = any_model
        self.first, self.ended, self.failed = job, ended, failed
        self.owners: list[tuple[Request, int] | None] = [None] * places
        device = job.index.device
        self.numbers = torch.zeros(places, dtype=torch.int64, device=device)
        self.words = torch.zeros(2, places, dtype=torch.int64, device=device)
        self.grids = _Grids(places, device) if len(job.controller.all_grids()) == 1 else None
        self.begins: dict[tuple[float, ...], int] = {}
        self.plans: dict[tuple[float, ...], Plan | None] = {}
        self.waiting: list[tuple[Request, Tensor, Tensor]] = []
        self.width = 0
        super().__init__(
            dataclasses.replace(
                job,
                controller=self.grids or job.controller,
                noise=job.noise.at_places(self.numbers, self.words),
                index=torch.arange(places, device=device),
                batch_size=places,
                start=None,
            )
        )
        self.queue = iter(())
        if self.grids is None:
            self.plan = job.plan()

    def takes(self, job: Job) -> bool:
        """Whether rows of a job can be rows of this batch."""
        first = self.first
        alike = job.solver == first.solver and _signature(job) == _signature(first)
        alike = alike and (self.any_model or job.model is first.model)
        if self.grids is None:
            return alike and job.controller == first.controller
        return alike and len(job.controller.all_grids()) == 1

    def requests(self) -> list[Request]:
        """Those that have samples here."""
        return list(dict.fromkeys(owner[0] for owner in self.owners if owner is not None))

    def admit(self, request: Request, count: int) -> None:
        """Gives the next samples of a request a place each. They join the batch with the next turn."""
        engine, numbers = request.engine, range(request.begun, request.begun + count)
        job = engine.job
        places = [place for place, owner in enumerate(self.owners) if owner is None][:count]
        ids = torch.tensor(places, device=self.device)
        slots = torch.tensor(numbers, device=self.device)
        self.numbers[ids] = job.index[slots]
        self.words[:, ids] = torch.tensor([[job.noise.seed & 0xFFFFFFFF], [job.noise.seed >> 32]], device=self.device)
        for place, k in zip(places, numbers, strict=True):
            self.owners[place] = request, k
        if self.grids is not None:
            self._walk(ids, job)
        self.most_nfe = max(self.most_nfe, engine.most_nfe)
        self.waiting.append((request, slots, ids))
        self.live += count
        request.begun += count

    def _walk(self, ids: Tensor, job: Job) -> None:
        """Lets the given places walk the grid of a job. Of the grids, those that are in use stay."""
        assert self.grids is not None
        if _times(job) not in self.begins:
            jobs = {_times(of): of for of in (owner[0].engine.job for owner in self.owners if owner is not None)}
            lengths = [len(times) + 1 for times in jobs]
            self.begins = {times: sum(lengths[:k]) for k, times in enumerate(jobs)}
            self.plans = {times: self.plans[times] if times in self.plans else of.plan() for times, of in jobs.items()}
            ends = [torch.tensor([*times, times[-1]], dtype=torch.float64) for times in jobs]
            self.grids.times = torch.cat(ends).to(self.device)
            begin = [0 if owner is None else self.begins[_times(owner[0].engine.job)] for owner in self.owners]
            self.grids.begin = torch.tensor(begin, device=self.device)
            plans = [plan for plan in self.plans.values() if plan is not None]
            self.plan = Plan.joined(plans) if plans else None
        self.grids.begin[ids] = self.begins[_times(job)]

    def _join(self) -> None:
        """Lets samples that wait join the batch, in empty slots, and wider if there are too few.

        All at once: to draw the start of one takes as long as that of many, and the rows of the batch are copied.
        """
        waiting, self.waiting = self.waiting, []
        drawn = [part for part in waiting if part[0].engine.job.start is None]
        parts = [self._from_prior(drawn)] if drawn else []
        for request, slots, ids in waiting:
            if request.engine.job.start is None:
                continue
            try:
                fresh = request.engine._fresh_rows(slots.tolist())
            except BaseException as error:  # noqa: BLE001 - of this request's start alone
                self.live -= len(ids)
                self.failed(request, error)
                continue
            fresh["row"] |= {"slot": ids, "index": ids}
            parts.append(fresh if self.grids is None else fresh | {"control": {"place": ids}})
        self.flags.clear()
        if not parts:
            return
        fresh = joined(parts)
        count, free = len(fresh["row"]["slot"]), sorted(self.empty)
        free = free[:count]
        if free:
            part = torch.arange(len(free), device=self.device)
            self._write(torch.tensor(free, device=self.device), selected(part, fresh))
            self.empty.difference_update(free)
        if len(free) < count:
            part = torch.arange(len(free), count, device=self.device)
            rest = selected(part, fresh)
            self.rows = joined([self.rows, rest]) if self.rows else rest

    def _from_prior(self, drawn: list[tuple[Request, Tensor, Tensor]]) -> dict[str, Carry]:
        """Rows of samples that start from the prior, of several requests."""
        ids = torch.cat([ids for _, _, ids in drawn])
        rows = super()._at_start(ids)
        jobs = [(request.engine.job, slots) for request, slots, _ in drawn]
        t = [torch.full(slots.shape, job.t_start, dtype=torch.float64, device=self.device) for job, slots in jobs]
        t_end = [torch.full_like(one, job.t_end) for one, (job, _) in zip(t, jobs, strict=True)]
        rows["row"] |= {"t_end": torch.cat(t_end)}
        rows["cond"] = joined([{"cond": select_rows(slots, job.cond)} for job, slots in jobs])["cond"]
        rows["control"] = {"place": ids} if self.grids else self.job.controller.init(torch.cat(t), self.job.t_end)
        return rows

    def advance(self) -> None:
        """One turn. What fails is tried again for each request alone, and a request that fails alone is told so."""
        self.width = 0
        if self.waiting:
            self._join()
        if not self.rows:
            return
        self.width = len(self.rows["row"]["slot"])
        try:
            with self.job.model.sampling():
                ended = self.flags.read(self._turn())
        except BaseException as error:  # noqa: BLE001 - it goes to the requests that it is of
            self._turn_apart(error)
            ended = True
        if self.rows and any(request.callback for request in self.requests()):
            self._tell()
        if ended and self.rows:
            self._retire()
        if self.pool:
            self._flush()

    def _by_request(self, slots: Tensor, skip: Container[int] = ()) -> dict[Request, Tensor]:
        """Which rows are of which request; `slots` has the place of each, with shape (B,), `skip` those of none."""
        found: dict[Request, list[int]] = {}
        for k, place in enumerate(slots.tolist()):
            owner = self.owners[place]
            if owner is not None and k not in skip:
                found.setdefault(owner[0], []).append(k)
        return {request: torch.tensor(rows, device=self.device) for request, rows in found.items()}

    def _turn_apart(self, error: BaseException) -> None:
        """A turn of each request's rows alone, after one of all together has failed."""
        self.flags.clear()
        rows, parts = self.rows, []
        mine = self._by_request(rows["row"]["slot"], self.empty)
        for request, ids in mine.items():
            self.rows = selected(ids, rows)
            try:
                if len(mine) == 1:
                    raise error
                with self.job.model.sampling():
                    self._turn()
            except BaseException as own:  # noqa: BLE001 - likewise
                self.rows = {}
                self.failed(request, own)
            else:
                parts.append(self.rows)
        self.rows, self.empty = joined(parts) if parts else {}, set()
        self.live = len(self.rows["row"]["slot"]) if parts else 0

    def _tell(self) -> None:
        """Calls back, each with the rows of its request."""
        row, failed = self.rows["row"], []
        for request, ids in self._by_request(row["slot"], self.empty).items():
            if request.callback is None:
                continue
            index = self.numbers.take(row["slot"].index_select(0, ids))
            x, t, nfe = (row[key].index_select(0, ids) for key in ("x", "t", "nfe"))
            x_0 = self.rows["solver"]["x_0"].index_select(0, ids) if self.job.solver.keeps_x_0 else None
            try:
                request.callback(EngineState(self.turn, request.n - request.left, index, x, t, nfe, x_0))
            except BaseException as error:  # noqa: BLE001 - of this request alone
                failed.append((request, error))
        for request, own in failed:  # only now, as rows move
            self.failed(request, own)

    def drop(self, request: Request) -> None:
        """Takes the samples of a request out of the batch."""
        places = {place for place, owner in enumerate(self.owners) if owner is not None and owner[0] is request}
        if not places:
            return
        if self.rows:
            slots = self.rows["row"]["slot"].tolist()
            rows = [k for k, slot in enumerate(slots) if slot in places and k not in self.empty]
            self.flags.clear()
            ids = torch.tensor(rows, dtype=torch.int64, device=self.device)
            self.rows["row"]["status"].index_fill_(0, ids, int(Row.EMPTY))
            self.empty.update(rows)
            self.live -= len(rows)
            self._shrink()
        for place in places:
            self.owners[place] = None

    def _put(self, row: Carry) -> None:
        mine: dict[Request, list[tuple[int, int]]] = {}
        for k, place in enumerate(row["slot"].tolist()):
            owner, self.owners[place] = self.owners[place], None
            if owner is not None:
                mine.setdefault(owner[0], []).append((k, owner[1]))
        for request, found in mine.items():
            ids, numbers = torch.tensor(found, device=self.device).T
            self.ended(request, select_rows(ids, row) | {"slot": numbers})

    def _at_start(self, slots: Tensor) -> dict[str, Carry]:
        parts = []
        for place in slots.tolist():
            owner = self.owners[place]
            assert owner is not None
            parts.append(owner[0].engine._at_start(torch.tensor([owner[1]], device=self.device)))
        rows = joined(parts)
        rows["row"] |= {"slot": slots, "index": slots}
        return rows

    def _flush(self, *, denoise: bool = True) -> None:
        try:
            super()._flush(denoise=denoise)
        except BaseException as error:  # noqa: BLE001 - as in a turn
            rows = joined(self.pool)
            mine = self._by_request(rows["row"]["slot"])
            for request, ids in mine.items():
                self.pool = [selected(ids, rows)]
                try:
                    if len(mine) == 1:
                        raise error
                    super()._flush(denoise=denoise)
                except BaseException as own:  # noqa: BLE001 - likewise
                    self.failed(request, own)
            self.pool = []


def _times(job: Job) -> tuple[float, ...]:
    """The times of the one grid of a job."""
    return tuple(job.controller.all_grids()[0].times.tolist())


def _signature(job: Job) -> tuple[Any, ...]:
    """What samples that share a batch have in common, besides solver and controller."""
    noise, ends = job.noise, (getattr(job.sde, "t_min", None), getattr(job.sde, "t_max", None))
    cond = {key: (value.shape[1:], value.dtype) for key, value in job.cond.items()}
    shape = (noise.event_shape, noise.dtype, job.index.device)
    fixed = () if job.controller.all_grids() else (job.t_start, job.t_end)
    return type(noise), shape, ends, cond, job.denoise, fixed
