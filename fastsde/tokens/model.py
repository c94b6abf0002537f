r"""Reading a network of masked tokens: logits for every position, from one call.

States hold tokens 0 .. K - 1 and `MASK` (-1). The network sees its own id for the mask. Only logits of masked positions
are read, so what a network says elsewhere does not matter; the mask itself has no chance (SUBS: Sahoo et al.,
https://arxiv.org/abs/2406.07524, sec. 3.2.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsde.checks import check_count, check_flags, check_instance, check_kind, check_number
from fastsde.score.base import Calls, Model, check_shape
from fastsde.score.guidance import NEGATIVE, halves
from fastsde.score.network import explained
from fastsde.tokens.process import MASK, Masking
from fastsde.types import Cond, Index, Mask, Time, Tokens

PROMPT = "prompt_positions"
"""Conditioning that `sample` makes for models that ask for it: which positions were given, with shape (B, *event)."""


class TokenModel(Model):
    """A network that predicts masked tokens, and how to read it.

    Args:
        network: `network(ids, **cond)`, or with `timestep` `network(ids, time, **cond)`; ids are int64 with shape
            (B, *event). It returns logits with shape (B, *event, V) or (B, L, V), L the number of positions; an object
            with these under `.logits` or `.sample`; or a tuple that begins with them.
        vocabulary: number of ids K that the network may be given and predict; V must be K, or K + 1 if the mask is the
            id K.
        mask_id: the network's id of the mask. It may be one of the K, or one above them. K by default.
        event_shape: shape of one sample: (L,) for texts, (h, w) for images.
        process: the masking that it was trained for.
        timestep: maps the time of the schedule, float64 with shape (B,), to the network's time; None for a network
            without time. The time is that at which as large a share would be masked as is masked in each row.
        shift: whether the logits at a position predict the next one, as in language models that were trained so first
            (Dream).
        channels_first: whether logits have shape (B, V, *event).
        end_id: a token after which nothing is read. As soon as one is there and everything before it is known, the
            sample has ended; what is behind becomes `end_id`. `ReMDM` does not use it.
        default_cond: conditioning of each row if `cond` has none.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong kind.
    """

    role = "the token network"

    def __init__(
        self,
        network: Callable[..., Any],
        vocabulary: int,
        mask_id: int | None = None,
        *,
        event_shape: tuple[int, ...] | None = None,
        process: Masking | None = None,
        timestep: Callable[[Time], Tensor] | None = None,
        shift: bool = False,
        channels_first: bool = False,
        end_id: int | None = None,
        default_cond: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        super().__init__(network, event_shape, default_cond)
        self.vocabulary = check_count("vocabulary", vocabulary, 2)
        self.mask_id = self.vocabulary if mask_id is None else check_count("mask_id", mask_id, 0)
        check_kind("process", process, Masking, "a fastsde.tokens.Masking")
        self.process = Masking() if process is None else process
        check_kind("timestep", timestep, Callable, "a function of the schedule's time")
        check_flags(shift=shift, channels_first=channels_first)
        if end_id is not None and (check_count("end_id", end_id, 0) >= vocabulary or end_id == self.mask_id):
            raise ValueError(f"end_id must be a token below {vocabulary} and not the mask; got {end_id}.")
        self.timestep, self.shift, self.channels_first, self.end_id = timestep, shift, channels_first, end_id
        self.inputs = ("ids",) if timestep is None else ("ids", "time")

    def __repr__(self) -> str:
        name = getattr(self.network, "__name__", type(self.network).__name__)
        return (
            f"{type(self).__name__}({name}, {self.vocabulary}, mask_id={self.mask_id}, event_shape={self.event_shape}, "
            f"{self.process})"
        )

    def bind(self, cond: Cond, active: Mask, nfe: Index | None = None) -> BoundTokens:
        return BoundTokens(self, cond, active, nfe)

    def prompt_cond(self, given: Tensor) -> Cond:
        """Conditioning made from which positions were given, with shape (n, *event); most models need none."""
        return {}

    def call(self, ids: Tokens, time: Tensor | None, cond: Cond) -> object:
        """Calls the network: the one place that knows its signature."""
        return self.network(ids, **cond) if time is None else self.network(ids, time, **cond)

    def __call__(self, x: Tokens, share: Time, cond: Cond | None = None) -> Tensor:
        """Evaluates the network once on every row.

        Args:
            x: tokens and masks, with shape (B, *event).
            share: how much of what is to be drawn is masked, with shape (B,).
            cond: keyword arguments of the network, each with leading axis B.

        Returns:
            Logits with shape (B, L, K), -inf for the mask.

        Raises:
            ValueError: if the network returns another shape.
            TypeError: if it returns no floating-point tensor.
        """
        time = None
        if self.timestep is not None:
            time = self.timestep(self.process.time(share))
            time = time.float() if time.dtype == torch.float64 else time
        ids = torch.where(x == MASK, self.mask_id, x)
        with explained(self.role, len(x), torch.int64, torch.float32):
            out = self.call(ids, time, {key: value.clone() for key, value in (cond or {}).items()})
        return self._read(out, x)

    def _read(self, out: object, x: Tokens) -> Tensor:
        if isinstance(out, tuple) and out:
            out = out[0]
        for name in ("logits", "sample"):
            out = out if isinstance(out, Tensor) else getattr(out, name, out)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            kind = f"a tensor of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"{self.role} must return floating-point logits; it returned {kind}.")
        length = math.prod(x.shape[1:])
        shape, out = tuple(out.shape), out.movedim(1, -1) if self.channels_first and out.ndim > 2 else out
        columns = out.shape[-1] if out.ndim else 0
        fits = out.shape[:-1] in (x.shape, (len(x), length))
        extra = 1 if self.mask_id == self.vocabulary else 0
        if not fits or not self.vocabulary <= columns <= self.vocabulary + extra:
            places = ", ".join(map(str, x.shape))
            layout = f"({len(x)}, V, {places[places.find(',') + 2 :]})" if self.channels_first else f"({places}, V)"
            raise ValueError(
                f"{self.role} was given ids with shape {tuple(x.shape)} and must return logits with shape {layout}, "
                f"V = {self.vocabulary}{' or one more for the mask' if extra else ''}; it returned {shape}."
            )
        logits = out.reshape(len(x), length, columns)[..., : self.vocabulary]
        if self.shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        if self.mask_id < self.vocabulary:
            column = torch.arange(self.vocabulary, device=logits.device) == self.mask_id
            logits = logits.masked_fill(column, -math.inf)
        return logits


class TokenGuidance(TokenModel):
    """Classifier-free guidance on logits: away from an unconditional (or negative) prediction. It counts as two calls.

        logits = logits_negative + scale (logits_cond - logits_negative)

    Papers that write (1 + w) c - w u mean scale = 1 + w. Source: Ho and Salimans, https://arxiv.org/abs/2207.12598;
    on logits, Chang et al., https://arxiv.org/abs/2301.00704, sec. 2.7.

    Args:
        model: the conditional model.
        scale: 1 is no guidance.
        negative: conditioning of one row of the negative half, without batch axis. Other conditioning goes to both, but
            for names with "negative_" before them in `cond`.
        mask_prompt: whether the negative half sees masks where the prompt is, as in LLaDA.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        model: TokenModel,
        scale: float,
        *,
        negative: Mapping[str, Tensor | float] | None = None,
        mask_prompt: bool = False,
    ) -> None:
        check_instance("model", model, TokenModel, "a fastsde.tokens.TokenModel")
        own = {f"{NEGATIVE}{key}": value for key, value in (negative or {}).items()}
        super().__init__(
            model.network,
            model.vocabulary,
            model.mask_id,
            event_shape=model.event_shape,
            process=model.process,
            end_id=model.end_id,
            default_cond={**(model.default_cond or {}), **own},
        )
        check_flags(mask_prompt=mask_prompt)
        self.scale = check_number("scale", scale, -math.inf, ends="()")
        self.model, self.calls, self.mask_prompt = model, 2 * model.calls, mask_prompt
        if not own and not mask_prompt:
            raise ValueError("guidance needs negative=, the conditioning of the unguided half, or mask_prompt=True.")

    def _halves(self, cond: Cond | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return halves({k: v for k, v in (cond or {}).items() if k != PROMPT})

    def check_cond(self, cond: Cond) -> None:
        wanted, negative = self._halves(cond)
        missing = sorted(negative.keys() - wanted.keys())
        if missing:
            raise ValueError(f"cond has {', '.join(missing)} for the negative half of the guidance alone.")
        self.model.check_cond(wanted)
        self.model.check_cond(negative)

    def prompt_cond(self, given: Tensor) -> Cond:
        return {PROMPT: given} if self.mask_prompt else {}

    def __call__(self, x: Tokens, share: Time, cond: Cond | None = None) -> Tensor:
        wanted, negative = self._halves(cond)
        other = x.masked_fill((cond or {})[PROMPT], MASK) if self.mask_prompt else x
        both = {k: torch.cat([wanted[k], negative[k]]) for k in wanted}
        logits, base = self.model(torch.cat([x, other]), torch.cat([share, share]), both).chunk(2)
        # -inf where both say so: their difference is no number.
        return torch.where(logits == base, logits, base + self.scale * (logits - base))


class Critic(Model):
    """A network that says which tokens of a completed sample are original.

    Args:
        network: `network(ids, **cond)` with ids of shape (B, *event); returns logits of "original" with the same
            number of elements. It gets the conditioning of the model.
        event_shape: shape of one sample, if it is fixed.
        default_cond: conditioning of each row if `cond` has none.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    role = "the critic"

    def bind(self, cond: Cond, active: Mask, nfe: Index | None = None) -> Any:
        raise TypeError("a critic draws no samples by itself: sample(model, solver=TokenCritic(critic)).")

    def __call__(self, x: Tokens, cond: Cond | None = None) -> Tensor:
        """The logits of "original", with shape (B, L).

        Args:
            x: tokens, with shape (B, *event).
            cond: keyword arguments of the network, each with leading axis B.

        Raises:
            ValueError: if the network returns another shape.
        """
        out = self.network(x, **{key: value.clone() for key, value in (cond or {}).items()})
        out = out if isinstance(out, Tensor) else getattr(out, "logits", out)
        if not isinstance(out, Tensor) or len(out) != len(x) or out.numel() != x.numel():
            came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"{self.role} must return a logit for each of {tuple(x.shape)} tokens; it returned {came}."
            )
        return out.reshape(len(x), -1)


class BoundTokens(Calls):
    """A token model bound to the rows in flight; arguments as for `Calls`."""

    model: TokenModel

    def __call__(self, x: Tokens, share: Time, rows: Mask) -> tuple[Tensor, Tensor]:
        """Logits of the given rows alone, adding their calls to `nfe`.

        Args:
            x: with shape (B, *event).
            share: with shape (B,).
            rows: which rows need a prediction, with shape (B,). Rows that have ended are left out.

        Returns:
            The numbers of the rows, with shape (R,), and their logits, with shape (R, L, K).
        """
        ids, cond = self._chosen(rows)
        if not len(ids):
            length = math.prod(x.shape[1:])
            return ids, torch.empty(0, length, self.model.vocabulary, device=x.device)
        logits = self.model(x.index_select(0, ids), share.index_select(0, ids), cond)
        self.count(rows * self.model.calls)
        return ids, logits

    def ask(self, critic: Critic, x: Tokens, rows: Mask) -> tuple[Tensor, Tensor]:
        """Logits of a critic, in the same way: row numbers (R,) and logits (R, L)."""
        ids, cond = self._chosen(rows)
        if not len(ids):
            return ids, torch.empty(0, math.prod(x.shape[1:]), device=x.device)
        logits = critic(
            x.index_select(0, ids), {k: v for k, v in cond.items() if k != PROMPT and not k.startswith(NEGATIVE)}
        )
        self.count(rows * critic.calls)
        return ids, logits

    def _chosen(self, rows: Mask) -> tuple[Tensor, dict[str, Tensor]]:
        ids = (rows & self.active).nonzero().flatten()
        return ids, {key: value.index_select(0, ids) for key, value in self.cond.items()}


def check_tokens(name: str, x: object, model: TokenModel) -> Tensor:
    """Tokens that were given, with shape (n, *event), as states: `MASK` where they have the model's mask id or -1.

    Raises:
        TypeError, ValueError: if they are no integers, out of the model's range, or leave a row nothing to draw.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
        came = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be integers, tokens with the model's mask id at positions to draw; got {came}.")
    check_shape(name, tuple(x.shape))
    x = x.long()
    masked = (x == model.mask_id) | (x == MASK)
    wrong = ~masked & ((x < 0) | (x >= model.vocabulary))
    if wrong.any():
        raise ValueError(
            f"{name} must hold tokens from 0 to {model.vocabulary - 1}, or the mask {model.mask_id}; got "
            f"{int(x[wrong][0])}."
        )
    full = ~masked.flatten(1).any(1)
    if full.any():
        raise ValueError(
            f"{name} leaves nothing to draw in {int(full.sum())} of {len(x)} rows, first {int(full.int().argmax())}: "
            f"put the mask {model.mask_id} at positions to draw."
        )
    return x.masked_fill(masked, MASK)
