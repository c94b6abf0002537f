"""Introspective autoencoders: signs, stops and closed forms of their losses; what training does."""

import math

import pytest
import torch
from safetensors.torch import load_file
from stubs import Stopped, equal, stop_at
from torch import nn
from torch.distributions import Normal, kl_divergence

from fastsde.training.config import TrainConfig
from fastsde.training.introvae import (
    Draw,
    IntroVAE,
    SoftIntroVAE,
    decoded,
    divergence,
    frozen,
    posterior,
    sides,
    train_autoencoder,
)
from fastsde.training.networks import MLP, FlatAutoencoder, small_autoencoder

SPREAD, ROWS, DATA, LATENT = 0.6, 5, 3, 2


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Enc: mean W x and a constant spread; Dec: A z; in float64."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.encoder = nn.Linear(DATA, LATENT, bias=False, dtype=torch.float64)
        self.decoder = nn.Linear(LATENT, DATA, bias=False, dtype=torch.float64)
        for k, part in enumerate((self.encoder, self.decoder)):
            part.weight.data = scale * torch.randn(part.weight.shape, generator=seeded(k), dtype=torch.float64)

    def encode(self, x):
        mean = self.encoder(x)
        return mean, torch.full_like(mean, 2 * math.log(SPREAD))

    def decode(self, z):
        return self.decoder(z)


def draw(x=(DATA,), z=(LATENT,), rows=ROWS, dtype=torch.float64, seed=5):
    generator = seeded(seed)
    return Draw(*(torch.randn(rows, *shape, generator=generator, dtype=dtype) for shape in (x, z, z, z)))


def sampled(network, d):
    mean, logvar = posterior(network, d.x)
    return mean, logvar, mean + (0.5 * logvar).exp() * d.eps


def test_divergence_is_that_of_the_normal_and_not_negative():
    mean, logvar = torch.randn(2, 200, 3, 4, generator=seeded(0), dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(divergence(mean, logvar), expected, rtol=1e-12, atol=0)
    assert divergence(mean, logvar).min() > 0
    zero = torch.zeros(1, 3, dtype=torch.float64)
    assert divergence(zero, zero).item() == 0


@pytest.mark.parametrize("margin", [0.0, 3.0, 1e3])  # of what the decoder makes beyond it: all, some, none
def test_gradients_of_a_linear_gaussian_pair(margin):
    """By hand: the encoder sees what was decoded as data, the decoder sees z as data."""
    network, d, beta, alpha = Linear(), draw(), 0.7, 0.3
    w, a = network.encoder.weight, network.decoder.weight
    rule = IntroVAE(alpha, margin, beta)
    mean, logvar, z = sampled(network, d)
    loss, kl = rule.encoder(network, d, mean, logvar)
    (of_w,) = torch.autograd.grad(loss, w)
    (of_a,) = torch.autograd.grad(rule.decoder(network, d, z.detach()), a)
    with torch.no_grad():
        x_s = [z @ a.T, d.z_p @ a.T]
        expected = (mean + beta * (z @ a.T - d.x) @ a).T @ d.x / ROWS
        for x, name in zip(x_s, ("kl_reconstructed", "kl_generated"), strict=True):
            own = 0.5 * ((x @ w.T).square().sum(1) + LATENT * (SPREAD**2 - 1 - 2 * math.log(SPREAD)))
            torch.testing.assert_close(kl[name], own, rtol=1e-12, atol=0)
            inside = (own < margin).double()[:, None]
            expected -= alpha * (inside * (x @ w.T)).T @ x / ROWS
        torch.testing.assert_close(of_w, expected, rtol=1e-11, atol=1e-12)
        expected = beta * (x_s[0] - d.x).T @ z / ROWS
        for x, made_of in zip(x_s, (z, d.z_p), strict=True):
            expected += alpha * w.T @ (x @ w.T).T @ made_of / ROWS
        torch.testing.assert_close(of_a, expected, rtol=1e-11, atol=1e-12)
    if margin == 3.0:
        assert 0 < sum((kl[n] < margin).sum() for n in ("kl_reconstructed", "kl_generated")) < 2 * ROWS


def test_soft_gradients_of_a_linear_gaussian_pair():
    network, d = Linear(0.3), draw()
    w, a, s = network.encoder.weight, network.decoder.weight, 1 / DATA
    mean, logvar, z = sampled(network, d)
    rule = SoftIntroVAE(0.7, 0.4, 2.0, gamma=0.0)
    (of_a,) = torch.autograd.grad(rule.decoder(network, d, z.detach()), a)
    loss, _ = rule.encoder(network, d, mean, logvar)
    (of_w,) = torch.autograd.grad(loss, w)
    with torch.no_grad():
        x_s = [z @ a.T, d.z_p @ a.T]
        expected = 2 * 0.7 * (x_s[0] - d.x).T @ z
        for x, made_of in zip(x_s, (z, d.z_p), strict=True):
            expected += 0.4 / 2 * w.T @ (x @ w.T).T @ made_of
        torch.testing.assert_close(of_a, s * expected / ROWS, rtol=1e-11, atol=1e-12)
        expected = s * (2 * 0.7 * (x_s[0] - d.x) @ a + 0.4 * mean).T @ d.x
        for x in x_s:
            again = (x @ w.T + SPREAD * d.eps_s) @ a.T - x
            kl = 0.5 * ((x @ w.T).square().sum(1) + LATENT * (SPREAD**2 - 1 - 2 * math.log(SPREAD)))
            weight = -0.5 * s * (-2 * s * (0.7 * again.square().sum(1) + 2.0 * kl)).exp()[:, None]
            expected += (weight * (2 * 0.7 * again @ a + 2.0 * x @ w.T)).T @ x
        torch.testing.assert_close(of_w, expected / ROWS, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rule", [IntroVAE(beta=0.7), SoftIntroVAE(0.35, 1.0)], ids=["margin", "soft"])
def test_without_the_game_gradients_are_those_of_the_vae_bit_for_bit(rule):
    network, d = FlatAutoencoder(8, 1, 4, 8), draw((1, 8, 8), (4,), dtype=torch.float32)
    mean, logvar, z = sampled(network, d)
    x_r = network.decode(z)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
    plain = kl + 0.7 * (0.5 * (x_r - d.x).square().flatten(1).sum(1)).mean()
    encoder, decoder = (list(side.parameters()) for side in sides(network))
    expected = torch.autograd.grad(plain, [*encoder, *decoder])
    mean, logvar, z = sampled(network, d)
    ours = torch.autograd.grad(rule.plain.encoder(network, d, mean, logvar)[0], encoder, retain_graph=True)
    ours += torch.autograd.grad(rule.plain.decoder(network, d, z.detach()), decoder)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("rule", [IntroVAE(), SoftIntroVAE()], ids=["margin", "soft"])
def test_each_side_gets_its_own_gradient(rule):
    network, d = Linear(), draw()
    encoder, decoder = sides(network)
    with frozen(decoder):
        mean, logvar, z = sampled(network, d)
        rule.encoder(network, d, mean, logvar)[0].backward()
    assert all(p.grad is None and p.requires_grad for p in decoder.parameters())
    network.zero_grad()
    with frozen(encoder):
        rule.decoder(network, d, z.detach()).backward()
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in decoder.parameters())


@pytest.mark.parametrize("alpha", [0.2, 0.45, 0.7])
def test_the_least_of_divergence_and_hinge(alpha):
    """a y + b (m - y)^+ is least at m if a < b, else at 0, and then m min(a, b); here a = 1 and b = 2 alpha."""

    class Given(Linear):
        def encode(self, x):
            return torch.full((len(x), 1), (2 * self.y) ** 0.5, dtype=torch.float64), torch.zeros(len(x), 1)

        def decode(self, z):
            return torch.zeros(len(z), DATA, dtype=torch.float64)

    network, d, margin = Given(), draw(z=(1,)), 3.0
    d = Draw(torch.zeros_like(d.x), d.z_p, d.eps, d.eps_s)
    found = []
    for network.y in torch.linspace(0, 6, 61, dtype=torch.float64).tolist():
        found.append(IntroVAE(alpha, margin).encoder(network, d, *posterior(network, d.x))[0].item())
    best = min(range(61), key=found.__getitem__)
    assert found[best] == pytest.approx(margin * min(1, 2 * alpha), rel=1e-9)
    assert best / 10 == pytest.approx(margin if 2 * alpha > 1 else 0, abs=1e-9)


class Normed(FlatAutoencoder):
    """With batch normalisation in the place of group normalisation."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.encoder[1] = nn.BatchNorm2d(self.encoder[0].out_channels)


@pytest.mark.parametrize("rule", [IntroVAE(), SoftIntroVAE()], ids=["margin", "soft"])
def test_rows_do_not_know_each_other(rule):
    """The loss of two rows is the mean of theirs; with batch normalisation it is not."""

    def losses(network, d):
        mean, logvar, z = sampled(network, d)
        return torch.stack([rule.encoder(network, d, mean, logvar)[0], rule.decoder(network, d, z.detach())]).detach()

    def gap(network, latent):
        d = draw((1, 8, 8), latent, 2, torch.float32)
        one = [losses(network, Draw(*(part[k : k + 1] for part in vars(d).values()))) for k in range(2)]
        return float((losses(network, d) / torch.stack(one).mean(0) - 1).abs().max())

    torch.manual_seed(0)
    # Sums in float32, of up to some hundred terms.
    assert gap(FlatAutoencoder(8, 1, 4, 8), (4,)) < 1e-5
    assert gap(small_autoencoder(8, 1, widths=(8, 8)), (4, 4, 4)) < 1e-5
    assert gap(Normed(8, 1, 4, 8), (4,)) > 1e-3


class Points(nn.Module):
    """An autoencoder of points in the plane."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def encode(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean, logvar

    def decode(self, z):
        return self.decoder(z)


@pytest.mark.long
def test_eight_gaussians(tmp_path):
    """All modes are found; the divergence of data is below the margin, and that of what was made about it."""
    angle = torch.arange(8) * math.pi / 4
    centres = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    data = centres.repeat(500, 1) + 0.05 * torch.randn(4000, 2, generator=seeded(1))
    torch.manual_seed(0)
    margin = 4.0
    config = TrainConfig(400, 128, 3e-3, warmup=20, ema_decay=0.98, bf16=False)
    last = {}
    network = train_autoencoder(
        Points(),
        data,
        config,
        tmp_path / "c.safetensors",
        IntroVAE(0.5, margin, 20.0),
        plain=100,
        save_every=400,
        callback=lambda step, history, _: last.update(history),
    )
    with torch.no_grad():
        x_p = decoded(network, torch.randn(2000, 2, generator=seeded(2)))
    nearest, which = torch.cdist(x_p, centres).min(1)
    assert len(which[nearest < 0.3].unique()) == 8
    kl, of_p = (sum(last[name][-100:]) / 100 for name in ("kl", "kl_generated"))
    assert kl < margin
    # The hinge ends at the margin; its mean over rows, some of them beyond, is a little above: 4.02 in two runs.
    assert margin <= of_p < margin + 0.2


@pytest.mark.parametrize("rule", [IntroVAE(alpha=0.0), IntroVAE(), SoftIntroVAE()], ids=["plain", "margin", "soft"])
def test_resume_repeats_an_uninterrupted_run_bitwise(tmp_path, rule):
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=seeded(0))

    def run(name, seed, steps=6, **options):
        torch.manual_seed(seed)
        config = TrainConfig(steps, 4, warmup=2, bf16=False)
        file = tmp_path / f"{name}.safetensors"
        return train_autoencoder(FlatAutoencoder(8, 1, 4, 8), images, config, file, rule, save_every=3, **options)

    expected = run("whole", 0)
    with pytest.raises(Stopped):
        run("half", 0, callback=stop_at(3))
    resumed = run("half", 1, resume=True)
    assert equal(resumed.state_dict(), expected.state_dict())
    assert equal(*(load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "half")))
    rule = IntroVAE(0.1, 3.0, 2.0)
    with pytest.raises(ValueError, match="other settings"):
        run("half", 0, resume=True)


def test_a_loss_that_is_not_finite_stops(tmp_path):
    images = torch.randn(20, 1, 8, 8, generator=seeded(0))
    network = FlatAutoencoder(8, 1, 4, 8)
    network.encoder[-1].weight.data[:] = 1e30
    with pytest.raises(FloatingPointError, match="encoder at step 0"):
        train_autoencoder(network, images, TrainConfig(2, 4, bf16=False), tmp_path / "c.safetensors", IntroVAE())
    assert not (tmp_path / "c.safetensors").exists()


def test_what_cannot_be_trained_is_refused(tmp_path):
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=seeded(0))
    config, file = TrainConfig(2, 4, bf16=False), tmp_path / "c.safetensors"
    other = FlatAutoencoder(12, 1, 4, 8)
    other.encoder = FlatAutoencoder(8, 1, 4, 8).encoder
    with pytest.raises(ValueError, match="decode must give images as encode takes them"):
        train_autoencoder(other, images, config, file, IntroVAE())
    with pytest.raises(TypeError, match="modules encoder and decoder"):
        train_autoencoder(MLP(2), images, config, file, IntroVAE())
    with pytest.raises(ValueError, match="plain must be"):
        train_autoencoder(other, images, config, file, IntroVAE(), plain=-1)
    for wrong in (lambda: IntroVAE(alpha=-1.0), lambda: IntroVAE(beta=0.0), lambda: IntroVAE(margin=math.nan)):
        with pytest.raises(ValueError, match="must be in"):
            wrong()
    with pytest.raises(ValueError, match="beta_neg must be in"):
        SoftIntroVAE(beta_neg=0.0)
    with pytest.raises(ValueError, match="multiples of 8"):
        small_autoencoder(8, 1, widths=(8, 9))
    with pytest.raises(ValueError, match="divisible by 4"):
        small_autoencoder(6, 1, widths=(8, 8, 8))
