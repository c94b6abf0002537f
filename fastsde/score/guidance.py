r"""Guidance: score models that pull another one's prediction towards a condition, or into the range of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.checks import check_instance, check_kind, check_number
from fastsde.score.base import Prediction, ScoreModel, Wrapper
from fastsde.score.network import watched
from fastsde.sde.base import SDE
from fastsde.types import Cond, Index, Mask, State, Time

NEGATIVE = "negative_"
"""Prefix of the conditioning of the other half of classifier-free guidance, as in diffusers' pipelines."""


def halves(cond: Cond) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The conditioning of the guided half, and that of the negative half; what has no negative twin is in both."""
    wanted = {k: v for k, v in cond.items() if not k.startswith(NEGATIVE)}
    return wanted, {**wanted, **{k.removeprefix(NEGATIVE): v for k, v in cond.items() if k.startswith(NEGATIVE)}}


class ClassifierFreeGuidance(Wrapper):
    r"""Classifier-free guidance: away from an unconditional (or negative) prediction.

        out = out_negative + w (out_cond - out_negative)
        out <- (phi std(out_cond) / std(out) + 1 - phi) out,    phi = `rescale`, std over the elements of one sample

    on whatever the network predicts. Both halves are one batch, counted as two calls; outside of `interval`, the
    conditional prediction alone, one call. Source: Ho and Salimans, https://arxiv.org/abs/2207.12598, eq. 6 (their
    w + 1 is our w); Lin et al., https://arxiv.org/abs/2305.08891, eqs. 15-16, for the rescaling; Kynkaanniemi et al.,
    https://arxiv.org/abs/2404.07724, for the interval.

    The conditioning of the negative half has the names of the other with "negative_" before them, each with leading
    axis n; whatever has no negative twin goes to both. The scale travels too: `cond={"guidance_scale": w}` with shape
    (n,) sets it per sample.

    Args:
        model: the conditional score model.
        scale: w; 1 is no guidance.
        negative: conditioning of one row of the negative half, without batch axis (the "no label" class, a number or a
            tensor; the embedding of an empty prompt), for what the caller does not give.
        rescale: phi, from 0 to 1.
        interval: the (low, high) noise levels sigma / alpha between which guidance acts; everywhere by default.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    own_cond = ("guidance_scale",)

    def __init__(
        self,
        model: ScoreModel,
        scale: float = 7.5,
        *,
        negative: Mapping[str, Tensor | float] | None = None,
        rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
    ) -> None:
        check_number("scale", scale, -math.inf, ends="()")
        check_number("rescale", rescale, 0.0, 1.0)
        check_kind("negative", negative, Mapping, "a dict of tensors without batch axis")
        own = {f"{NEGATIVE}{key}": value for key, value in (negative or {}).items()}
        super().__init__(model, default_cond={"guidance_scale": torch.tensor(float(scale), dtype=torch.float32), **own})
        self.calls = 2 * model.calls
        self.rescale, self.interval = rescale, _checked_interval(interval)

    def inner_cond(self, cond: Cond | None) -> dict[str, Tensor]:
        return halves(super().inner_cond(cond))[0]

    def negative_cond(self, cond: Cond | None) -> dict[str, Tensor]:
        """The conditioning of the negative half."""
        return halves(super().inner_cond(cond))[1]

    def check_cond(self, cond: Cond) -> None:
        _check_halves(cond)
        self.model.check_cond(self.inner_cond(cond))
        self.model.check_cond(self.negative_cond(cond))

    def cost(self, t: Time, cond: Cond) -> Index | int:
        once, other = self.model.cost(t, self.inner_cond(cond)), self.model.cost(t, self.negative_cond(cond))
        return once + other * (1 if self.interval is None else _between(self.sde, t, *self.interval))

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        wanted, negative = self.inner_cond(cond), self.negative_cond(cond)
        # With an index of rows, where guidance does not act everywhere: such an index waits for a device.
        rows = slice(None) if self.interval is None else _between(self.sde, t, *self.interval).nonzero().flatten()
        both = {key: torch.cat([value, negative[key][rows]]) for key, value in wanted.items()}
        whole = self.model.output(torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), both)
        out, base = whole.tensor_split([len(t)])
        guided = torch.lerp(base, out[rows], expand_like((cond or {})["guidance_scale"][rows], base))
        if self.rescale:
            ratio = out[rows].flatten(1).std(1) / guided.flatten(1).std(1).clamp(min=1e-12)
            guided = guided * expand_like(self.rescale * ratio + 1 - self.rescale, guided)
        return guided if isinstance(rows, slice) else out.index_copy(0, rows, guided)


def _between(sde: SDE, t: Time, low: float, high: float) -> Mask:
    """Where sigma / alpha is from `low` to `high`."""
    level = sde.sigma(t) / sde.alpha(t)
    return (level >= low) & (level <= high)


def _check_halves(cond: Cond) -> None:
    """Refuses, with a ValueError, a scale that is none, and halves that do not fit each other."""
    scale, given = cond["guidance_scale"], [k for k in cond if k.startswith(NEGATIVE)]
    if scale.ndim != 1 or not torch.isfinite(scale).all():
        raise ValueError(f"cond['guidance_scale'] must be finite with shape (n,); got {tuple(scale.shape)}.")
    if not given:
        raise ValueError(
            f"guidance needs the condition of the unguided half: negative=, or cond with names that begin with "
            f"{NEGATIVE!r} (such as {NEGATIVE}class_labels); got {sorted(cond)}."
        )
    for key in given:
        wanted = cond.get(key.removeprefix(NEGATIVE))
        if wanted is None:
            raise ValueError(f"cond has {key} but not the conditional half of the same name.")
        if wanted.shape[1:] != cond[key].shape[1:]:
            raise ValueError(
                f"{key} has shape {tuple(cond[key].shape)} and the conditional half {tuple(wanted.shape)}: both go "
                "through the network as one batch. Pad the shorter prompt to the length of the other."
            )


def _checked_interval(given: object) -> tuple[float, float] | None:
    if given is None:
        return None
    pair = tuple(given) if isinstance(given, (tuple, list)) else ()
    numbers = all(isinstance(v, Real) and not isinstance(v, bool) for v in pair)
    if len(pair) != 2 or not numbers or not 0 <= pair[0] < pair[1]:
        raise ValueError(f"interval must be (low, high) noise levels with 0 <= low < high; got {str(given)[:80]}.")
    return pair


class ClassifierGuidance(Wrapper):
    r"""Classifier guidance: the score of p_t(x) p(y | x)^w.

        eps = eps_model - w sigma grad_x log p(y | x_t)

    The gradient of `log_prob` is taken at each row by itself. Calls of the classifier are not network calls and are not
    counted. Source: Dhariwal and Nichol, https://arxiv.org/abs/2105.05233, alg. 2; Song et al.,
    https://arxiv.org/abs/2011.13456, eq. 14.

    Args:
        model: the score model.
        log_prob: `log_prob(x_t, t, **cond)`, with x_t of shape (B, *event), the process's t of shape (B,) and the
            result, log p(y | x_t), of shape (B,); differentiable in x_t. It was trained on noisy data.
        scale: w.
        keys: names of the conditioning that goes to `log_prob` (the wanted labels) and not to the network.

    Raises:
        TypeError: if `log_prob` cannot be called.
    """

    def __init__(
        self, model: ScoreModel, log_prob: Callable[..., Tensor], scale: float = 1.0, *, keys: tuple[str, ...] = ()
    ) -> None:
        check_instance("log_prob", log_prob, Callable, "callable as log_prob(x_t, t, **cond)")
        super().__init__(model, "epsilon")
        self.log_prob, self.scale, self.own_cond = log_prob, scale, tuple(keys)

    def check_cond(self, cond: Cond) -> None:
        missing = [key for key in self.own_cond if key not in cond]
        if missing:
            raise ValueError(f"the classifier needs cond with {', '.join(missing)}; got {sorted(cond)}.")
        super().check_cond(cond)

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        own = {key: (cond or {})[key] for key in self.own_cond}
        recorded, x = torch.is_grad_enabled(), watched(x_t)
        with torch.enable_grad():
            log_prob = self.log_prob(x, t, **own)
            if log_prob.shape != t.shape:
                raise ValueError(f"log_prob must return shape {tuple(t.shape)}; it returned {tuple(log_prob.shape)}.")
            (gradient,) = torch.autograd.grad(log_prob.sum(), x, create_graph=recorded)
        eps = self.model(x_t, t, self.inner_cond(cond)).epsilon
        return eps - expand_like(self.scale * self.sde.sigma(t), eps) * gradient


class Clipped(Wrapper):
    r"""A model whose denoised prediction is clipped to the data's range, as many pixel models' schedulers do.

        x_0 <- clip(x_0, low, high)    (`data_range` of the model), or clip(x_0, -limit, limit)

    or, with `ratio`, dynamic thresholding: x_0 <- clip(x_0, -s, s) / s with s the quantile `ratio` of |x_0| over the
    elements of one sample, but at least 1 and at most `limit`. The score is then not smooth, and not that of any
    density; adaptive solvers see it as error. Source: Saharia et al., https://arxiv.org/abs/2205.11487, sec. 2.3.

    Args:
        model: the score model.
        limit: largest magnitude of the data, positive; by default the model's `data_range`, and with `ratio` its larger
            end.
        ratio: quantile for dynamic thresholding, in (0, 1); None for plain clipping.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(self, model: ScoreModel, limit: float | None = None, *, ratio: float | None = None) -> None:
        super().__init__(model, "sample")
        self.limit = None if limit is None else check_number("limit", limit, 0.0, ends="()")
        self.ratio = None if ratio is None else check_number("ratio", ratio, 0.0, 1.0, ends="()")

    def __call__(self, x_t: State, t: Time, cond: Cond | None = None) -> Prediction:
        inside = self.model(x_t, t, cond)
        low, high = self.data_range if self.limit is None else (-self.limit, self.limit)
        return Prediction(self.prediction, clip(inside.x_0, low, high, self.ratio), x_t, inside.alpha, inside.sigma)

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        return self(x_t, t, cond).out


def clip(x_0: State, low: float, high: float, ratio: float | None = None) -> State:
    """`x_0`, with shape (B, *event), clipped as `Clipped` does it."""
    if ratio is None:
        return x_0.clamp(low, high)
    # At most the limit wins over at least 1, as in diffusers, whose default limit of 1 makes this plain clipping.
    size = x_0.flatten(1).abs()
    size = size.to(torch.promote_types(size.dtype, torch.float32))  # quantiles know no half precision
    s = size.quantile(ratio, dim=1).clamp(min=1.0).clamp(max=max(-low, high))
    s = expand_like(s, x_0)
    return x_0.clamp(-s, s) / s
