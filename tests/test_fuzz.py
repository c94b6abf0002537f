"""Any arguments of the public functions end in a result, or in an error of ours that names the argument.

`python tests/test_fuzz.py 10000` tries that many; the suite a few hundred.
"""

import math
import re
import sys
import traceback
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsde
from fastsde import EDM, VESDE, VPSDE, DiscreteVPSDE, Grid, RectifiedFlow, ScoreModel, SubVPSDE
from fastsde.score import ClassifierFreeGuidance, Clipped, GaussianScore, Mask

pytestmark = pytest.mark.long  # the annotations would refuse what our own checks must
VP = VPSDE()
ODD = [None, "abc", "", -1, 0, 1, 2, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, 10**400, True, 1j, [], (), {}]
ODD += [b"x", object(), np.float32(0.5), np.int64(3), np.array([1.0, 2.0]), torch.tensor(0.5), torch.ones(2, 3)]
ODD += [torch.ones(2).long(), torch.empty(2, 3, device="meta"), torch.full((2, 3), math.nan), lambda *a, **k: 0.0]


def network(x, t, y=None):
    return -x


def pool(*good):
    """Mostly what is right, so that single faults are seen; else anything."""
    return st.one_of(st.sampled_from(good), st.sampled_from(good), st.sampled_from(good), st.sampled_from(ODD))


MODEL = ScoreModel(network, VP, event_shape=(3,), data_range=(-9.0, 9.0))
STATES = torch.full((2, 3), 0.25)
ACTIONS = {
    "VPSDE": (VPSDE, {"beta_min": pool(0.1), "beta_max": pool(20.0), "t_min": pool(1e-3), "t_max": pool(1.0)}),
    "SubVPSDE": (SubVPSDE, {"beta_min": pool(0.1), "beta_max": pool(20.0)}),
    "VESDE": (VESDE, {"sigma_min": pool(0.01), "sigma_max": pool(50.0), "t_max": pool(1.0)}),
    "EDM": (EDM, {"t_min": pool(0.01), "t_max": pool(80.0)}),
    "RectifiedFlow": (RectifiedFlow, {"t_min": pool(0.01), "t_max": pool(0.99)}),
    "DiscreteVPSDE": (
        DiscreteVPSDE,
        {"betas": pool([0.1, 0.2], None), "alphas_cumprod": pool(None, [0.9, 0.1]), "t_max": pool(1.0)},
    ),
    "Grid": (Grid, {"times": pool([0.9, 0.5, 0.1], torch.tensor([0.9, 0.1]))}),
    "Grid.log_snr": (lambda steps: Grid.log_snr(VP, steps), {"steps": pool(3, 5)}),
    "Adaptive": (fastsde.Adaptive, {"rtol": pool(0.05), "atol": pool(0.01), "h_init": pool(0.01), "r": pool(0.9)}),
    "ExponentialPC": (fastsde.ExponentialPC, {"steps": pool(None, 4), "eta": pool(0.0, 1.0), "order": pool(3, 2)}),
    "Heun": (fastsde.Heun, {"steps": pool(3), "churn": pool(0.0), "s_noise": pool(1.0)}),
    "ScoreModel": (
        lambda **k: ScoreModel(network, VP, **k),
        {
            "prediction": pool("epsilon"),
            "event_shape": pool((3,), None),
            "data_range": pool((0.0, 1.0)),
            "timestep": pool(None),
            "default_cond": pool(None, {"y": 1}),
        },
    ),
    "Clipped": (lambda **k: Clipped(MODEL, **k), {"limit": pool(1.0, None), "ratio": pool(None, 0.9)}),
    "Mask": (Mask, {"mask": pool(torch.ones(3), np.ones(3))}),
    "ClassifierFreeGuidance": (
        lambda **k: ClassifierFreeGuidance(MODEL, **k),
        {
            "scale": pool(2.0),
            "negative": pool(None, {"y": 1}),
            "rescale": pool(0.0, 0.5),
            "interval": pool(None, (0.1, 1.0)),
        },
    ),
    "sample": (
        lambda **k: fastsde.sample(MODEL, **k),
        {
            "n": pool(2, None),
            "shape": pool((2, 3), None),
            "rtol": pool(None, 0.5),
            "atol": pool(None, 0.1),
            "nfe": pool(None, 3),
            "solver": pool(None, fastsde.EulerMaruyama(3), fastsde.DDIM(2)),
            "controller": pool(None, None, Grid.log_snr(VP, 3)),
            "seed": pool(0, 7),
            "index": pool(None, [0, 1]),
            "batch_size": pool(None, 1),
            "cond": pool(None, {"y": torch.zeros(2)}),
            "x_init": pool(None, None, STATES),
            "x_data": pool(None, None, STATES),
            "strength": pool(None, None, 0.5),
            "t_start": pool(None, None, 0.5),
            "denoise": pool(True, False),
            "max_nfe": pool(None, 50),
            "dtype": pool(None, torch.float64),
            "device": pool(None, "cpu"),
            "trajectory": pool(False, True),
            "progress": pool(False),
            "callback": pool(None),
        },
    ),
    "encode": (
        lambda **k: fastsde.encode(MODEL, **k),
        {
            "x": pool(STATES),
            "rtol": pool(None, 0.5),
            "solver": pool(None, fastsde.DDIM(2)),
            "batch_size": pool(None, 2),
            "cond": pool(None),
            "trajectory": pool(False),
        },
    ),
    "integrate": (
        lambda **k: fastsde.integrate(lambda x, t: -x, None, **k),
        {
            "x0": pool(STATES),
            "t0": pool(0.0),
            "t1": pool(1.0),
            "rtol": pool(0.1),
            "atol": pool(0.1),
            "steps": pool(None, 3),
            "save_at": pool(None, [0.5]),
            "seed": pool(0),
            "max_nfe": pool(1000),
            "ito": pool(True),
        },
    ),
    "log_likelihood": (
        lambda **k: fastsde.log_likelihood(GaussianScore(VP, torch.zeros(3), torch.ones(3)), progress=False, **k),
        {
            "x": pool(STATES),
            "probes": pool(2),
            "exact": pool(True, False),
            "bin_width": pool(None, 0.1),
            "draws": pool(1),
            "rtol": pool(0.1),
            "atol": pool(0.1),
            "batch_size": pool(None, 2),
        },
    ),
}
CALLS = st.sampled_from(sorted(ACTIONS)).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries({}, optional=ACTIONS[name][1]))
)


def attempt(name, arguments):
    """Raises AssertionError if the call ends in anything but a result or an error of ours that names an argument."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ACTIONS[name][0](**arguments)
    except (ValueError, TypeError, fastsde.SamplingError) as error:
        message = str(error)
        own = [f for f in traceback.extract_tb(error.__traceback__) if "fastsde" in f.filename]
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        missing = re.search(r"missing \d+ required", message) is not None  # Python's own words for an argument left out
        named = any(re.search(rf"\b{key}\b", message) for key in [*ACTIONS[name][1], "shape", "samples", "times"])
        if missing or (own and "fastsde" in last and named):
            return
        raise AssertionError(f"{name}(**{arguments}): {type(error).__name__}: {message}") from error
    except Exception as error:
        raise AssertionError(f"{name}(**{arguments}): {type(error).__name__}: {error}") from error


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CALLS)
def test_a_result_or_an_error_that_names_the_argument(call):
    attempt(*call)


if __name__ == "__main__":
    many = settings(
        max_examples=int(sys.argv[1]), deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    many(given(CALLS)(lambda call: attempt(*call)))()
    print(f"{sys.argv[1]} examples")  # noqa: T201
