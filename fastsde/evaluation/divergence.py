r"""Relativistic divergences between two laws, from a critic's values on samples of them.

With a concave f, f(0) = 0, and the critic C that makes it largest, each of these is a divergence (thesis ch. 6;
Jolicoeur-Martineau, "On relativistic f-divergences", https://arxiv.org/abs/1901.02474, thm. 3.1):

    symmetric    E_p f(C(x)) + E_q f(-C(y))
    paired       2 E_{p, q} f(C(x) - C(y))
    average      E_p f(C(x) - E_q C) + E_q f(E_p C - C(y))
    one way      2 E_p f(C(x) - E_q C)
    centred      E_p f(C(x) - E_m C) + E_q f(E_m C - C(y)),    m = (p + q) / 2

    least squares  f(z) = 1 - (z - 1)^2,    log  f(z) = log sigmoid(z) + log 2,    hinge  f(z) = min(z, 1)

With any other critic they are lower bounds. For laws on finitely many points, with L = sum (p - q)^2 / (p + q) and
X = sum (p - q)^2 / p, least squares gives symmetric = centred = L, paired = 4 L / (2 + L), average = 8 L / (2 + 3 L),
one way = 2 X / (1 + X); symmetric is 2 JSD with log and 2 TV with hinge.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastsde.checks import check_choice, check_count, check_states
from fastsde.training.gan_losses import Comparison, all_pairs, average, centred, one_way, paired, plain

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "least squares": lambda z: 1 - (z - 1).square(),
    "log": lambda z: logsigmoid(z) + math.log(2),
    "hinge": lambda z: z.clamp(max=1),
}
"""f by name."""
KINDS: dict[str, Comparison] = {
    "symmetric": plain,
    "paired": paired,
    "average": average,
    "one way": one_way,
    "centred": centred,
}
"""What f is taken of, by the name of a divergence: as in relativistic GANs, whose discriminator has the loss -D."""
ESTIMATORS = ("batch", "mvue", "unbiased")
"""Ways to estimate a divergence from samples."""


def relativistic(
    real: Tensor, fake: Tensor, f: str = "least squares", kind: str = "symmetric", estimator: str = "batch"
) -> Tensor:
    r"""A divergence of the module's head, from the critic's values on samples.

    With k values each, and means of C over the batch in place of expectations, least squares has the bias

        -(s_x^2 + s_y^2) / k  (average),    -2 s_y^2 / k  (one way),    (s_x^2 + s_y^2) / (2 k)  (centred)

    where s^2 are the variances of C(x) and C(y). "unbiased" takes it off with the variances of the sample (thesis,
    corollary 6.5.2). "mvue" is the mean over all pairs, the unbiased estimate of least variance of `paired` (corollary
    6.5.1), where "batch" takes the pairs as they come.

    Args:
        real: C(x) for samples x of p, with shape (n,), n at least 2.
        fake: C(y) for samples y of q, with shape (m,), m at least 2; as many as `real` for "batch" of "paired".
        f: "least squares", "log" or "hinge".
        kind: "symmetric", "paired", "average", "one way" or "centred".
        estimator: "batch"; "mvue" for "paired"; "unbiased" for least squares and the three kinds with means.

    Returns:
        A scalar, with gradients to the values.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed.
    """
    for name, values in (("real", real), ("fake", fake)):
        _check_floats(name, values, "(n,)", least=2)
    for name, value, allowed in (("f", f, FUNCTIONS), ("kind", kind, KINDS), ("estimator", estimator, ESTIMATORS)):
        check_choice(name, value, allowed)
    if estimator == "mvue" and kind != "paired":
        raise ValueError(f"estimator 'mvue' is for kind 'paired'; got {kind!r}.")
    if estimator == "unbiased" and (f != "least squares" or kind not in ("average", "one way", "centred")):
        raise ValueError(
            f"estimator 'unbiased' is known for least squares and kinds average, one way and centred; got {f!r} and "
            f"{kind!r}."
        )
    if kind == "paired" and estimator == "batch" and len(real) != len(fake):
        raise ValueError(
            f"real and fake must be as many, to be paired; got {len(real)} and {len(fake)}. 'mvue' takes any."
        )
    u_r, u_f = (all_pairs if estimator == "mvue" else KINDS[kind])(real, fake)
    found = FUNCTIONS[f](u_r).mean() + FUNCTIONS[f](-u_f).mean()
    if estimator == "unbiased":
        x, y = real.var() / len(real), fake.var() / len(fake)
        found = found + {"average": x + y, "one way": 2 * y, "centred": -(x + y) / 2}[kind]
    return found


def _check_floats(name: str, x: Tensor, shape: str, least: int) -> None:
    """Refuses, with a TypeError or ValueError, what is no tensor of finite floats of that shape, n at least `least`."""
    check_states(name, x, gradient=True)
    if x.ndim != len(shape.split()) or len(x) < least:
        raise ValueError(f"{name} must be floats with shape {shape}, n at least {least}; got {tuple(x.shape)}.")


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence that a fitted critic finds.

    Attributes:
        value: on the held-out halves; a lower bound of the divergence in the mean.
        standard_error: of the value, given the critic: by the bootstrap over the held-out samples.
        fitted_value: on the halves that the critic was fitted to, which flatters it.
        critic: from features with shape (B, d), standardised as `fit_critic` does, to values with shape (B,).
    """

    value: float
    standard_error: float
    fitted_value: float
    critic: nn.Module


class _Critic(nn.Module):
    """Two hidden layers on standardised features."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        sizes = ((len(mean), width), (width, width), (width, 1))
        # In single precision whatever the default is, so that its start is the same.
        first, second, last = (nn.Linear(a, b, dtype=torch.float32) for a, b in sizes)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """Values with shape (B,)."""
        out: Tensor = self.layers((x - self.mean) / self.std)
        return out.squeeze(1)


def fit_critic(
    features_p: Tensor,
    features_q: Tensor,
    f: str = "least squares",
    kind: str = "symmetric",
    *,
    width: int = 128,
    steps: int = 500,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
) -> Divergence:
    """Fits a critic to one half of each sample, and measures the divergence on the other half.

    Args:
        features_p, features_q: with shape (n, d) and (m, d), n and m at least 20.
        f: as for `relativistic`, like kind.
        width: of the critic's two hidden layers.
        steps: of AdamW.
        batch_size: rows of each sample in a step.
        learning_rate: of AdamW, like weight_decay.
        seed: of the halves, the critic and the batches.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    for name, x in (("features_p", features_p), ("features_q", features_q)):
        _check_floats(name, x, "(n, d)", least=20)
    if features_p.shape[1] != features_q.shape[1]:
        raise ValueError(f"features must be as wide; got {features_p.shape[1]} and {features_q.shape[1]}.")
    relativistic(torch.zeros(2), torch.zeros(2), f, kind)  # refuses unknown names
    for name, count in (("width", width), ("steps", steps), ("batch_size", batch_size)):
        check_count(name, count, 2 if name == "batch_size" else 1)
    generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
    halves = [
        x.float()[torch.randperm(len(x), generator=generator)].split(-(-len(x) // 2)) for x in (features_p, features_q)
    ]
    (p, held_p), (q, held_q) = halves
    both = torch.cat([p, q])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = _Critic(both.mean(0), both.std(0).clamp(min=1e-6), width)
    optimizer = torch.optim.AdamW(critic.parameters(), learning_rate, weight_decay=weight_decay)
    for _ in range(steps):
        rows = [torch.randint(len(x), (min(batch_size, len(p), len(q)),), generator=generator) for x in (p, q)]
        loss = -relativistic(critic(p[rows[0]]), critic(q[rows[1]]), f, kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    estimator = "mvue" if kind == "paired" else "batch"

    def drawn(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (len(values),), generator=generator)]

    with torch.no_grad():
        x, y = critic(held_p), critic(held_q)
        value = float(relativistic(x, y, f, kind, estimator))
        own = float(relativistic(critic(p), critic(q), f, kind, estimator))
        replicates = torch.stack([relativistic(drawn(x), drawn(y), f, kind, estimator) for _ in range(100)])
    return Divergence(value, float(replicates.std()), own, critic)
