"""Adversarial score matching: the published losses, negative momentum, and checkpoints that hold everything."""

import dataclasses
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stubs import Stopped, equal, stop_at
from torch import nn

import fastsde
from fastsde.training.adversarial import Adam, Adversary
from fastsde.training.config import TrainConfig
from fastsde.training.gan_losses import average, gradient_penalty, lsgan, paired, sgan
from fastsde.training.loop import train
from fastsde.training.masking import Masking, attention_gini
from fastsde.training.networks import Discriminator


class Field(nn.Module):
    """A score network of two layers in two dimensions."""

    def __init__(self):
        super().__init__()
        self.inside, self.out = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x, t):
        return self.out(torch.tanh(self.inside(torch.cat([x, t[:, None].to(x)], 1))))


class Judge(nn.Module):
    """A discriminator with a buffer (spectral norm's vector)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(2, 8)), nn.Tanh(), nn.Linear(8, 1)
        )

    def forward(self, x):
        return self.layers(x).squeeze(1)


def setting(seed=0, sde=None, **options):
    torch.manual_seed(seed)
    model = fastsde.ScoreModel(Field().double(), sde or fastsde.VPSDE(), "epsilon", event_shape=(2,))
    return model, Adversary(Judge().double(), learning_rate=1e-2, **options)


DATA = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONFIG = TrainConfig(steps=12, batch_size=8, warmup=2, betas=(0.0, 0.9), bf16=False)


@pytest.mark.parametrize("betas", [(-0.5, 0.9), (0.0, 0.9), (0.9, 0.999)])
def test_adam_follows_its_formulas_also_with_negative_momentum(betas):
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = Adam([weight], 0.1, betas)
    expected, m, v = weight.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for k in range(1, 7):
        optimizer.zero_grad()
        (weight**3).sum().backward()
        optimizer.step()
        slope = 3 * expected**2
        m, v = betas[0] * m + (1 - betas[0]) * slope, betas[1] * v + (1 - betas[1]) * slope**2
        expected = expected - 0.1 * m / (1 - betas[0] ** k) / ((v / (1 - betas[1] ** k)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="the first of betas must be in"):
        Adam([weight], 0.1, (-1.0, 0.9))


def test_the_scale_of_a_gradient_does_not_slow_adam():
    """So masks, which scale the gradient of a linear critic by 1 - p, set no time scale (MaskedGAN, Proposition 1)."""
    ends = []
    for scale in (1.0, 0.55):
        weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        optimizer = Adam([weight], 0.1, (0.0, 0.999))
        for _ in range(10):
            optimizer.zero_grad()
            (scale * (weight - 3) ** 2).sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    # Up to Adam's epsilon of 1e-8, beside gradients above 1.
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-7)


def test_losses_are_equations_8_4_and_8_5():
    """On VE, where x_t = x + sigma z and H = x_t + sigma^2 s."""
    model, adversary = setting(sde=fastsde.VESDE(0.1, 5.0), weight=0.7)
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    t = torch.rand(6, generator=generator, dtype=torch.float64)
    sigma = model.sde.sigma(t)[:, None]
    noisy = x + sigma * z
    s = model(noisy, t).score
    denoised, judge = noisy + sigma**2 * s, adversary.discriminator
    judge.eval()  # spectral norm moves its vector at each call in training
    matching = (sigma * s + (noisy - x) / sigma).square().sum(1)
    score = ((judge(denoised) - 1).square() + 0.5 * 0.7 * matching).mean()
    critic = (judge(x) - 1).square().mean() + (judge(denoised) + 1).square().mean()
    torch.testing.assert_close(adversary.score_loss(model, x, t, z), score)
    torch.testing.assert_close(adversary.discriminator_loss(model, x, t, z), critic)


def test_the_gradient_penalty_is_added_between_real_and_denoised():
    model, plain = setting()
    _, penalised = setting(penalty=10.0)
    x, z = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    for adversary in (plain, penalised):
        adversary.discriminator.eval()
    mix = torch.rand(6, generator=torch.Generator().manual_seed(2)).double()
    # Real and fake are independent: the denoised sample is that of another row.
    denoised = model(model.sde.marginal(x, t, z), t).x_0.detach().roll(1, 0)
    expected = plain.discriminator_loss(model, x, t, z) + 10 * gradient_penalty(plain.discriminator, x, denoised, mix)
    found = penalised.discriminator_loss(model, x, t, z, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="generator is needed"):
        penalised.discriminator_loss(model, x, t, z)


class Coordinate(torch.nn.Module):
    """The critic C(x) = x_1."""

    def forward(self, x):
        return x[:, 0]


def test_a_paired_comparison_is_of_independent_real_and_denoised():
    """With little noise H(x_t) is x_0: eq. 4.11 for C(x) = x_1 is then a moment of two independent draws of the data.

    f(u) = (u - 1)^2 of u = x - x' has the mean 1 + 2 Var x; of a sample and its own denoised one it would be 1.
    """
    n, sde = 4000, fastsde.VESDE(0.01, 5.0)
    model = fastsde.ScoreModel(lambda x, t: torch.zeros_like(x), sde, "epsilon", event_shape=(2,))
    adversary = Adversary(Coordinate(), loss=lsgan(paired), weight=0.0)
    x, z = torch.randn(2, n, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    t = torch.full((n,), sde.t_min, dtype=torch.float64)
    # Two terms alike; five standard errors of a mean of (u - 1)^2, u normal with variance 2: sqrt(16 / n) for each.
    for loss in (adversary.discriminator_loss, adversary.score_loss):
        assert float(loss(model, x, t, z)) == pytest.approx(2 * (1 + 2), abs=2 * 5 * 4 / math.sqrt(n))
        with pytest.raises(ValueError, match="batch of at least 2"):
            loss(model, x[:1], t[:1], z[:1])


@pytest.mark.parametrize("loss", [sgan(), sgan(average)])
def test_each_loss_moves_its_own_network_only(loss):
    model, adversary = setting(loss=loss)
    x, z = torch.randn(2, 6, 2, dtype=torch.float64)
    t = torch.rand(6, dtype=torch.float64) * 0.9 + 0.05
    ours, theirs = list(model.network.parameters()), list(adversary.discriminator.parameters())
    adversary.score_loss(model, x, t, z).backward()
    assert all(p.grad is not None for p in ours)
    assert all(p.grad is None and p.requires_grad for p in theirs)
    model.network.zero_grad(set_to_none=True)
    adversary.discriminator_loss(model, x, t, z).backward()
    assert all(p.grad is None for p in ours)
    assert all(p.grad is not None for p in theirs)


def contents(path):
    return {key: value.clone() for key, value in load_file(path).items()}


def test_a_resumed_run_repeats_all_of_an_uninterrupted_one(tmp_path):
    model, adversary = setting(steps=2)
    train(model, DATA, None, CONFIG, tmp_path / "a.safetensors", adversary=adversary, save_every=4)
    model, adversary = setting(steps=2)
    stop = stop_at(8)
    with pytest.raises(Stopped):
        train(model, DATA, None, CONFIG, tmp_path / "b.safetensors", adversary=adversary, save_every=4, callback=stop)
    model, adversary = setting(seed=1, steps=2)
    train(model, DATA, None, CONFIG, tmp_path / "b.safetensors", adversary=adversary, save_every=4, resume=True)
    whole = contents(tmp_path / "a.safetensors")
    assert equal(whole, contents(tmp_path / "b.safetensors"))
    kinds = {key.split(".")[0] for key in whole}
    assert kinds == {"network", "ema", "discriminator", "adam", "discriminator_adam", "history"}


def long_run(path):
    model, adversary = setting()
    config = dataclasses.replace(CONFIG, steps=200)
    train(model, DATA, None, config, path, adversary=adversary, save_every=10, resume=path.is_file())
    return contents(path)


@pytest.mark.long
def test_killed_it_goes_on_to_the_same_numbers(tmp_path):
    """SIGKILL in the middle; then again from the checkpoint. Weights and both optimisers, bitwise."""
    path = tmp_path / "killed.safetensors"
    program = f"import pathlib, test_adversarial; test_adversarial.long_run(pathlib.Path({str(path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert equal(long_run(path), long_run(tmp_path / "whole.safetensors"))


def test_another_adversary_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    config = dataclasses.replace(CONFIG, steps=1)
    model, adversary = setting()
    train(model, DATA, None, config, path, adversary=adversary)
    for options in ({"weight": 2.0}, {"steps": 3}, {"loss": sgan()}):
        model, other = setting(**options)
        with pytest.raises(ValueError, match=r"other settings \(adversary"):
            train(model, DATA, None, config, path, adversary=other, resume=True)
    with pytest.raises(ValueError, match="adversary"):
        train(model, DATA, None, config, path, resume=True)


@pytest.mark.long
def test_the_discriminator_learns_to_tell_and_the_game_keeps_the_score(tmp_path):
    """A step of the discriminator lowers its loss; training with it still lowers the matching error."""
    model, adversary = setting()
    x, z = torch.randn(2, 256, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 256, dtype=torch.float64)
    before = float(adversary.discriminator_loss(model, x, t, z).detach())
    optimizer = adversary.optimizer()
    for _ in range(50):
        optimizer.zero_grad()
        adversary.discriminator_loss(model, x, t, z).backward()
        optimizer.step()
    assert float(adversary.discriminator_loss(model, x, t, z).detach()) < before
    matching = lambda: float((model(model.sde.marginal(x, t, z), t).epsilon - z).square().mean().detach())  # noqa: E731
    first = matching()
    config = dataclasses.replace(CONFIG, steps=300, batch_size=64, learning_rate=1e-2)
    train(model, DATA, None, config, tmp_path / "d.safetensors", adversary=adversary, save_every=300)
    assert matching() < 0.7 * first


def test_simultaneous_updates_take_both_gradients_at_the_same_weights(tmp_path):
    """The discriminator moves as in turns, the score network as beside a discriminator that stays where it is."""
    config = dataclasses.replace(CONFIG, steps=1, warmup=1)

    def after(name, **options):
        model, adversary = setting(weight=0.1)
        adversary = dataclasses.replace(adversary, **options)
        train(model, DATA, None, config, tmp_path / name, adversary=adversary)
        return [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model.network, adversary.network)]

    at_once, in_turn = after("a.safetensors", updates="simultaneous"), after("b.safetensors")
    beside_one_that_stays = after("c.safetensors", learning_rate=1e-300)
    assert torch.equal(at_once[1], in_turn[1])
    assert torch.equal(at_once[0], beside_one_that_stays[0])
    assert not torch.equal(at_once[0], in_turn[0])
    with pytest.raises(ValueError, match="steps must be 1 for simultaneous updates; got 2"):
        setting(updates="simultaneous", steps=2)
    with pytest.raises(ValueError, match="updates must be one of alternating, simultaneous; got 'both'"):
        setting(updates="both")


IMAGES = torch.randint(256, (32, 1, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


class Shift(nn.Module):
    """A score network with one weight: the denoised sample is x_t plus it."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return x + self.shift


def of_images(**options):
    torch.manual_seed(0)
    model = fastsde.ScoreModel(Shift(), fastsde.VPSDE(), "sample", event_shape=(1, 8, 8))
    return model, Adversary(Discriminator(1, 4, 1), **options)


def test_two_discriminators_see_one_kind_of_mask_each_and_their_losses_are_averaged():
    """Each half of the loss is that of an adversary with that discriminator and that kind of mask alone."""
    both = Masking(space=0.5, spectrum=0.4, patch=2, bands=4)
    kinds = (dataclasses.replace(both, spectrum=0.0), dataclasses.replace(both, space=0.0))
    model, first = of_images(masking=kinds[0])
    judge = Discriminator(1, 4, 1)
    second = dataclasses.replace(first, discriminator=judge, masking=kinds[1])
    together = dataclasses.replace(first, masking=both, spectral_discriminator=judge)
    together.network.eval()  # spectral norm moves its vector at each call in training
    x, z = torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.full((6,), 0.5, dtype=torch.float64)
    for name in ("discriminator_loss", "score_loss"):
        generator = torch.Generator().manual_seed(2)
        halves = [getattr(part, name)(model, x, t, z, {}, generator) for part in (first, second)]
        whole = getattr(together, name)(model, x, t, z, {}, torch.Generator().manual_seed(2))
        torch.testing.assert_close(whole, sum(halves) / 2)
    together.score_loss(model, x, t, z, {}, generator).backward()
    assert all(p.grad is None and p.requires_grad for p in together.network.parameters())
    with pytest.raises(ValueError, match="spectral_discriminator needs masking"):
        dataclasses.replace(together, masking=None)


def test_two_discriminators_are_trained_and_resumed(tmp_path):
    options = {"masking": Masking(patch=2, bands=4), "spectral_discriminator": Discriminator(1, 4, 1)}
    start = [p.detach().clone() for p in options["spectral_discriminator"].parameters()]
    config = dataclasses.replace(CONFIG, steps=2)
    model, adversary = of_images(**options)
    train(model, IMAGES, None, config, tmp_path / "a.safetensors", adversary=adversary)
    assert not any(
        torch.equal(a, b) for a, b in zip(start, options["spectral_discriminator"].parameters(), strict=True)
    )
    again, longer = of_images(**options), dataclasses.replace(config, steps=3)
    train(again[0], IMAGES, None, longer, tmp_path / "a.safetensors", adversary=again[1], resume=True)
    assert len(contents(tmp_path / "a.safetensors")["history.gini"]) == 3


def test_the_log_has_where_the_discriminator_looks(tmp_path):
    model, adversary = of_images(learning_rate=1e-2)
    found = {}

    def note(step, history, network):
        found[step] = history["gini"][-1], float(adversary.attention(IMAGES.float() / 127.5 - 1))

    config = dataclasses.replace(CONFIG, steps=2, batch_size=16)
    train(model, IMAGES, None, config, tmp_path / "a.safetensors", adversary=adversary, save_every=1, callback=note)
    logged, own = found[2]
    # Of 16 of the images and of all 32: the coefficients differ by a few percent from image to image.
    assert logged == pytest.approx(own, rel=0.1)
    # Looking leaves no trace.
    state = {key: value.clone() for key, value in adversary.network.state_dict().items()}
    adversary.attention(IMAGES.float())
    assert equal(state, adversary.network.state_dict())
    assert adversary.network.training
    # In evaluation, where spectral norm stands still, it is the function of masking.
    adversary.network.eval()
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(adversary.attention(x), attention_gini(adversary.discriminator, x).mean())
