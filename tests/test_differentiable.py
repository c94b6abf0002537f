"""Gradients through sampling: against finite differences, plain autograd and closed forms; what memory they need."""

import math
import weakref

import pytest
import torch
from oracles import vector
from torch import nn

import fastsde
from fastsde import DDIM, EDM, VPSDE, ExponentialPC, Heun, RectifiedFlow, ScoreModel
from fastsde.score import DPS, ClassifierGuidance, GaussianScore, Mask

SDE = VPSDE()


class Network(nn.Module):
    """A small smooth network in float64, with dropout, which sampling must switch off in the backward pass, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()

    def forward(self, x, t, shift=None):
        x = x if shift is None else x + shift[:, None]
        return self.layers(torch.cat([x, t[:, None].to(x)], 1))


def models():
    model = ScoreModel(Network(), SDE, "epsilon", event_shape=(3,))
    return {
        "plain": model,
        "flow": ScoreModel(Network(), RectifiedFlow(), "flow_prediction", event_shape=(3,)),
        "classifier": ClassifierGuidance(model, lambda x, t: torch.cos(x - 1).sum(1)),
        "measurement": DPS(model, Mask(torch.tensor([1, 0, 1])), 0.5, vector(0.5, 0.0, -1.0)),
    }


def states(n=5):
    generator = torch.Generator().manual_seed(1)
    x, weights, direction = torch.randn(3, n, 3, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), weights, direction


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("plain", ExponentialPC()),
        ("plain", ExponentialPC(eta=1.0)),
        ("plain", DDIM()),
        ("plain", Heun()),
        ("plain", fastsde.UniPC()),
        ("plain", fastsde.PredictorCorrector(fastsde.ReverseDiffusion(), fastsde.Langevin())),
        ("flow", ExponentialPC()),
        ("classifier", ExponentialPC()),
        ("measurement", ExponentialPC()),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:40],
)
def test_the_gradient_is_that_of_finite_differences(name, solver):
    model, (x, weights, direction), shift = models()[name], states(), torch.zeros(5, dtype=torch.float64)

    def value(x, shift):
        r = fastsde.sample(
            model, x_init=x, cond={"shift": shift}, solver=solver, nfe=16, seed=3, batch_size=2, differentiable=True
        )
        return (weights * r.samples).sum()

    by_x, by_shift = torch.autograd.grad(value(x, shift.requires_grad_()), (x, shift))
    moved = direction[:, 0]
    with torch.no_grad():
        ends = [value(x + h * direction, shift + h * moved) for h in (1e-5, -1e-5)]
    # The mark for a central difference of 1e-5 in float64.
    expected = (ends[0] - ends[1]) / 2e-5
    assert math.isclose((by_x * direction).sum() + (by_shift * moved).sum(), expected, rel_tol=1e-5)


def test_the_gradient_is_that_of_a_loop_in_plain_autograd():
    model, (x, weights, _) = models()["plain"], states()
    network, grid = model.network, fastsde.Grid.uniform(SDE, 4)
    r = fastsde.sample(model, x_init=x, solver=DDIM(), controller=grid, batch_size=2, differentiable=True)
    assert network.training  # and still the gradient is that without dropout
    got = torch.autograd.grad((weights * r.samples).sum(), (x, *network.parameters()))

    network.eval()
    alpha, sigma = SDE.alpha(grid.times), SDE.sigma(grid.times)
    x_t = x
    for k in range(4):
        eps = network(x_t, grid.times[k].expand(5))
        x_0 = (x_t - sigma[k] * eps) / alpha[k]
        x_t = alpha[k + 1] * x_0 + sigma[k + 1] * eps
    eps = network(x_t, grid.times[4].expand(5))
    last = (x_t - sigma[4] * eps) / alpha[4]
    expected = torch.autograd.grad((weights * last).sum(), (x, *network.parameters()))
    # Roundings of float64, in sums of different order.
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_fitted_solver_has_gradients():
    model, (x, weights, direction) = models()["plain"], states()
    fitted = fastsde.fit(model, nfe=4, pilots=8, progress=False)

    def value(x):
        return (weights * fastsde.sample(model, x_init=x, solver=fitted, differentiable=True).samples).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        expected = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert math.isclose((gradient * direction).sum(), expected, rel_tol=1e-5)  # as above


def test_gradients_of_a_row_do_not_depend_on_the_batch():
    model, (x, weights, _) = models()["plain"], states()

    def gradient(rows, batch_size):
        part = x.detach()[rows].requires_grad_()
        r = fastsde.sample(model, x_init=part, index=rows, nfe=6, batch_size=batch_size, differentiable=True)
        return torch.autograd.grad((weights[rows] * r.samples).sum(), part)[0]

    whole = gradient([0, 1, 2, 3, 4], 5)
    for rows, size in (([0, 1, 2, 3, 4], 2), ([4, 1], 1)):
        torch.testing.assert_close(gradient(rows, size), whole[rows], rtol=1e-12, atol=1e-12)  # float64


def test_activations_of_one_step_are_held_however_many_there_are():
    alive, most = set(), 0

    class Activation(torch.autograd.Function):
        """The identity; what it saves for the backward pass is counted while it lives."""

        @staticmethod
        def forward(ctx, x):
            kept = x.clone()
            alive.add(id(kept))
            weakref.finalize(kept, alive.discard, id(kept))
            ctx.save_for_backward(kept)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def peak(steps):
        nonlocal most
        most = 0

        def network(x, t):
            nonlocal most
            for _ in range(10):
                x = torch.sin(Activation.apply(x))
            most = max(most, len(alive))
            return x

        x = torch.ones(2, 3, requires_grad=True)
        r = fastsde.sample(network, SDE, x_init=x, solver=ExponentialPC(steps=steps), differentiable=True)
        r.samples.sum().backward()
        return most

    assert peak(24) == peak(3) <= 20


def test_samples_are_those_without_gradients_and_none_is_recorded_where_torch_records_none():
    model, (x, _, _) = models()["plain"], states()
    with torch.no_grad():
        r = fastsde.sample(model, x_init=x, nfe=6, differentiable=True)
    assert not r.samples.requires_grad
    plain = fastsde.sample(model, x_init=x.detach(), nfe=6)
    recorded = fastsde.sample(model, x_init=x, nfe=6, differentiable=True)
    assert torch.equal(r.samples, plain.samples)
    assert torch.equal(recorded.samples, plain.samples)
    assert torch.equal(recorded.nfe, plain.nfe)


def test_edited_data_have_gradients():
    # The flow of N(0, 1) is linear, x_0 = x sqrt(...), so the gradient is the same for each element.
    model = GaussianScore(SDE, torch.zeros(2), torch.ones(2))
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    fastsde.sample(model, x_data=x, strength=0.5, nfe=40, differentiable=True).samples.sum().backward()
    t = vector(SDE.t_min + 0.5 * (SDE.t_max - SDE.t_min))
    # VP keeps variance 1, so the flow is the identity; the last denoising shrinks by alpha(t_min), 1 - 5e-6.
    torch.testing.assert_close(x.grad, float(SDE.alpha(t)) * torch.ones_like(x), rtol=1e-4, atol=0.0)


def test_the_likelihood_under_guidance_contains_the_curvature_of_the_classifier():
    # Data N(0, 1), a measurement y = x_0 + N(0, 1): p(y | x_t) is N(y; m, v) and the posterior N(y / 2, 1 / 2).
    sde, y = EDM(t_min=0.01, t_max=2000.0), 0.7
    prior = GaussianScore(sde, torch.zeros(1), torch.ones(1))

    def log_prob(x, t):
        variance = (t**2 / (1 + t**2) + 1)[:, None]
        return -((y - x / (1 + t**2)[:, None]) ** 2 / variance).sum(1) / 2

    x = torch.tensor([[0.0], [0.5], [1.5]], dtype=torch.float64)
    r = fastsde.log_likelihood(ClassifierGuidance(prior, log_prob), x=x, exact=True, rtol=1e-6, atol=1e-6)
    # The end at t_max is taken to be N(0, t_max^2), with an error of order y / t_max; t_min adds 1e-4 to the variance.
    expected = -((x[:, 0] - y / 2) ** 2) - 0.5 * math.log(math.pi)
    torch.testing.assert_close(r.log_prob, expected, rtol=0.0, atol=2e-3)


def test_what_has_no_gradient_is_refused_before_or_at_the_first_call():
    model, (x, _, _) = models()["plain"], states()
    with pytest.raises(ValueError, match="differentiable=True needs one fixed grid"):
        fastsde.sample(model, x_init=x, solver=fastsde.ExtrapolatedEM(), differentiable=True)
    with pytest.raises(ValueError, match=r"x_init requires a gradient.*differentiable=True"):
        fastsde.sample(model, x_init=x, nfe=5)

    @torch.no_grad()
    def constant(x, t):
        return -x

    with pytest.raises(ValueError, match="must be differentiable in x"):
        fastsde.sample(constant, SDE, x_init=x, nfe=5, differentiable=True)
    with pytest.warns(UserWarning, match="carry no gradient"):
        fastsde.sample(constant, SDE, shape=(2, 3), nfe=5, differentiable=True)
