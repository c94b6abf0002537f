"""Score matching: three losses, one minimiser, and the variances that their forms say."""

import pytest
import torch
from torch import nn

import fastsde
from fastsde.score import GaussianScore
from fastsde.training.config import TrainConfig
from fastsde.training.loop import train
from fastsde.training.losses import dsm_loss, implicit_score_loss, noisy_score_loss, sliced_score_loss

STD = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_exact_trace_is_that_of_a_linear_score():
    matrix = torch.tensor([[1.0, 0.5, 0.0], [-0.2, 2.0, 0.3], [0.0, 0.1, 0.7]], dtype=torch.float64)
    x = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    expected = -matrix.trace() + 0.5 * (x @ matrix.mT).square().sum(1)
    torch.testing.assert_close(implicit_score_loss(lambda y: -y @ matrix.mT, x), expected, rtol=1e-12, atol=0)
    # A slice along a unit vector sees its diagonal element alone.
    unit = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(5, 3)
    along = sliced_score_loss(lambda y: -y @ matrix.mT, x, unit)
    torch.testing.assert_close(along, expected + matrix.trace() - 2.0, rtol=1e-12, atol=1e-12)


def test_the_losses_share_their_minimiser_on_a_gaussian():
    """The loss of -x / s^2 is least at the data's variance: its gradient vanishes there."""
    x = STD * torch.randn(2000, 3, generator=generator(1), dtype=torch.float64)
    precision = (1 / x.square().mean(0)).requires_grad_()
    signs = torch.randint(2, x.shape, generator=generator(2)).double() * 2 - 1
    for values in (
        implicit_score_loss(lambda y: -y * precision, x),
        sliced_score_loss(lambda y: -y * precision, x, signs),
    ):
        (slope,) = torch.autograd.grad(values.mean(), precision)
        # d / d a of -a + a^2 m / 2 is a m - 1, which is 0 to rounding; signs add nothing to a diagonal matrix.
        torch.testing.assert_close(slope, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_spread_of_a_slice_is_what_its_form_says():
    # For the score -x of N(0, I) in d dimensions: | x |^2 / 2 has variance d / 2, v^T v with normal v another 2 d.
    d, n = 784, 4000
    x, v = (torch.randn(n, d, generator=generator(k), dtype=torch.float64) for k in (3, 4))
    normals, signs = (sliced_score_loss(torch.neg, x, directions) for directions in (v, v.sign()))
    # The standard error of a standard deviation is 1 / sqrt(2 n) of it: five of them.
    assert float(normals.std()) == pytest.approx((2.5 * d) ** 0.5, rel=5 / (2 * n) ** 0.5)
    assert float(signs.std()) == pytest.approx((d / 2) ** 0.5, rel=5 / (2 * n) ** 0.5)
    few = x[:3, :8]
    torch.testing.assert_close(
        sliced_score_loss(torch.neg, few, v[:3, :8].sign()), implicit_score_loss(torch.neg, few), rtol=1e-12, atol=0
    )


class Affine(nn.Module):
    """eps = (1 + gain) eps of the law: exact at gain 0."""

    def __init__(self, law):
        super().__init__()
        self.law, self.gain = law, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t):
        return -(1 + self.gain) * self.law.sde.sigma(t)[:, None] * self.law.exact_score(x, t)


@pytest.mark.parametrize("exact", [False, True], ids=["sliced", "implicit"])
def test_matching_noisy_scores_has_the_gradient_of_denoising_in_the_mean(exact):
    sde, n = fastsde.VPSDE(), 40_000
    law = GaussianScore(sde, torch.zeros(3), STD)
    model = fastsde.ScoreModel(Affine(law), sde, "epsilon", event_shape=(3,))
    x_0 = STD * torch.randn(n, 3, generator=generator(5), dtype=torch.float64)
    noise = torch.randn(n, 3, generator=generator(6), dtype=torch.float64)
    t = torch.linspace(0.1, 1.0, n, dtype=torch.float64)[torch.randperm(n, generator=generator(7))]
    signs = None if exact else torch.randint(2, x_0.shape, generator=generator(8)).double() * 2 - 1
    gain = model.network.gain
    for at, slope in ((0.0, 0.0), (0.5, None)):
        with torch.no_grad():
            gain.fill_(at)
        ours, theirs = (
            torch.autograd.grad(loss.mean(), gain)[0]
            for loss in (noisy_score_loss(model, x_0, t, noise, directions=signs), dsm_loss(model, x_0, t, noise))
        )
        # Both are means of n terms of size about 1, times 1 + gain: five standard errors of each.
        assert float(ours) == pytest.approx(float(theirs), abs=10 * (1 + at) * 1.5 / n**0.5)
        assert slope is None or abs(float(ours)) < 5 * 1.5 / n**0.5


@pytest.mark.long
@pytest.mark.parametrize("objective", ["sliced", "implicit"])
def test_training_with_it_finds_the_score_of_a_gaussian(objective, tmp_path):
    sde = fastsde.VPSDE()

    class Linear(nn.Module):
        """eps = x sigma / (v alpha^2 + sigma^2), the data's variance v being learned."""

        def __init__(self):
            super().__init__()
            self.log_variance = nn.Parameter(torch.zeros(2))

        def forward(self, x, t):
            alpha, sigma = sde.alpha(t.double()).float()[:, None], sde.sigma(t.double()).float()[:, None]
            return x * sigma / (self.log_variance.exp() * alpha**2 + sigma**2)

    model = fastsde.ScoreModel(Linear(), sde, "epsilon", event_shape=(2,))
    data = torch.randn(4000, 2, generator=generator(9)) * torch.tensor([0.5, 1.5])
    config = TrainConfig(steps=200, batch_size=256, learning_rate=0.05, warmup=10, bf16=False, objective=objective)
    train(model, data, None, config, tmp_path / "run.safetensors")
    found = model.network.log_variance.detach().exp()
    torch.testing.assert_close(found, data.var(0), rtol=0.1, atol=0)  # measured within 4 %


def test_refusals():
    with pytest.raises(ValueError, match=r"objective must be one of denoising, sliced, implicit; got 'exact'"):
        TrainConfig(objective="exact")
