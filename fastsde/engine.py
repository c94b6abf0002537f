"""The one loop: slots, queue, accept, retire, refill, shrink.

A batch is a set of slots. Each slot holds one sample, at its own time and with its own step size. When a sample ends,
the next one of the queue takes its slot in the same turn; when the queue is empty, the batch shrinks. A sample that its
controller sends back starts again in its slot. No step waits for the slowest row, and no row reads another.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from fastsde.batching import all_finite, expand_like, select_rows, where_rows
from fastsde.control.base import Verdict
from fastsde.flags import LateFlags
from fastsde.job import EngineState, Job
from fastsde.noise import StepNoise
from fastsde.result import Interrupted, SampleResult, SamplingError, Status
from fastsde.score.base import BoundModel
from fastsde.solvers.base import Plan
from fastsde.types import Carry, State, Time

_T = TypeVar("_T")


class Row(enum.IntEnum):
    """What a row of the batch does, where it is no `Status` above PENDING, with which its sample has ended."""

    EMPTY = -2  # its sample has left and nobody took the slot: padding until the batch shrinks
    RESTART = -1
    ACTIVE = Status.PENDING


_AFTER = {
    Verdict.ACCEPT: Row.ACTIVE,
    Verdict.REJECT: Row.ACTIVE,
    Verdict.RESTART: Row.RESTART,
    Verdict.TOO_SHORT: Status.MIN_STEP,
    Verdict.NOT_FINITE: Status.NON_FINITE,
}
"""What a row does after a step that its controller has judged."""
_SIZES = 8
"""The batch shrinks through multiples of batch_size / 8, then halves of that: few sizes, so that what was made for a
size is reused, and the last samples do not pay for many empty rows."""


class Engine:
    """Runs one job. Rows are five groups of tensors with leading axis B: row, solver, control, noise and cond."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.n, self.device = len(job.index), job.index.device
        self.queue = iter(range(self.n))
        self.rows: dict[str, Carry] = {}
        self.live = 0
        self.empty: set[int] = set()
        self.flags = LateFlags(job.lag)
        self.pool: list[dict[str, Carry]] = []
        shape = (self.n, *job.noise.event_shape)
        self.lost = torch.nan if job.noise.dtype.is_floating_point else -1
        self.out: Carry = {"x": torch.full(shape, self.lost, dtype=job.noise.dtype, device=self.device)}
        for name in ("nfe", "accepted", "rejected", "status"):
            self.out[name] = torch.zeros(self.n, dtype=torch.int64, device=self.device)
        for name in job.solver.reports:
            self.out[name] = torch.full((self.n,), torch.nan, dtype=torch.float64, device=self.device)
        # Some solvers end with the denoised sample in hand.
        self.denoising_call = job.denoise and not job.solver.keeps_x_0
        # Above this many calls of a sample there are not enough left for a step and the denoising.
        self.most_nfe = job.max_nfe - job.model.calls * (job.solver.calls_per_step + self.denoising_call)
        self.after = torch.tensor([int(_AFTER[verdict]) for verdict in Verdict], device=self.device)
        self.plan: Plan | None = None
        self.turn = self.finished = self.nfe_finished = 0

    def run(self) -> SampleResult:
        """Samples until the queue is empty.

        Raises:
            Interrupted: at Ctrl-C; it carries what is finished.
            SamplingError: if anything fails after the first sample was finished; it carries the finished ones.
        """
        self.plan = self.job.plan()
        recorded = self.job.differentiable and torch.is_grad_enabled()
        with torch.set_grad_enabled(recorded), self.job.model.sampling():
            return self._run()

    def _run(self) -> SampleResult:
        start = time.perf_counter()
        try:
            self._loop()
            self._flush()
        except KeyboardInterrupt:
            try:
                self._pool_ended()
                self._flush()
            except KeyboardInterrupt:  # the second ends the denoising, too
                self._flush(denoise=False)
            raise Interrupted(self._result(start)) from None
        except Exception as error:
            self._pool_ended()
            if not self.finished:
                raise
            self._flush(denoise=False)
            result = self._result(start)
            raise SamplingError(
                f"sampling failed after {self.finished} of {self.n} samples ({type(error).__name__}: {error}); "
                f"they are in .result of this exception: {result.counts()}.",
                result,
            ) from error
        return self._result(start)

    def _loop(self) -> None:
        """Turns until every sample has ended."""
        self.rows = self._fresh_rows(list(islice(self.queue, self.job.batch_size)))
        self.live = len(self.rows["row"]["slot"])
        hidden = not self.job.progress
        with tqdm(total=self.n, desc="sample", unit="sample", miniters=0, disable=hidden) as bar:
            while self.live:
                if self.flags.read(self._turn()):
                    self._retire()
                # Every turn, so that the bar is alive before the first sample ends.
                mean_nfe = f"{self.nfe_finished / self.finished:.1f}" if self.finished else "-"
                bar.set_postfix(mean_nfe=mean_nfe, turn=self.turn, refresh=False)
                bar.update(self.finished - bar.n)
                if self.job.callback is not None:
                    self.job.callback(self._state())

    def _fresh_rows(self, places: list[int]) -> dict[str, Carry]:
        """Rows of the samples at the given places of the queue."""
        slots = torch.tensor(places, device=self.device)
        rows = self._at_start(slots)
        control = self.job.controller.init(rows["row"]["t"], self.job.t_end)
        return rows | {"control": control, "cond": select_rows(slots, self.job.cond)}

    def _at_start(self, slots: Tensor) -> dict[str, Carry]:
        """What a sample's start says of its row; position 0 is the warm-up turn."""
        job = self.job
        index = job.index[slots]
        x = job.sde.prior(job.noise.prior(index), job.t_start) if job.start is None else job.start(slots)
        t, t_end = (torch.full_like(index, end, dtype=torch.float64) for end in (job.t_start, job.t_end))
        zero = torch.zeros_like(index)
        if job.recorder is not None:
            job.recorder.start(slots, t, x)
        row = {"slot": slots, "index": index, "x": x, "t": t, "t_end": t_end, "status": zero}
        row |= {"nfe": zero, "attempt": zero, "position": zero if job.solver.warm_up else zero + 1}
        return {
            "row": {key: value.clone() for key, value in row.items()},
            "solver": job.solver.init(x),
            "noise": job.noise.start(index, t),
        }

    def _turn(self) -> Tensor:
        """One attempted step of every row; returns which rows have ended or start again, with shape (B,)."""
        job, rows = self.job, self.rows
        row, t_end = rows["row"], job.t_end
        self.turn += 1
        x, t, position, active = row["x"], row["t"], row["position"], row["status"] == Row.ACTIVE
        moving = active & (position > 0) if job.solver.warm_up else active
        control = rows["control"] | {"position": position}
        s = torch.where(moving, job.controller.target(t, t_end, control), t)
        if job.lag:
            self.flags.announce(moving & (s <= row["t_end"]))
        noise = StepNoise(job.noise, row["index"], row["attempt"], position, t, s, rows["noise"])
        model = job.model.bind(rows["cond"], active, row["nfe"])
        given = (model, job.sde, x, t, s, noise, rows["solver"])
        if self.plan is None:
            solver_step = partial(job.solver.step, *given)
        else:
            solver_step = partial(job.solver.planned_step, *given, self.plan.rows(job.controller.plan_row(control)))
        step = self._again_in_backward(solver_step)
        proposal = step.x if job.model.edit is None else step.x + job.model.edit
        s = s if step.s is None else torch.where(moving, step.s, t)
        decision = job.controller.update(t, s, t_end, step.error, step.scale, control)

        finite = all_finite(proposal) & ~torch.isnan(s)
        accept = active & finite & ((decision.verdict == Verdict.ACCEPT) | ~moving)
        row |= where_rows(accept, {"x": proposal, "t": s}, {"x": x, "t": t})
        rows["solver"] = where_rows(accept, step.carry, rows["solver"])
        rows["noise"] = where_rows(accept, noise.carry, rows["noise"])
        rows["control"] = where_rows(moving, decision.carry, rows["control"])
        row["nfe"] = model.nfe
        row["attempt"] = row["attempt"] + moving
        row["position"] = position + accept

        status = torch.where(moving, self.after[decision.verdict], row["status"])
        spent = active & (row["nfe"] > self.most_nfe) & (status <= Row.ACTIVE)
        status = status.masked_fill(spent, int(Status.MAX_NFE))
        status = status.masked_fill(active & ~finite, int(Status.NON_FINITE))
        row["status"] = status.masked_fill(accept & (s <= row["t_end"]), int(Status.SUCCESS))
        if job.recorder is not None:
            job.recorder.keep(row["slot"], accept & moving, s, row["x"])
        return (row["status"] > Row.ACTIVE) | (row["status"] == Row.RESTART)

    def _again_in_backward(self, evaluate: Callable[[], _T]) -> _T:
        """What `evaluate` returns; in a run with gradients it is evaluated again for the backward pass.

        So such a run keeps the state of each step, rather than all that the network computes in it.
        """
        if not torch.is_grad_enabled():
            return evaluate()

        def in_same_mode() -> _T:
            with self.job.model.sampling():  # by then the run has given the network its own mode back
                return evaluate()

        return checkpoint(in_same_mode, use_reentrant=False)

    def _pool_ended(self) -> None:
        """Moves every row that has ended to the pool: before an early end, also those whose flag was not read yet."""
        done = (self.rows["row"]["status"] > Row.ACTIVE).nonzero().flatten().tolist() if self.rows else []
        if done:
            self._finish(done)

    def _finish(self, done: list[int]) -> Tensor:
        """Takes the given ended rows out, to the result or first to the pool; returns their slots, now empty."""
        ids = torch.tensor(done, dtype=torch.int64, device=self.device)
        row = select_rows(ids, self.rows["row"])
        row["accepted"] = (row["position"] - 1).clamp(min=0)
        row["rejected"] = row["attempt"] - row["accepted"]
        row |= {name: self.rows["solver"][name].index_select(0, ids) for name in self.job.solver.reports}
        if self.job.denoise and self.job.solver.keeps_x_0:
            row["x"] = self.rows["solver"]["x_0"].index_select(0, ids)
        if self.denoising_call:
            self.pool.append({"row": row, "cond": select_rows(ids, self.rows["cond"])})
        else:
            self._put(row)
        self.rows["row"]["status"].index_fill_(0, ids, int(Row.EMPTY))
        self.finished += len(done)
        self.nfe_finished += int(row["nfe"].sum())
        if self.denoising_call:  # last, because a model may fail to tell what its call will cost
            last_call = self.job.model.cost(row["t"], self.pool[-1]["cond"]) * (row["status"] != Status.NON_FINITE)
            self.nfe_finished += int(last_call.sum())
        return ids

    def _write(self, ids: Tensor, fresh: dict[str, Carry]) -> None:
        """Puts fresh rows into the given slots."""
        for group, values in fresh.items():
            # Not in place: what a solver returned may be one tensor under two names.
            rows = self.rows[group]
            rows |= {key: rows[key].index_copy(0, ids, values[key].to(rows[key].dtype)) for key in values}

    def _retire(self) -> None:
        """Moves ended rows to the pool, gives their slots to the queue, shrinks the batch when it can."""
        self.flags.clear()
        status = self.rows["row"]["status"].tolist()
        again = [i for i, value in enumerate(status) if value == Row.RESTART]
        if again:  # their calls, their attempts and what the controller knows stay
            ids = torch.tensor(again, device=self.device)
            fresh = self._at_start(self.rows["row"]["slot"].index_select(0, ids))
            del fresh["row"]["nfe"], fresh["row"]["attempt"]
            self._write(ids, fresh)
        done = [i for i, value in enumerate(status) if value > Row.ACTIVE]
        if not done:
            return
        ids = self._finish(done)
        if sum(len(part["row"]["slot"]) for part in self.pool) >= self.job.batch_size:
            self._flush()

        slots = list(islice(self.queue, len(done)))
        if slots:
            self._write(ids[: len(slots)], self._fresh_rows(slots))
        self.empty.update(done[len(slots) :])
        self.live += len(slots) - len(done)
        self._shrink()

    def _shrink(self) -> None:
        """Drops empty rows once the live ones fit into the next of the few fixed sizes."""
        width = len(self.rows["row"]["slot"])
        unit = 1 if self.job.model.per_row else -(-self.job.batch_size // _SIZES)
        size = -(-self.live // unit) * unit
        while self.live <= -(-size // 2) < size <= unit:
            size = -(-size // 2)
        if not self.empty or not 0 < size < width:
            return
        live = [i for i in range(width) if i not in self.empty]
        keep = live + sorted(self.empty)[: size - len(live)]
        self.rows = selected(torch.tensor(keep, device=self.device), self.rows)
        self.empty = set(range(len(live), size))

    def _flush(self, *, denoise: bool = True) -> None:
        """Denoises the pooled samples, a full batch at a time, and writes them to their place in the result."""
        if not self.pool:
            return
        pool = joined(self.pool)
        ids = torch.arange(len(pool["row"]["slot"]), device=self.device)
        self.pool = [selected(part, pool) for part in ids.split(self.job.batch_size)]
        while self.pool:
            row, cond = dict(self.pool[0]["row"]), self.pool[0]["cond"]
            if denoise:
                model = self.job.model.bind(cond, row["status"] != Status.NON_FINITE, row["nfe"])
                row["x"] = self._again_in_backward(partial(_denoised, model, row["x"], row["t"]))
                row["nfe"] = model.nfe
            else:
                raw = row["status"] == Status.SUCCESS
                row["status"] = row["status"].masked_fill(raw, int(Status.NOT_DENOISED))
            self._put(row)
            self.pool.pop(0)  # only now, so that a call that fails or is interrupted loses no finished sample

    def _put(self, row: Carry) -> None:
        """Writes final states to their places in the result."""
        lost = (row["status"] == Status.NON_FINITE) | ~all_finite(row["x"])
        row["status"] = row["status"].masked_fill(lost, int(Status.NON_FINITE))
        row["x"] = row["x"].masked_fill(expand_like(lost, row["x"]), self.lost)
        for key, out in self.out.items():
            out.index_copy_(0, row["slot"], row[key].to(out.dtype))
        if self.job.finished is not None:
            self.job.finished(row["slot"], row["x"], row["status"])

    def _state(self) -> EngineState:
        row = self.rows["row"]
        x_0 = self.rows["solver"]["x_0"].clone() if self.job.solver.keeps_x_0 else None
        index, x, t, nfe = (row[key].clone() for key in ("index", "x", "t", "nfe"))
        return EngineState(self.turn, self.finished, index, x, t, nfe, x_0)

    def _result(self, start: float) -> SampleResult:
        job, seconds = self.job, time.perf_counter() - start
        x, nfe, accepted, rejected, status = (self.out[k] for k in ("x", "nfe", "accepted", "rejected", "status"))
        paths = None if job.recorder is None else job.recorder.paths()
        report = {name: self.out[name] for name in job.solver.reports} or None
        return SampleResult(x, nfe, accepted, rejected, status, job.index, job.noise.seed, seconds, paths, None, report)


def _denoised(model: BoundModel, x_t: State, t: Time) -> State:
    return model(x_t, t).x_0


def selected(ids: Tensor, rows: dict[str, Carry]) -> dict[str, Carry]:
    """The given rows of a batch."""
    return {group: select_rows(ids, values) for group, values in rows.items()}


def joined(parts: Sequence[dict[str, Carry]]) -> dict[str, Carry]:
    """The rows of several batches as one."""
    return {g: {k: torch.cat([part[g][k] for part in parts]) for k in values} for g, values in parts[0].items()}
