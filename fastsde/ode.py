"""The probability-flow ODE as a function, for solvers of other libraries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsde.arguments import as_model
from fastsde.score.base import BoundModel, ScoreModel
from fastsde.score.network import evaluation_mode
from fastsde.sde.base import SDE
from fastsde.types import Cond, ScoreFn


class ProbabilityFlowODE:
    r"""dx/dt = f(t) x - g(t)^2 score(x, t) / 2, in the signature of torchdiffeq: `ode(t, x)`.

    With `times = torch.tensor([sde.t_max, sde.t_min])`, `torchdiffeq.odeint(ode, x, times, options={"step_t":
    times[1:]})[-1]` draws samples. Without the option its adaptive methods step beyond the end, where the process is
    not defined. Our own solver is `sample(..., solver=ProbabilityFlow())`. Source: Song et al.,
    https://arxiv.org/abs/2011.13456, eq. 13.

    Args:
        score_fn, sde: as for `sample`.
        cond: keyword arguments of the network, each with the leading axis of x.

    Attributes:
        nfe: network calls so far. Each is for the whole batch.

    Raises:
        TypeError, ValueError: as for `sample`.
    """

    def __init__(self, score_fn: ScoreModel | ScoreFn, sde: SDE | None = None, *, cond: Cond | None = None) -> None:
        self.model = as_model(score_fn, sde)
        self.sde = self.model.sde if sde is None else sde
        self.cond, self.nfe = cond or {}, 0

    def __call__(self, t: Tensor | float, x: Tensor) -> Tensor:
        """The slope at (x, t), with the shape of x (B, *event); t is one number, or one for each row (B,)."""
        times = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x))
        bound = BoundModel(self.model, self.cond, torch.ones(len(x), dtype=torch.bool, device=x.device))
        with evaluation_mode(self.model.network):
            slope = self.sde.probability_flow_drift(x, times, bound(x, times).score)
        self.nfe += int(torch.as_tensor(bound.nfe).max())
        return slope
