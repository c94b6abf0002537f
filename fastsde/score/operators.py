"""Linear maps of measurements: what is known of a sample, and how to go back from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fastsde.batching import expand_like, row_dot
from fastsde.checks import check_count, check_instance, check_kind, check_tensor
from fastsde.types import State

_AGREE = 1e-3
"""How far <A x, y> and <x, A^T y> may differ, relative to |A x| |y|: single precision, and sums of a million terms."""


class LinearOperator(ABC):
    """A linear map A from x with shape (B, *event) to y with shape (B, *measurement), the same for every row."""

    @abstractmethod
    def __call__(self, x: State) -> Tensor:
        """A x, with shape (B, *measurement)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, with shape (B, *event)."""

    @abstractmethod
    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y, the smallest of the x that come closest to A x = y, with shape (B, *event)."""

    def residual(self, y: Tensor, x: State) -> Tensor:
        """y - A x, with shape (B, *measurement).

        Raises:
            ValueError: if y does not have the shape of A x.
        """
        made = self(x)
        _same_shape(y, made)
        return y - made

    def count(self, y: Tensor) -> int:
        """How many numbers one measurement holds."""
        return math.prod(y.shape[1:])

    def check(self, y: Tensor, event: tuple[int, ...]) -> None:
        """Refuses, with a ValueError, measurements of the wrong shape, and a map that is not linear or has another
        adjoint than it says, as far as one random pair can tell.

        Args:
            y: measurements, with shape (n, *measurement).
            event: shape of one sample.
        """
        generator = torch.Generator().manual_seed(0)
        x, v = (
            torch.randn(1, *shape, generator=generator, dtype=torch.float64).to(y) for shape in (event, y.shape[1:])
        )
        self.residual(v, x)
        made, back = self(x), self.adjoint(v)
        if back.shape != x.shape:
            raise ValueError(f"the adjoint must return shape {tuple(x.shape)}; it returned {tuple(back.shape)}.")
        norm = float(made.norm() * v.norm())
        if self(torch.zeros_like(x)).any() or abs(float((made * v).sum() - (x * back).sum())) > _AGREE * norm:
            raise ValueError(f"{type(self).__name__} must be linear: A 0 = 0 and <A x, y> = <x, A^T y>; it is not.")


class Mask(LinearOperator):
    """Inpainting: the known elements. A measurement has the shape of a sample, and is not read where nothing is known.

    Args:
        mask: 1 or True where x is known, with shape event, or one that broadcasts to it: (1, height, width) for images;
            a tensor or an array. It holds for all samples of a call.

    Raises:
        ValueError: if the mask holds anything but 0 and 1, or knows nothing.
    """

    def __init__(self, mask: Tensor) -> None:
        try:
            mask = torch.as_tensor(mask)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"mask must be a tensor or an array; got {type(mask).__name__}.") from error
        check_tensor("mask", mask)
        self.known = mask.bool()
        if not (mask == self.known).all() or not self.known.any():
            raise ValueError("mask must hold 0 (unknown) and 1 (known), at least one of them known.")

    def __call__(self, x: Tensor) -> Tensor:
        known, event = self.known.to(x.device), tuple(x.shape[1:])
        fits = known.ndim <= len(event) and all(
            m in (1, e) for m, e in zip(known.shape, event[len(event) - known.ndim :], strict=True)
        )
        if not fits:
            raise ValueError(
                f"mask must broadcast to the shape of one sample, {event}; got {tuple(known.shape)}. The mask is for "
                "all samples. For different masks call sample once for each (with index=, for the same noise)."
            )
        return torch.where(known, x, torch.zeros_like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    pinv = adjoint

    def residual(self, y: Tensor, x: State) -> Tensor:
        _same_shape(y, x)
        return self(y - x)

    def count(self, y: Tensor) -> int:
        return int(self.known.expand(y.shape[1:]).sum())


class Grayscale(LinearOperator):
    """Colourisation: the mean over channels, the first axis of the event; a measurement has shape (1, *rest).

    Args:
        channels: how many channels a sample has.

    Raises:
        ValueError: if `channels` is below 1; later, if a sample has another number of them.
    """

    def __init__(self, channels: int = 3) -> None:
        self.channels = check_count("channels", channels, 1)

    def __call__(self, x: State) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"a sample must have {self.channels} channels first; got shape {tuple(x.shape[1:])}.")
        return x.mean(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.pinv(y) / self.channels

    def pinv(self, y: Tensor) -> Tensor:
        return y.expand(-1, self.channels, *y.shape[2:])


class Linear(LinearOperator):
    """Any linear map: blur, subsampling, a projection.

    Args:
        forward: `forward(x)`, with x of shape (B, *event) and the result of shape (B, *measurement), row by row.
        event_shape: shape of one sample.
        adjoint: `adjoint(y)`, A^T; by default by automatic differentiation of `forward`.
        pinv: `pinv(y)`, A^+; by default by conjugate gradients on A^T A x = A^T y for each row. They start at 0, so
            they find the smallest solution; in exact arithmetic after as many steps as A has singular values, and
            before that one without the directions that A damps most.
        iterations: most conjugate gradient steps.

    Raises:
        TypeError: if a map cannot be called.
        ValueError: if `iterations` is below 1.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        event_shape: tuple[int, ...],
        *,
        adjoint: Callable[[Tensor], Tensor] | None = None,
        pinv: Callable[[Tensor], Tensor] | None = None,
        iterations: int = 100,
    ) -> None:
        check_instance("forward", forward, Callable, "callable on a batch")
        check_kind("adjoint", adjoint, Callable, "callable on a batch")
        check_kind("pinv", pinv, Callable, "callable on a batch")
        self.iterations = check_count("iterations", iterations, 1)
        self.forward, self.event_shape = forward, tuple(event_shape)
        self._adjoint, self._pinv = adjoint, pinv

    def __call__(self, x: State) -> Tensor:
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"event_shape of Linear is {self.event_shape}; it got {tuple(x.shape[1:])}.")
        return self.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        if self._adjoint is not None:
            return self._adjoint(y)
        with torch.enable_grad():
            x = torch.zeros(len(y), *self.event_shape, dtype=y.dtype, device=y.device, requires_grad=True)
            return torch.autograd.grad(self.forward(x), x, y)[0]

    def pinv(self, y: Tensor) -> Tensor:
        if self._pinv is not None:
            return self._pinv(y)
        return conjugate_gradients(lambda x: self.adjoint(self(x)), self.adjoint(y), self.iterations)


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solves C x = b for each row by itself, from x = 0, with C symmetric and not negative.

    A row stops when its residual is a few roundings of b, and where C turns out to have a negative direction. Source:
    Hestenes and Stiefel 1952, https://doi.org/10.6028/jres.049.044.

    `product` gives C x for x with the shape of b, (B, ...), in at most so many `iterations`.
    """
    x, r, p, size = torch.zeros_like(b), b, b, row_dot(b, b)
    enough = size * (4 * torch.finfo(b.dtype).eps) ** 2
    for _ in range(iterations):
        going = size > enough
        if not going.any():
            break
        product_p = product(p)
        curvature = row_dot(p, product_p)
        going = going & (curvature > 0)
        step = expand_like(going * size / torch.where(going, curvature, 1.0), b)
        x, r = x + step * p, r - step * product_p
        before, size = size, going * row_dot(r, r)
        p = r + expand_like(size / torch.where(going, before, 1.0), b) * p
    return x


def _same_shape(y: Tensor, made: Tensor) -> None:
    if y.shape[1:] != made.shape[1:]:
        raise ValueError(
            f"the measurement of one sample must have shape {tuple(made.shape[1:])}, that of A x; "
            f"got {tuple(y.shape[1:])}."
        )
