"""Settings of a training run."""

from __future__ import annotations

import dataclasses

from fastsde.checks import check_choice, check_count, check_flags, check_number

OBJECTIVES = ("denoising", "sliced", "implicit")
"""Ways to match scores."""


def check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    """The two numbers, or a ValueError for what Adam's formulas do not take; a negative first momentum they do."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a tuple of two numbers; got {betas!r}.")
    first = check_number("the first of betas", betas[0], -1.0, 1.0, ends="()")
    return first, check_number("the second of betas", betas[1], 0.0, 1.0, ends="[)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; all of them are stored with its checkpoints.

    Attributes:
        steps: optimiser steps in all; the learning rate falls linearly to 0 over them.
        batch_size: images a step.
        learning_rate: peak learning rate of Adam.
        warmup: steps over which the learning rate rises from 0.
        ema_decay: final decay of the averaged weights.
        label_dropout: share of the labels replaced by "no label".
        grad_clip: largest norm of the gradient.
        betas: of Adam; (0, 0.9) for adversarial training.
        seed: determines initial weights, batches, times and noise.
        bf16: run the network in bfloat16 under autocast; weights and loss stay float32.
        levels: geometric levels of noise to train at, each as likely (thesis, eqs. 8.1 and 8.2); 0 for uniform times.
        objective: "denoising"; or "sliced" or "implicit", which match the score of the noisy data without knowing that
            of p(x_t | x_0). "implicit" takes as many backward passes as an image has numbers.

    Raises:
        ValueError, TypeError: naming the setting that is out of range or of the wrong kind.
    """

    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup: int = 200
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    grad_clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    bf16: bool = True
    levels: int = 0
    objective: str = "denoising"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 1), ("seed", 0), ("levels", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("learning_rate", "grad_clip"):
            check_number(name, getattr(self, name), 0.0, ends="()")
        check_betas(self.betas)
        for name in ("ema_decay", "label_dropout"):
            check_number(name, getattr(self, name), 0.0, 1.0, ends="[)")
        if self.seed >= 1 << 40:
            raise ValueError(f"seed must be in [0, 2^40); got {self.seed}.")
        if self.levels == 1 or self.levels > 1_000_000:
            raise ValueError(f"levels must be 0 or from 2 to a million; got {self.levels}.")
        check_flags(bf16=self.bf16)
        check_choice("objective", self.objective, OBJECTIVES)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the given step: a linear rise over `warmup`, then a linear fall to 0."""
        return self.learning_rate * min((step + 1) / self.warmup, (self.steps - step) / self.steps)
