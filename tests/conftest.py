"""Options and fixtures shared by all tests. Shape and type checks come from the pytest options in pyproject.toml."""

import os

import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# The same examples in every run, and no timing: a loaded machine must not fail a proof.
settings.register_profile("fastsde", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("fastsde")


def pytest_addoption(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help="device that is compared with the CPU (default: %(default)s)")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def without_type_checks():
    """What a user runs: refusals of wrong types come from fastsde itself, not from the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests marked `long` call the same functions thousands of times; checking each call would double their time."""
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("long") is not None)
    return (yield)
