r"""Noise as a function of (seed, sample, time): counter-based streams, and a Brownian path on top of them.

Nothing here has a state that advances. Every number is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC'11, https://doi.org/10.1145/2063384.2063405) of the key `seed` and the counter

    (block of the event, sample index, position, purpose and level)

so a sample sees the same noise in any slot, batch, order or process. The bits are equal on every device; the normals
made from them (Box and Muller 1958) are equal up to the rounding of the device's logarithm and cosine.
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.types import Carry, Coef, Index, State, Time

_WORD = 0xFFFFFFFF
_PRIOR, _STEP, _ROOT, _NODE, _LEAF, _EXTRA, _UNIFORM = range(7)
"""Purposes, in the low byte of the last counter word; the level of a node, or the number of a further draw, above."""
RESOLUTION = 2.0**-16
"""Smallest step, as a share of the time range, over which a `BrownianPath` has the right variance."""
ALL_NOISE = 10.0
"""sigma / alpha from which on nothing is seen yet of data within [-1, 1] or so."""
_CHUNK, _CHUNK_ON_DEVICE = 1 << 19, 1 << 22
"""Normals made at a time: few enough to stay in a processor's cache, many enough to hide the cost of a call."""
_Key = tuple[int, int] | tuple[Tensor, Tensor]


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: _Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox4x32-10 bijection on 32-bit words held in int64 tensors.

    Args:
        counter: four words in [0, 2^32), of broadcastable shapes.
        key: two words in [0, 2^32), or tensors of them that broadcast against the counter.

    Returns:
        Four words in [0, 2^32), of the broadcast shape.
    """
    shape = np.broadcast_shapes(*(word.shape for word in counter))  # torch's takes 20 us, and 0.4 s at first
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for turn in range(10):
        # The products wrap around in int64, which leaves their bits, all we use, as they are in uint64.
        if turn < 2:  # cheap while words have fewer elements than all of them together
            p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c2 = (p1 >> 32 ^ c1 ^ k0) & _WORD, (p0 >> 32 ^ c3 ^ k1) & _WORD
        else:
            torch.mul(c0, 0xD2511F53, out=p0)
            torch.mul(c2, 0xCD9E8D57, out=p1)
            torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
            torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        # The low words are the new c1 and c3; the high ones are masked off above, and at the end.
        c1, c3, p0, p1 = p1, p0, c3, c1
        if turn == 1:  # from here on in six buffers: fresh memory would cost as much as the arithmetic
            c0, c1, c2, c3 = (word.expand(shape).contiguous() for word in (c0, c1, c2, c3))
            p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def _normals(key: _Key, index: Tensor, position: Tensor, purpose: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Standard normals with shape (B, L, size): index (B,), position (B, L), purpose (L,)."""
    block = torch.arange((size + 3) // 4, device=index.device)
    counter = (block, index[:, None, None], position[:, :, None], purpose[None, :, None])
    words = philox4x32(counter, key)
    # Single precision for every dtype, so that a float64 run sees the same noise as a float32 run.
    u0, u1, u2, u3 = (w.float().add_(0.5).mul_(2.0**-32) for w in words)
    out = torch.empty(*u0.shape[:2], 4, u0.shape[2], dtype=torch.float32, device=index.device)
    for k, (radial, angular) in enumerate(((u0, u1), (u2, u3))):
        radius, angle = radial.log_().mul_(-2).sqrt_(), angular.mul_(2 * math.pi)
        torch.cos(angle, out=out[:, :, 2 * k]).mul_(radius)
        torch.mul(radius, angle.sin_(), out=out[:, :, 2 * k + 1])
    return out.flatten(2)[:, :, :size].to(dtype)


def _uniforms(key: _Key, index: Tensor, position: Tensor, purpose: int, size: int) -> Tensor:
    """Float64 uniforms with shape (B, 1, size): index (B,), position (B,). Number l does not depend on `size`."""
    block = torch.arange((size + 1) // 2, device=index.device)
    word = torch.full((1, 1, 1), purpose, device=index.device)
    w0, w1, w2, w3 = philox4x32((block, index[:, None, None], position[:, None, None], word), key)
    # (k + 1/2) 2^-52 is a float64 for every k of 52 bits, and neither 0 nor 1, so that a logarithm of it is finite.
    pairs = [((high >> 6) << 26 | low >> 6).double().add_(0.5).mul_(2.0**-52) for high, low in ((w0, w1), (w2, w3))]
    return torch.stack(pairs, -1).flatten(2)[:, :, :size]


_N = TypeVar("_N", bound="Noise")


class Noise(ABC):
    """The noise of a sampling run: start states, increments of Brownian motion over steps, and uniforms.

    Args:
        seed: in [0, 2^64); the key of all streams.
        event_shape: shape of one sample.
        dtype: dtype of the states, and of the normals.
    """

    def __init__(self, seed: int, event_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2^64); got {seed}.")
        self.seed, self.event_shape, self.dtype = seed, event_shape, dtype
        self.size = math.prod(event_shape)
        self._places: tuple[Tensor, Tensor] | None = None

    def at_places(self: _N, numbers: Index, words: Tensor) -> _N:
        """The same for samples of several seeds in one batch. Its index k means sample numbers[k] of its own seed.

        `numbers` has shape (places,), and `words`, the low and the high 32 bits of each seed, (2, places). Both are
        read whenever noise is drawn.
        """
        shared = copy.copy(self)
        shared._places = numbers, words
        return shared

    def _streams(self, index: Index) -> tuple[_Key, Index]:
        """The keys and the sample numbers of the given samples."""
        if self._places is None:
            return (self.seed & _WORD, self.seed >> 32), index
        numbers, words = self._places
        low, high = words[:, index, None, None]
        return (low, high), numbers[index]

    def _draw(self, index: Index, position: Tensor, purpose: int) -> State:
        word = torch.full((1,), purpose, device=index.device)  # filled there: a copy would wait for the device
        key, number = self._streams(index)
        z = _normals(key, number, position[:, None], word, self.size, self.dtype)
        return z.reshape(len(index), *self.event_shape)

    def prior(self, index: Index) -> State:
        """The standard normal that the given samples start from, with shape (B, *event)."""
        return self._draw(index, torch.zeros_like(index), _PRIOR)

    def normal(self, index: Index, position: Index, k: int) -> State:
        """Standard normals number k at the given position of each sample's walk, with shape (B, *event)."""
        return self._draw(index, position, _EXTRA + (k << 8))

    def uniform(self, index: Index, position: Index, k: int) -> State:
        """Uniforms number k in (0, 1), in float64, with shape (B, *event); positions as for `normal`.

        All are odd multiples of 2^-53. Of what `size` an event is does not matter to its first elements.
        """
        key, number = self._streams(index)
        u = _uniforms(key, number, position, _UNIFORM + (k << 8), self.size)
        return u.reshape(len(index), *self.event_shape)

    def start(self, index: Index, t: Time) -> Carry:
        """What must travel with each row, at its start at t, with shape (B,); nothing by default."""
        return {}

    @abstractmethod
    def increment(self, index: Index, attempt: Index, t: Time, s: Time, carry: Carry) -> tuple[State, Coef, Carry]:
        """The Brownian increment over [s, t].

        Args:
            index: sample numbers, with shape (B,).
            attempt: steps tried before by each sample, accepted or not, with shape (B,).
            t: now, with shape (B,).
            s: target, with shape (B,).
            carry: what `start` or the last accepted step returned.

        Returns:
            The increment, with shape (B, *event), its variance, with shape (B,), and the carry if the step is accepted.
        """


class FreshNoise(Noise):
    """Independent increments, one per attempted step.

    Right for solvers that never reject. After a rejection the noise is drawn again, as in the published code of
    Algorithm 6: acceptance then depends on the noise, which biases the law.
    """

    def increment(self, index: Index, attempt: Index, t: Time, s: Time, carry: Carry) -> tuple[State, Coef, Carry]:
        z = self._draw(index, attempt, _STEP)
        return expand_like((t - s).sqrt(), z) * z, t - s, {}


class BrownianPath(Noise):
    r"""One Brownian path per sample, a function of (seed, sample, time) alone, queried in any order.

    Levy's construction in the basis of Schauder. With u in [0, 1] linear in the time and T(u) the variance up to u,

        W(u) = T(u) z_root + sum_{l < depth} sd(T_a, T_m, T_b) hat(T(u); T_a, T_m, T_b) z_{l, n_l}
                           + sd(T_a, T(u), T_b) z_leaf(u),    sd(a, m, b)^2 = (b - m) (m - a) / (b - a)

    where n_l = floor(2^l u) numbers the cell of level l that holds u, T_a, T_m, T_b are T at its ends and middle, and
    `hat` rises from 0 at T_a to 1 at T_m and falls to 0 at T_b. The last term, in the finest cell and keyed by u,
    restores the variance that the finite sum lacks, so the law of the values at any times in different finest cells is
    exactly Brownian. Two times inside one cell, closer than 2^-depth of the range, would see too much noise: that is
    `RESOLUTION`, below which the adaptive controller does not step.

    A value is a function of (seed, sample, time), so a rejected step sees the path again, and runs at other tolerances
    or step counts see the same path. The value at the last accepted time travels with its sample. Source: Levy 1948;
    McKean, "Stochastic Integrals", 1969, sec. 1.2.

    By default u runs with t and T(u) = u, for increments of variance t - s. A solver that integrates the linear part of
    the SDE exactly needs the path in another clock, tau = (sigma / alpha)^-power: then u runs with the log-SNR and
    T(u) = (e^{a u} - 1) / (e^a - 1), a = power / 2 times the range of the log-SNR.

    Args:
        seed, event_shape, dtype: as for `Noise`.
        t_min, t_max: ends of the time range.
        log_snr: the log-SNR at times with shape (B,), for the second clock.
        power: that of the second clock, positive.
    """

    def __init__(
        self,
        seed: int,
        event_shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        t_min: float,
        t_max: float,
        log_snr: Callable[[Time], Coef] | None = None,
        power: float = 0.0,
    ) -> None:
        super().__init__(seed, event_shape, dtype)
        self.t_max, self.depth, self._clock = t_max, round(-math.log2(RESOLUTION)), log_snr
        ends = torch.tensor([t_min, t_max], dtype=torch.float64)
        first, last = (ends if log_snr is None else log_snr(ends).flip(0)).tolist()
        self._first, self._length = first, last - first
        self._growth = 0.0 if log_snr is None else power / 2 * self._length
        self._scale = self._length if log_snr is None else 1.0

    def _position(self, t: Time) -> Time:
        """u at t, with shape (B,)."""
        u = ((t if self._clock is None else self._clock(t)) - self._first) / self._length
        # To 40 bits, so that times on the grid of cells stay there after arithmetic with rounded times.
        return (u.clamp(0, 1) * 2.0**40).round() * 2.0**-40

    def _variance(self, u: Tensor) -> Tensor:
        """T(u), from 0 to 1."""
        if self._growth == 0:
            return u
        # Relative to the end, so that no growth is too large for a float64.
        return (torch.exp(self._growth * (u - 1)) - math.exp(-self._growth)) / -math.expm1(-self._growth)

    def __call__(self, index: Index, t: Time) -> State:
        """W(t) for each sample, with W = 0 where u = 0: at t_min, or at t_max in the clock of the log-SNR.

        Times in [t_min, t_max] and sample numbers have shape (B,), the values (B, *event).
        """
        return self.start(index, t)["w"]

    def _basis(self, u: Time) -> tuple[Tensor, Tensor, Tensor]:
        """The normals that make up W(u): their weights (B, L), positions (B, L) and purposes (L,)."""
        level = torch.arange(self.depth + 1, device=u.device)
        cells = 2.0 ** level.double()
        cell = torch.minimum((u[:, None] * cells).floor(), cells - 1)
        places = torch.stack([cell, cell + 0.5, cell + 1, u[:, None] * cells]) / cells
        low, middle, high, now = self._variance(places)
        hat = torch.minimum((now - low) / (middle - low), (high - now) / (high - middle))
        spread = ((high - middle) * (middle - low) / (high - low)).sqrt()
        leaf = ((high - now) * (now - low) / (high - low))[:, -1].clamp(min=0).sqrt()
        time_key = (u * 2.0**32).long().clamp(max=_WORD)
        weight = torch.cat([now[:, :1], (hat * spread)[:, :-1], leaf[:, None]], 1)
        position = torch.cat([torch.zeros_like(time_key)[:, None], cell[:, :-1].long(), time_key[:, None]], 1)
        first, last = (torch.full((1,), word, device=u.device) for word in (_ROOT, _LEAF))
        purpose = torch.cat([first, _NODE + (level[:-1] << 8), last])
        return weight * math.sqrt(self._scale), position, purpose

    def _sum(self, index: Index, weight: Tensor, position: Tensor, purpose: Tensor) -> State:
        """The sum of the given normals with their weights, with shape (B, *event)."""
        if index.is_cpu:  # a device would have to be waited for
            used = weight.any(0).nonzero().squeeze(1)
            weight, position, purpose = (a.index_select(-1, used) for a in (weight, position, purpose))
        w = torch.zeros(len(index), self.size, dtype=self.dtype, device=index.device)
        chunk = _CHUNK if index.is_cpu else _CHUNK_ON_DEVICE
        levels = max(1, chunk // max(1, len(index) * self.size))
        key, number = self._streams(index)
        parts = zip(*(a.split(levels, -1) for a in (weight.to(self.dtype), position, purpose)), strict=True)
        for part_weight, part_position, part_purpose in parts:
            z = _normals(key, number, part_position, part_purpose, self.size, self.dtype)
            # One after another: a matrix product would round by how many there are, which depends on the batch.
            for k in range(z.shape[1]):
                w.addcmul_(part_weight[:, k, None], z[:, k])
        return w.reshape(len(index), *self.event_shape)

    def start(self, index: Index, t: Time) -> Carry:
        u = self._position(t)
        return {"w": self._sum(index, *self._basis(u)), "at": self._variance(u)}

    def increment(self, index: Index, attempt: Index, t: Time, s: Time, carry: Carry) -> tuple[State, Coef, Carry]:
        after = self.start(index, s)
        return carry["w"] - after["w"], self._scale * (carry["at"] - after["at"]).abs(), after


class StepNoise:
    """The noise of one attempted step, for every row. Nothing is drawn before it is asked for.

    Args:
        source: where the noise comes from.
        index, attempt, t, s, carry: as for its `increment`.
        position: steps accepted before by each sample, the warm-up turn included, with shape (B,).
    """

    def __init__(
        self, source: Noise, index: Index, attempt: Index, position: Index, t: Time, s: Time, carry: Carry
    ) -> None:
        self._source, self._index, self._attempt, self._position = source, index, attempt, position
        self._t, self._s, self._before = t, s, carry

    @functools.cached_property
    def _increment(self) -> tuple[State, Coef, Carry]:
        return self._source.increment(self._index, self._attempt, self._t, self._s, self._before)

    @property
    def dw(self) -> State:
        """Brownian increment over [s, t], with shape (B, *event) and variance t - s, or as the solver's clock says."""
        return self._increment[0]

    @property
    def z(self) -> State:
        """The increment scaled to variance 1, with shape (B, *event); 0 where t = s."""
        dw, variance, _ = self._increment
        return dw / expand_like(variance.masked_fill(variance == 0, 1.0).sqrt(), dw)

    def normal(self, k: int = 0) -> State:
        """Standard normals number k of this step, with shape (B, *event).

        Independent of the increment and of every other k and step; the same again if the step is rejected.
        """
        return self._source.normal(self._index, self._position, k)

    def fixed(self, k: int = 0) -> State:
        """Standard normals number k of each sample, the same at every step, with shape (B, *event)."""
        return self._source.normal(self._index, torch.zeros_like(self._index), k)

    def uniform(self, k: int = 0) -> State:
        """Uniforms number k of this step, in (0, 1) and float64, with shape (B, *event)."""
        return self._source.uniform(self._index, self._position, k)

    def fixed_uniform(self, k: int = 0) -> State:
        """Uniforms number k of each sample, the same at every step and others than those of any step."""
        return self._source.uniform(self._index, torch.zeros_like(self._index), k)

    @property
    def carry(self) -> Carry:
        """What travels on with the rows if the step is accepted."""
        return self._increment[2] if self._before else {}
