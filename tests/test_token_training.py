"""Losses of masked-token networks and of critics, and their loop."""

import itertools

import pytest
import torch
from stubs import Stopped, equal, stop_at

import fastsde
from fastsde import tokens
from fastsde.tokens import Critic, ExactTokens, Masking, TokenModel
from fastsde.tokens.networks import CodeBook, TokenTransformer
from fastsde.training.config import TrainConfig
from fastsde.training.tokens import critic_loss, masked_loss, train_tokens

torch.manual_seed(2)
LAW = ExactTokens(torch._standard_gamma(torch.full((3, 3, 3), 0.4, dtype=torch.float64)))
MASKS = torch.tensor(list(itertools.product([False, True], repeat=3)))


def enumerated(model, process, times):
    """E of `masked_loss` at times with shape (k,), over all data and masks, with shape (k,)."""
    model.process = process
    k = len(times)
    x_0, q, share = LAW.sequences.repeat(k, 1), LAW.joint.flatten(), process.share(times)
    total = torch.zeros(k).double()
    for mask in MASKS:
        chance = torch.where(mask, share[:, None], 1 - share[:, None]).prod(1)
        uniform = torch.where(mask, 0.0, 1.0).double().expand(27 * k, 3)
        loss = masked_loss(model, x_0, times.repeat_interleave(27), uniform)
        total += chance * (loss.reshape(k, 27) * q).sum(1)
    return total


@pytest.mark.parametrize(
    "schedule", [tokens.LINEAR, tokens.SINE, tokens.SINE_SQUARED, tokens.power(3.0)], ids=lambda s: s.formula
)
def test_the_loss_of_exact_conditionals_is_the_entropy_of_the_data(schedule):
    """The integral over t by Gauss and Legendre: with 24 nodes exact to 1e-6 for these schedules."""
    import numpy as np

    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(24))
    value = float((weights / 2 * enumerated(LAW, Masking(schedule), (nodes + 1) / 2)).sum())
    assert value == pytest.approx(LAW.entropy, rel=1e-6)


def test_another_network_loses_its_divergence():
    """The loss minus the entropy is the mean divergence of the conditionals, and positive."""
    other = ExactTokens(LAW.joint + 0.02)
    at = torch.tensor([0.3, 0.9]).double()
    right, wrong = (enumerated(model, Masking(), at) for model in (LAW, other))
    assert (wrong > right + 1e-3).all()


def test_without_the_weight_masked_tokens_count_alike():
    x_0 = LAW.sequences
    t, u = torch.full((27,), 0.25, dtype=torch.float64), torch.rand(27, 3, dtype=torch.float64)
    LAW.process = Masking()
    plain, weighted = (masked_loss(LAW, x_0, t, u, weighted=flag) for flag in (False, True))
    torch.testing.assert_close(weighted, plain / 0.25)
    torch.testing.assert_close(plain[(u >= 0.25).all(1)], torch.zeros(int((u >= 0.25).all(1).sum())).double())


def test_the_gradient_of_the_critics_loss_vanishes_at_bayes_rule():
    """P(original | completed) by enumeration at a share of 1/2; 60,000 draws, to five standard errors."""
    LAW.process = Masking()
    x_0, q, n = LAW.sequences, LAW.joint.flatten(), 60_000
    mass, original = torch.zeros(27).double(), torch.zeros(27, 3).double()
    for mask in MASKS:
        p = LAW(x_0.masked_fill(mask, tokens.MASK), torch.ones(27).double()).softmax(-1)
        chance = torch.ones(27, 27).double()
        for axis in range(3):
            same = (x_0[:, None, axis] == x_0[None, :, axis]).double()
            chance = chance * (p[:, axis][:, x_0[:, axis]] if mask[axis] else same)
        reached = (q[:, None] * chance).sum(0) / 8
        mass, original = mass + reached, original + reached[:, None] * (~mask).double()
    table = torch.logit(original / mass[:, None]).requires_grad_()
    critic = Critic(lambda x: table[(x * torch.tensor([9, 3, 1])).sum(1)])
    generator = torch.Generator().manual_seed(0)
    rows = torch.multinomial(q, n, replacement=True, generator=generator)
    uniform, fill = torch.rand(2, n, 3, dtype=torch.float64, generator=generator)
    half = torch.full((n,), 0.5, dtype=torch.float64)
    loss = critic_loss(critic, LAW, x_0[rows], half, uniform, fill).mean()
    (gradient,) = torch.autograd.grad(loss, table)
    error = (mass[:, None] * (original / mass[:, None]) * (1 - original / mass[:, None]) / n).sqrt()
    assert ((gradient / error).abs() < 5).all()


CONFIG = TrainConfig(steps=6, batch_size=8, learning_rate=1e-2, warmup=1, bf16=False)


def parts(seed=0):
    torch.manual_seed(seed)
    network = TokenTransformer(4, 6, classes=2, width=8, depth=1, heads=2)
    return network, TokenModel(network, 4, event_shape=(2, 3), default_cond={"class_labels": torch.tensor(2)})


DATA = torch.randint(4, (20, 2, 3), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 2


def test_a_resumed_training_ends_at_the_same_numbers(tmp_path):
    whole, model = parts()
    train_tokens(model, DATA, LABELS, CONFIG, tmp_path / "whole.safetensors")
    half, model = parts()
    with pytest.raises(Stopped):
        train_tokens(model, DATA, LABELS, CONFIG, tmp_path / "half.safetensors", save_every=3, callback=stop_at(3))
    with pytest.raises(FileExistsError, match="resume"):
        train_tokens(model, DATA, LABELS, CONFIG, tmp_path / "half.safetensors")
    half, model = parts(seed=5)
    train_tokens(model, DATA, LABELS, CONFIG, tmp_path / "half.safetensors", resume=True)
    assert equal(whole.state_dict(), half.state_dict())


def test_a_critics_training_leaves_the_model_alone(tmp_path):
    network, model = parts()
    before = [p.clone() for p in network.parameters()]
    torch.manual_seed(1)
    judge = TokenTransformer(4, 6, classes=2, outputs=1, width=8, depth=1, heads=2)
    start = judge.head.bias.clone()
    critic = Critic(judge, (2, 3))
    train_tokens(model, DATA, LABELS, CONFIG, tmp_path / "critic.safetensors", critic=critic)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert not torch.equal(start, judge.head.bias)
    solver = tokens.TokenCritic(critic, steps=3)
    result = fastsde.sample(model, n=4, cond={"class_labels": LABELS[:4]}, solver=solver)
    assert result.success.all()


def test_bad_tokens_are_refused(tmp_path):
    _, model = parts()
    with pytest.raises(ValueError, match="int64 from 0 to 3"):
        train_tokens(model, DATA + 1, LABELS, CONFIG, tmp_path / "x.safetensors")
    exact = ExactTokens(torch.ones(4, 4))
    with pytest.raises(TypeError, match="must be a torch module"):
        train_tokens(exact, DATA[:, 0, :2], None, CONFIG, tmp_path / "x.safetensors")


def test_a_code_book_gives_the_nearest_code_and_gradients_go_straight_through():
    torch.manual_seed(0)
    book = CodeBook(codes=5, width=4, code_width=3).eval()
    images = torch.randn(3, 1, 8, 8)
    found = book.encode(images)
    z = book.encoder(images).movedim(1, -1)
    distance = (z[..., None, :] - book.codes).square().sum(-1)
    assert torch.equal(found, distance.argmin(-1))
    book.loss(images).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in book.parameters())
    assert book.decode(found).shape == images.shape
