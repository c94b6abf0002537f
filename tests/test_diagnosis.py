"""`diagnose` on one exact mixture in many dressings: the denoised prediction is known, so is the right reading."""

import dataclasses

import pytest
import torch

import fastsde
from fastsde import EDM, VPSDE, DiscreteVPSDE, RectifiedFlow, ScoreModel, diagnose

pytestmark = pytest.mark.long
torch.manual_seed(0)
DIM = 16
MEANS = torch.rand(6, DIM, generator=torch.Generator().manual_seed(3)) * 1.4 - 0.7
STD = 0.12
TABLE = DiscreteVPSDE(torch.linspace(1e-4, 0.02, 1000))
TIMES = {
    "t": (lambda t: t, lambda k: k),
    "1 - t": (lambda t: 1 - t, lambda k: 1 - k),
    "1000 * t - 1": (lambda t: 1000 * t - 1, lambda k: (k + 1) / 1000),
    "1000 * (1 - t)": (lambda t: 1000 * (1 - t), lambda k: 1 - k / 1000),
}
"""The SDE's time to the network's, and back."""


def draw(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return MEANS[torch.randint(6, (n,), generator=generator)] + STD * torch.randn(n, DIM, generator=generator)


@dataclasses.dataclass(frozen=True)
class Dress:
    """A network of the mixture: what it predicts, its sign, its time, the range of its data."""

    sde: fastsde.SDE
    prediction: str
    sign: int = 1
    time: str = "1000 * t - 1"
    data_range: tuple = (-1.0, 1.0)

    def __repr__(self):
        minus = "" if self.sign == 1 else "-"
        return f"{type(self.sde).__name__} {minus}{self.prediction} {self.time} {self.data_range}"

    def framed(self, x):
        low, high = self.data_range
        return (x + 1) * (high - low) / 2 + low

    def x_0(self, x, t):
        """The exact E[x_0 | x_t]."""
        means, std = self.framed(MEANS.double()), STD * (self.data_range[1] - self.data_range[0]) / 2
        alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
        variance = (alpha * std) ** 2 + sigma**2
        apart = x.double()[:, None] - alpha[:, :, None] * means
        weights = (-apart.square().sum(2) / (2 * variance)).softmax(1)
        return (weights[..., None] * (means + (alpha * std**2 / variance)[:, :, None] * apart)).sum(1)

    def __call__(self, x, time):
        sde = self.sde
        t = TIMES[self.time][1](time.double()).clamp(0.5 * sde.t_min, sde.t_max)
        alpha, sigma, x_0 = sde.alpha(t)[:, None], sde.sigma(t)[:, None], self.x_0(x, t)
        eps = (x - alpha * x_0) / sigma
        forms = {
            "score": -eps / sigma,
            "epsilon": eps,
            "sample": x_0,
            "v_prediction": alpha * eps - sigma * x_0,
            "flow_prediction": eps - x_0,
        }
        return (self.sign * forms[self.prediction]).float()

    def right(self):
        network = self if self.sign == 1 else lambda x, t: -self(x, t)
        forward = TIMES[self.time][0]
        options = {"event_shape": (DIM,), "data_range": self.data_range, "timestep": forward}
        return ScoreModel(network, self.sde, self.prediction, **options)

    def naive(self):
        """What somebody writes who knows the process alone."""
        prediction = "flow_prediction" if isinstance(self.sde, RectifiedFlow) else "epsilon"
        return ScoreModel(self, self.sde, prediction, event_shape=(DIM,), timestep=lambda t: t)


def agrees(model, dress):
    """Whether a score model gives the exact denoised prediction at three times."""
    sde, x_0 = dress.sde, dress.framed(draw(32, seed=5))
    for share in (0.1, 0.4, 0.8):
        t = torch.full((32,), sde.t_min + share * (sde.t_max - sde.t_min), dtype=torch.float64)
        x = sde.marginal(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)))
        # Float32 outputs, and levels 1000 t - 1 beside 1000 t: below a fiftieth of the range.
        if (dress.x_0(x, t) - model(x, t).x_0).abs().max() > 0.02 * (dress.data_range[1] - dress.data_range[0]):
            return False
    return True


VP, FLOW = VPSDE(), RectifiedFlow()
PREDICTIONS = ("score", "epsilon", "sample", "v_prediction", "flow_prediction")
DRESSES = [
    *(Dress(VP, p, sign) for p in PREDICTIONS for sign in (1, -1)),
    *(Dress(TABLE, p) for p in ("epsilon", "sample", "v_prediction")),
    *(Dress(FLOW, "flow_prediction", sign, time) for sign in (1, -1) for time in TIMES),
    Dress(VP, "epsilon", data_range=(0.0, 1.0)),
    Dress(VP, "v_prediction", -1, "1 - t", (0.0, 1.0)),
    Dress(FLOW, "flow_prediction", 1, "t", (0.0, 255.0)),
    Dress(EDM(), "sample", time="t"),
]


@pytest.mark.parametrize("dress", DRESSES, ids=repr)
def test_the_true_reading_is_found_with_data(dress):
    found = diagnose(dress.naive(), data=draw(16))
    assert found.model is not None
    assert agrees(found.model, dress)
    assert found.fits == (agrees(dress.naive(), dress) and dress.data_range == (-1.0, 1.0))


@pytest.mark.parametrize("dress", [d for d in DRESSES if d.data_range == (-1.0, 1.0)][::5], ids=repr)
def test_the_true_reading_is_found_without_data(dress):
    found = diagnose(dress.naive())
    assert found.model is not None
    assert agrees(found.model, dress)


@pytest.mark.parametrize("dress", DRESSES, ids=repr)
def test_the_right_reading_passes(dress):
    # Without data as well for some; of data in 0 .. 255 the start, noise alone, is not the law.
    alone = DRESSES.index(dress) % 4 == 0 and dress.data_range[1] <= 1
    for data in (dress.framed(draw(16)), None)[: 1 + alone]:
        found = diagnose(dress.right(), data=data)
        assert found.fits
        assert found.best == found.given
        # The exact prediction is the best there is, in expectation; the rest is chance of 16 samples.
        assert (found.error < 1.2).all()


def test_what_is_seen_is_said():
    dress = Dress(FLOW, "flow_prediction", 1, "t", (0.0, 255.0))
    assert "not large beside data" not in diagnose(dress.right(), data=dress.framed(draw(16))).advice
    table = Dress(TABLE, "epsilon", data_range=(0.0, 255.0))
    assert "sigma / alpha is 157, which is not large" in diagnose(table.right(), data=table.framed(draw(16))).advice
    unit = ScoreModel(
        Dress(VP, "epsilon", data_range=(0.0, 1.0)),
        VP,
        "epsilon",
        event_shape=(DIM,),
        timestep=TIMES["1000 * t - 1"][0],
    )
    assert "is data_range (0, 1)" in diagnose(unit).advice
    assert "data_range is (-1, 1): one of the two is wrong" in diagnose(unit, data=200 * draw(16)).advice
    found = diagnose(lambda x, t: torch.zeros_like(x), VP, shape=(DIM,), data=draw(16))
    assert not found.fits
    assert "No usual reading fits" in found.advice
    assert "sigma / alpha" in str(found)


@pytest.mark.parametrize("sde", [VP, FLOW, TABLE, EDM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("wrong", ["flow_prediction", "v_prediction"])
def test_a_wrong_reading_that_is_better_than_linear_does_not_pass(sde, wrong):
    """Shrunk predictions of data about zero are not bad, but those of the right reading are better."""
    dress = Dress(sde, "epsilon", time="t")
    model = ScoreModel(dress, sde, wrong, event_shape=(DIM,), data_range=(-1.0, 1.0), timestep=TIMES["t"][0])
    found = diagnose(model, data=draw(16))
    assert not found.fits
    assert agrees(found.model, dress)


def test_guided_and_clipped_models_are_diagnosed():
    dress = Dress(VP, "epsilon", -1)

    def network(x, t, y):
        return dress(x, t)

    def conditional(prediction_network):
        return ScoreModel(prediction_network, VP, "epsilon", event_shape=(DIM,), timestep=TIMES[dress.time][0])

    data, cond = draw(80), {"y": torch.zeros(80)}
    wrong = fastsde.score.ClassifierFreeGuidance(conditional(network), 2.0, negative={"y": 0.0})
    found = diagnose(fastsde.score.Clipped(wrong), data=data, cond=cond)
    assert (found.fits, found.best.sign) == (False, -1)
    right = fastsde.score.ClassifierFreeGuidance(
        conditional(lambda x, t, y: -network(x, t, y)), 2.0, negative={"y": 0.0}
    )
    assert diagnose(right, data=data, cond=cond).fits


def test_strong_guidance_is_no_wrong_reading():
    dress = Dress(VP, "epsilon")

    def network(x, t, y):  # without the condition, the prediction of nothing but noise
        return torch.where(y[:, None] > 0, dress(x, t), x)

    model = ScoreModel(network, VP, "epsilon", event_shape=(DIM,), timestep=TIMES[dress.time][0])
    guided = fastsde.score.ClassifierFreeGuidance(model, 7.5, negative={"y": 0.0})
    found = diagnose(guided, data=draw(16), cond={"y": torch.ones(16)})
    assert found.fits
    assert "guidance or clipping" in found.advice


def test_a_few_data_are_enough_to_pass_the_right_reading():
    dress = Dress(VP, "epsilon")
    for n in (4, 6, 10):
        assert diagnose(dress.right(), data=draw(n, seed=n)).fits
    with pytest.raises(ValueError, match="data must have at least 4 rows, better 16; got 3"):
        diagnose(dress.right(), data=draw(3))


def test_the_picture_and_the_refusals(tmp_path):
    found = diagnose(Dress(VP, "v_prediction").naive(), data=draw(16))
    found.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="does not know its event shape"):
        diagnose(lambda x, t: -x, VP)
    with pytest.raises(ValueError, match="shape must be the shape of one sample"):
        diagnose(lambda x, t: -x, VP, shape=(0,))
    with pytest.raises(ValueError, match=r"samples have shape \(16,\); got \(3,\)"):
        diagnose(Dress(VP, "epsilon").naive(), data=torch.zeros(16, 3))
