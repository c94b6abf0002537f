"""The live queue of pipelines: each request gets what `sample_pipeline` gives it alone."""

import pytest
import torch
from tiny_pipelines import PIPELINES

import fastsde
from fastsde import ExponentialPC, PipelineSampler, SamplingError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
ASKED = [
    {"n": 2, "nfe": 8},
    {"n": 1, "rtol": 0.3},
    {"n": 2, "num_inference_steps": 5},
    {"n": 1, "nfe": 6, "solver": ExponentialPC(eta=1.0)},
]


def built(name):
    pipe, arguments = PIPELINES[name]()
    return pipe, {**arguments, "output_type": "latent"}


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusion3Pipeline"]
)
def test_each_request_gets_what_sample_pipeline_gives(name):
    pipe, arguments = built(name)
    alone = [fastsde.sample_pipeline(pipe, seed=k, progress=False, **arguments, **how) for k, how in enumerate(ASKED)]
    with PipelineSampler(pipe, batch_size=4) as sampler:
        requests = [sampler.submit(seed=k, **arguments, **how) for k, how in enumerate(ASKED)]
        for request, one in zip(requests, alone, strict=True):
            live = request.result(60)
            assert torch.equal(live.result.nfe, one.result.nfe)
            # A forward of more rows may round differently in single precision.
            torch.testing.assert_close(live.result.samples, one.result.samples, rtol=1e-3, atol=1e-3)
            assert len(live.outputs) == len(one.outputs)
    stats = sampler.stats()
    assert stats.rows == stats.needed
    assert stats.turns < sum(int(one.result.nfe.max()) for one in alone)  # they ran at the same time


def test_a_pipeline_that_fails_is_alone():
    pipe, arguments = built("StableDiffusionPipeline")

    def broken(pipe, step, t, tensors):
        raise KeyError("my own mistake")

    one = fastsde.sample_pipeline(pipe, n=2, seed=1, nfe=8, progress=False, **arguments)
    with PipelineSampler(pipe, batch_size=4, nfe=8) as sampler:
        good = sampler.submit(n=2, seed=1, **arguments)
        bad = sampler.submit(seed=2, **arguments, callback_on_step_end=broken)
        embedded = {
            "prompt": None,
            "prompt_embeds": torch.zeros(1, 3, 5),
            "negative_prompt_embeds": torch.zeros(1, 3, 5),
        }
        misshapen = sampler.submit(seed=3, **{**arguments, **embedded})
        with pytest.raises(SamplingError, match="my own mistake"):
            bad.result(60)
        with pytest.raises(RuntimeError):
            misshapen.result(60)
        torch.testing.assert_close(good.result(60).result.samples, one.result.samples, rtol=1e-3, atol=1e-3)
    assert sampler.stats().requests == {"failed": 2, "finished": 1}


def test_cancelled_pipelines_leave_the_pipeline_as_it_was():
    pipe, arguments = built("StableDiffusionPipeline")
    one = fastsde.sample_pipeline(pipe, seed=1, nfe=8, progress=False, **arguments)
    with PipelineSampler(pipe, batch_size=2) as sampler:
        long = sampler.submit(n=2, nfe=2000, **arguments)
        again = sampler.submit(seed=1, nfe=8, **arguments)
        long.cancel()
        torch.testing.assert_close(again.result(60).result.samples, one.result.samples, rtol=1e-3, atol=1e-3)
    after = fastsde.sample_pipeline(pipe, seed=1, nfe=8, progress=False, **arguments)
    assert torch.equal(after.result.samples, one.result.samples)


def test_a_pipeline_that_changes_its_network_needs_one_slot():
    pipe, arguments = built("StableDiffusionPAGPipeline")
    one = fastsde.sample_pipeline(pipe, n=2, seed=1, nfe=8, progress=False, **arguments)
    with PipelineSampler(pipe, batch_size=2, nfe=8) as sampler, pytest.raises(ValueError, match="batch_size=1"):
        sampler.submit(n=2, seed=1, **arguments).result(60)
    with PipelineSampler(pipe, batch_size=1, nfe=8) as sampler:
        requests = [sampler.submit(n=2, seed=1, **arguments) for _ in range(2)]
        for request in requests:
            torch.testing.assert_close(request.result(60).result.samples, one.result.samples, rtol=1e-3, atol=1e-3)


def test_bad_requests_are_refused_before_they_join():
    pipe, arguments = built("StableDiffusionPipeline")
    with PipelineSampler(pipe) as sampler:
        with pytest.raises(TypeError, match="callback"):
            sampler.submit(**arguments, nfe=8, callback=3)
        with pytest.raises(TypeError, match="takes no hight"):
            sampler.submit(**arguments, hight=64)
        with pytest.raises(ValueError, match="nfe must be"):
            sampler.submit(**arguments, nfe=0)
    assert sampler.stats().turns == 0
