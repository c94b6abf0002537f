"""The drop-in scheduler in pipelines of diffusers: it leads where the own loop leads, and what cannot work is refused.

`benchmarks/pipelines.py` runs all of `tiny_pipelines.PIPELINES` with more steps and writes docs/measured/pipelines.md.
"""

import pytest
import tiny_pipelines
from tiny_pipelines import drop_in

from fastsde.diffusers import FastSDEScheduler

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize(
    "name",
    [
        "FluxImg2ImgPipeline",  # says mu to a scheduler that does not shift by it
        "CogView4Pipeline",  # times and levels
        "MochiPipeline",  # time runs the other way
        "CogVideoXPipeline",  # the shifted SNR
    ],
)
def test_the_drop_in_leads_where_the_own_loop_leads(name):
    ours, own = drop_in(name, 12)
    # Own loops are of first order and as far from their limit as 12 steps are from 6; both may err, on either side. A
    # wrong sign, time or start is 0.2 or more.
    assert ours < 2.5 * own + 0.01


def needs_torchsde(name):
    """Stable Audio's scheduler cannot be made without it."""
    if name == "StableAudioPipeline":
        pytest.importorskip("torchsde")


@pytest.mark.parametrize("name", ["CosmosTextToWorldPipeline", "StableAudioPipeline"])
def test_what_the_drop_in_cannot_do_is_refused(name):
    needs_torchsde(name)
    with pytest.raises(ValueError, match="with its own scheduler"):
        drop_in(name, 2)


def test_the_drop_in_keeps_a_pipelines_keys():
    pipe, _ = tiny_pipelines.PIPELINES["CogVideoXPipeline"]()
    scheduler = FastSDEScheduler.from_config(pipe.scheduler.config)
    assert scheduler.config["snr_shift_scale"] == 3.0
    again = FastSDEScheduler.from_config(scheduler.config)
    assert repr(again.sde) == repr(scheduler.sde)
    assert (again.alphas_cumprod == scheduler.alphas_cumprod).all()
