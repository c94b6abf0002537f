"""What sampling returns."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch
from torch import Tensor


class Status(enum.IntEnum):
    """How a sample ended.

    PENDING: not finished; sampling was interrupted. Its row of `samples` is NaN; of tokens it is -1.
    SUCCESS: reached t_min.
    MAX_NFE: needed more calls than `max_nfe`; the sample is the denoised state where it stopped. Tokens
        that were still masked are -1.
    MIN_STEP: the tolerance asked for a step below the smallest one; the sample is the denoised state where it stopped.
    NON_FINITE: the network or the step gave NaN or infinity. Its row of `samples` is NaN; of tokens it is -1.
    NOT_DENOISED: reached t_min, but the run failed or was interrupted before the denoising call; the sample is the
        state at t_min.
    STOPPED: a callback stopped its pipeline; the output is the pipeline's. Its row of `samples` is NaN.
    FAILED: memory was too small, even for this sample alone. Its row of `samples` is NaN.
    """

    PENDING = 0
    SUCCESS = 1
    MAX_NFE = 2
    MIN_STEP = 3
    NON_FINITE = 4
    NOT_DENOISED = 5
    STOPPED = 6
    FAILED = 7


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The intermediate states of one sample.

    Attributes:
        t: times in the order they were reached, in float64, with shape (k,).
        x: the states there, with shape (k, *event).
    """

    t: Tensor
    x: Tensor


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """Samples and the cost of each, in the order in which they were asked for.

    Attributes:
        samples: with shape (n, *event).
        nfe: network calls of each sample, with shape (n,).
        accepted: accepted steps, with shape (n,).
        rejected: rejected steps, with shape (n,). Steps before a sample started again are included.
        status: a `Status` for each sample, with shape (n,).
        index: the sample number: (seed, index) determines the sample. With shape (n,).
        seed: the seed.
        seconds: wall time of the whole run.
        trajectory: the intermediate states of each sample, if they were asked for.
        outside: which samples left the range of the data, with shape (n,): more than 1 % of their elements are farther
            from the middle of the model's `data_range` than its width. None if the samples are not data, or if the run
            was interrupted or failed.
        report: further numbers of each sample that its solver reports, by name, each with shape (n,).
    """

    samples: Tensor
    nfe: Tensor
    accepted: Tensor
    rejected: Tensor
    status: Tensor
    index: Tensor
    seed: int
    seconds: float
    trajectory: list[Trajectory] | None = None
    outside: Tensor | None = None
    report: dict[str, Tensor] | None = None

    @property
    def success(self) -> Tensor:
        """Which samples reached t_min, with shape (n,)."""
        return self.status == Status.SUCCESS

    def counts(self) -> dict[str, int]:
        """How many samples ended with each status; statuses that did not occur are left out."""
        return {s.name: c for s in Status if (c := int((self.status == s).sum()))}

    def __repr__(self) -> str:
        nfe = self.nfe[self.status != Status.PENDING].double()
        spread = f"{nfe.mean():.1f} (max {int(nfe.max())})" if len(nfe) else "none"
        left = 0 if self.outside is None else int(self.outside.sum())
        return (
            f"SampleResult(samples={tuple(self.samples.shape)}, nfe={spread}, rejected={int(self.rejected.sum())} of "
            f"{int(self.accepted.sum() + self.rejected.sum())} steps, status={self.counts()}, "
            f"{f'{left} outside of the data range, ' if left else ''}seed={self.seed}, {self.seconds:.1f} s)"
        )


# So that torch.load, which opens nothing it does not know, opens a result that torch.save has written.
torch.serialization.add_safe_globals([SampleResult, Status, Trajectory])


class DataRangeWarning(UserWarning):
    """Samples left the range of the data: too few calls, or a network that is read in a wrong way."""


class RepeatedSeedWarning(UserWarning):
    """The same start states and noise come again, because no seed was given."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during sampling: a `KeyboardInterrupt`, so that loops around it end.

    Attributes:
        result: everything finished before it, with the type that the interrupted function returns.
    """

    def __init__(self, result: Any) -> None:
        super().__init__("interrupted; what is finished is in .result of this exception.")
        self.result = result


class SamplingError(RuntimeError):
    """Sampling failed after some samples were finished.

    Attributes:
        result: everything finished before the failure. The cause is in `__cause__`.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it comes out of another process."""
        return type(self), (str(self), self.result)
