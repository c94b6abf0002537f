"""Guidance against exact scores, its cost, and the errors."""

import pytest
import torch
from oracles import vector
from stubs import Recorder, never

import fastsde
from fastsde import DDIM, EDM, VPSDE, Grid, ScoreModel
from fastsde.score import ClassifierFreeGuidance, ClassifierGuidance, Clipped, GaussianScore
from fastsde.score.base import BoundModel

SDE = EDM(t_min=0.1, t_max=20.0)
"""With alpha = 1, so that data N(m, 1) have the score (m - x) / (1 + t^2)."""
MEANS = vector(-1.0, 2.0, 5.0)
"""Of three classes of one-dimensional data with variance 1; the last stands for "no label"."""
NULL = {"class_labels": torch.tensor(2)}


def class_score(x, t, class_labels):
    return (MEANS[class_labels][:, None] - x) / (1 + t**2)[:, None]


def score_of(mean, x, t):
    return (mean - x) / (1 + t**2)[:, None]


def guided(**options):
    network = Recorder(class_score)
    model = ScoreModel(network, SDE, event_shape=(1,))
    return ClassifierFreeGuidance(model, negative=NULL, **options), network


def full(model, n, **cond):
    """Conditioning as the engine gives it, defaults included."""
    return {**{k: v.expand(n, *v.shape) for k, v in model.default_cond.items()}, **cond}


def test_guidance_moves_the_mean():
    # With equal variances, guidance is a Gaussian again, around m_null + w (m - m_null).
    model, _ = guided(scale=1.5)
    x, t, labels = torch.randn(4, 1).double(), vector(0.1, 1.0, 5.0, 20.0), torch.tensor([0, 1, 0, 2])
    mean = MEANS[2] + 1.5 * (MEANS[labels] - MEANS[2])
    score = model(x, t, full(model, 4, class_labels=labels)).score
    # Roundings of float64.
    torch.testing.assert_close(score, score_of(mean[:, None], x, t), rtol=1e-12, atol=1e-12)


def test_scales_and_labels_travel_with_their_sample():
    model, _ = guided()
    labels, scales = torch.arange(7) % 2, torch.linspace(0, 3, 7)
    cond = {"class_labels": labels, "guidance_scale": scales}
    r = fastsde.sample(model, n=7, rtol=1e-3, batch_size=3, cond=cond, dtype=torch.float64)
    code = fastsde.sample(model, n=7, rtol=1e-3, batch_size=7, cond=cond, dtype=torch.float64)
    assert torch.equal(r.samples, code.samples)
    # The flow of N(m, 1) from N(0, t_max^2), with x - m scaled by sqrt((1 + t^2) / (1 + t_max^2)), then denoised.
    start = fastsde.noise.FreshNoise(0, (1,), torch.float64).prior(torch.arange(7)) * SDE.t_max
    mean = (MEANS[2] + scales.double() * (MEANS[labels] - MEANS[2]))[:, None]
    end = mean + (start - mean) * ((1 + SDE.t_min**2) / (1 + SDE.t_max**2)) ** 0.5
    expected = (end + SDE.t_min**2 * mean) / (1 + SDE.t_min**2)
    # Four digits at this tolerance.
    torch.testing.assert_close(r.samples, expected, rtol=0, atol=2e-3)


def test_both_halves_are_one_batch_and_two_calls():
    model, network = guided(scale=2.0)
    r = fastsde.sample(model, n=5, solver=DDIM(steps=4), cond={"class_labels": torch.arange(5) % 2})
    assert r.nfe.tolist() == [10] * 5
    assert sum(len(x) for x, _, _ in network.calls) == 50
    assert {len(x) for x, _, _ in network.calls} == {10}
    assert network.calls[0][2]["class_labels"].tolist() == [0, 1, 0, 1, 0, 2, 2, 2, 2, 2]


def test_outside_of_the_interval_the_other_half_is_not_called(capfd):
    model, network = guided(scale=4.0, interval=(1.0, 5.0))
    grid = Grid([20.0, 10.0, 4.0, 2.0, 0.5, 0.1])
    cond = {"class_labels": torch.tensor([0, 1, 1])}
    r = fastsde.sample(model, n=3, solver=DDIM(), controller=grid, cond=cond, progress=True)
    # Six times, two of them (4 and 2) within.
    assert r.nfe.tolist() == [8] * 3
    assert "mean_nfe=8.0" in capfd.readouterr().err.split("\r")[-1]
    assert [len(x) for x, _, _ in network.calls] == [3, 3, 6, 6, 3, 3]
    x, t, labels = torch.randn(3, 1).double(), vector(0.5, 2.0, 10.0), torch.tensor([0, 1, 1])
    bound = BoundModel(model, full(model, 3, class_labels=labels), torch.tensor([True, True, False]))
    score = bound(x, t).score
    mean = torch.where(t == 2.0, MEANS[2] + 4 * (MEANS[labels] - MEANS[2]), MEANS[labels])
    torch.testing.assert_close(score, score_of(mean[:, None], x, t), rtol=1e-12, atol=1e-12)
    assert bound.nfe.tolist() == [1, 2, 0]


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling(rescale):
    answer = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0)).double()  # by row and by y

    def network(x, t, y):
        return answer[torch.arange(len(y)) % 2, y]

    model = ClassifierFreeGuidance(
        ScoreModel(network, SDE, "epsilon"), 3.0, negative={"y": torch.tensor(1)}, rescale=rescale
    )
    cond = full(model, 2, y=torch.tensor([0, 0]))
    out = model(torch.zeros(2, 6).double(), vector(1.0, 1.0), cond).epsilon
    plain = answer[:, 1] + 3 * (answer[:, 0] - answer[:, 1])
    ratio = answer[:, 0].std(1, keepdim=True) / plain.std(1, keepdim=True)
    torch.testing.assert_close(out, plain * (rescale * ratio + 1 - rescale), rtol=1e-12, atol=1e-12)


def test_what_has_no_negative_twin_goes_to_both():
    network = Recorder()
    model = ClassifierFreeGuidance(ScoreModel(network, SDE, event_shape=(1,)), 2.0)
    cond = {"text": torch.ones(2, 3), "negative_text": torch.zeros(2, 3), "size": torch.tensor([7, 8])}
    fastsde.sample(model, n=2, solver=DDIM(steps=1), cond=cond)
    seen = network.calls[0][2]
    assert sorted(seen) == ["size", "text"]
    assert seen["text"][:, 0].tolist() == [1, 1, 0, 0]
    assert seen["size"].tolist() == [7, 8, 7, 8]


def test_classifier_guidance_gives_the_posterior():
    # Data N(0, 1), y = x_0 + N(0, 0.5^2): p(y | x_t) is normal around E[x_0 | x_t], so this is the posterior's score.
    sde, noise = VPSDE(), 0.25
    prior = GaussianScore(sde, torch.zeros(1).double(), torch.ones(1).double())

    def log_prob(x, t, y):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        mean, variance = alpha[:, None] * x, sigma**2 + noise  # alpha^2 + sigma^2 = 1
        return -0.5 * (y - mean).square().sum(1) / variance

    model = ClassifierGuidance(prior, log_prob, keys=("y",))
    x, t, y = (
        torch.randn(5, 1).double(),
        torch.linspace(0.05, 1, 5).double(),
        torch.randn(5, 1).double(),
    )
    with torch.no_grad():
        score = model(x, t, {"y": y}).score
    mean, variance = y / (1 + noise), noise / (1 + noise)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    exact = -(x - alpha * mean) / (alpha**2 * variance + sigma**2)
    torch.testing.assert_close(score, exact, rtol=1e-10, atol=1e-10)
    double = ClassifierGuidance(prior, log_prob, 2.0, keys=("y",))(x, t, {"y": y}).score
    torch.testing.assert_close(double - score, score - prior(x, t).score, rtol=1e-10, atol=1e-10)
    r = fastsde.sample(model, n=6, rtol=0.05, cond={"y": torch.zeros(6, 1)})
    assert r.success.all()


def test_clipping_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    x_0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 2
    inner = ScoreModel(lambda x, t: x_0, SDE, "sample")
    t = vector(1.0, 2.0, 3.0)
    assert torch.equal(Clipped(inner, 1.5)(x_0, t).x_0, x_0.clamp(-1.5, 1.5))
    for limit in (1.0, 2.5, 10.0):
        scheduler = diffusers.DDIMScheduler(thresholding=True, sample_max_value=limit, dynamic_thresholding_ratio=0.9)
        ours = Clipped(inner, limit, ratio=0.9)(x_0, t).x_0
        torch.testing.assert_close(ours, scheduler._threshold_sample(x_0), rtol=1e-12, atol=1e-12)


def test_wrong_arguments_are_refused_before_the_first_call():
    inner = ScoreModel(never, SDE, event_shape=(1,))
    for wrong in ({"rescale": 1.5}, {"interval": (2.0, 1.0)}, {"interval": (-1.0, 1.0)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClassifierFreeGuidance(inner, **wrong)
    for build in (lambda: ClassifierFreeGuidance(never), lambda: ClassifierGuidance(inner, 3), lambda: Clipped(never)):
        with pytest.raises(TypeError):
            build()
    for limit, ratio in ((0.0, None), (1.0, 1.0)):
        with pytest.raises(ValueError, match=r"limit|ratio"):
            Clipped(inner, limit, ratio=ratio)
    with pytest.raises(ValueError, match="guidance needs the condition of the unguided half"):
        fastsde.sample(ClassifierFreeGuidance(inner), n=2)
    model = ClassifierFreeGuidance(inner, negative=NULL)
    with pytest.raises(ValueError, match="negative_class_labels but not"):
        fastsde.sample(model, n=2)
    with pytest.raises(ValueError, match="guidance_scale"):
        fastsde.sample(model, n=2, cond={"guidance_scale": torch.tensor([1.0, torch.inf])})
    with pytest.raises(ValueError, match="classifier needs cond with y"):
        fastsde.sample(ClassifierGuidance(inner, never, keys=("y",)), n=2)
    with pytest.raises(ValueError, match="log_prob must return shape"):
        fastsde.sample(ClassifierGuidance(inner, lambda x, t: x), n=2)
