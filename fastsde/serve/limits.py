"""What a server grants a request."""

from __future__ import annotations

import dataclasses

from fastsde.checks import check_count, check_positive


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server grants a request; more is refused.

    Args:
        n: samples.
        nfe: network calls of a sample.
        rtol: the smallest tolerance.
        body: bytes of the request's body.
        seconds: how long a request may take, waiting included.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    n: int = 16
    nfe: int = 250
    rtol: float = 0.005
    body: int = 8 << 20
    seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("n", "nfe", "body"):
            check_count(name, getattr(self, name), 1)
        for name in ("rtol", "seconds"):
            check_positive(name, getattr(self, name))
