"""Networks read under a scheduler's configuration: what they are given, and what becomes of their answers."""

from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch
from oracles import vector

import fastsde
from fastsde import DDIM, Grid
from fastsde.diffusers import DiffusersModel, from_diffusers, read_schedule
from fastsde.score import MixtureScore
from fastsde.score.base import reading_hash

DDPM = diffusers.DDPMScheduler(clip_sample=False).config
GENERATOR = torch.Generator().manual_seed(0)
MEANS = torch.randn(3, 4, generator=GENERATOR, dtype=torch.float64)
NONE = torch.zeros(3, 4, 0, dtype=torch.float64)


class Recording:
    """A network with a configuration and a text UNet's signature that keeps what it was given and answers zero."""

    def __init__(self, **config):
        self.config, self.calls = config, []

    def __call__(self, sample, timestep, encoder_hidden_states=None, class_labels=None):
        self.calls.append((sample, timestep, encoder_hidden_states, class_labels))
        return (torch.zeros_like(sample),)


class Dressed:
    """The exact prediction of a mixture in the dress of a network of diffusers, called at the network's own times."""

    def __init__(self, reading, fourier):
        self.reading, self.config = reading, {"time_embedding_type": "fourier"} if fourier else {}
        mixture = MixtureScore(reading.sde, vector(0.2, 0.3, 0.5), MEANS, NONE, NONE[:, 0], floor=0.05)
        self.exact = fastsde.ScoreModel(mixture.exact_score, reading.sde)

    def __call__(self, sample, timestep):
        reading = self.reading
        t = reading.time(timestep.double())
        s = reading.sigma_data
        if s is not None:  # undo EDM's preconditioning
            sigma = reading.sde.sigma(t)[:, None]
            x = sample * (sigma**2 + s**2).sqrt()
            c_out = sigma * s / (sigma**2 + s**2).sqrt() * (-1 if reading.prediction == "v_prediction" else 1)
            return (self.exact(x, t).x_0 - s**2 / (sigma**2 + s**2) * x) / c_out
        names = {"sample": "x_0", "v_prediction": "v", "flow_prediction": "velocity"}
        return getattr(self.exact(sample, t), names.get(reading.prediction, reading.prediction))


def table(schedule, prediction, zero_snr=False):
    return {"beta_schedule": schedule, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}


DRESSES = {
    f"{schedule} {prediction}{' zero-snr' * zero_snr}": table(schedule, prediction, zero_snr)
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
    for prediction in ("epsilon", "v_prediction", "sample")
    for zero_snr in (False, True)
    if not (zero_snr and prediction == "epsilon")
}
DRESSES |= {
    "flow": {"shift": 1.0},
    "shifted flow": {"shift": 3.0},
    "ve": {"snr": 0.15, "sigma_min": 0.01, "sigma_max": 50.0},
    "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
    "edm v": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "prediction_type": "v_prediction"},
    "continuous": {**table("linear", "v_prediction"), "timestep_type": "continuous"},
}


def dressed(name):
    return from_diffusers(Dressed(read_schedule(DRESSES[name]), fourier=name == "ve"), DRESSES[name])


@pytest.fixture(scope="module")
def reference():
    """Samples of the mixture itself between half log-SNRs of -1.6 and 1.8, which every process passes."""
    return between(MixtureScore(fastsde.EDM(), vector(0.2, 0.3, 0.5), MEANS, NONE, NONE[:, 0], floor=0.05))


def between(model):
    times = model.sde.t_of_log_snr(2 * torch.linspace(-1.6, 1.8, 12, dtype=torch.float64))
    data = MEANS[torch.arange(30) % 3]
    return fastsde.sample(model, x_data=data, controller=Grid(times), dtype=torch.float64).samples


@pytest.mark.long
@pytest.mark.parametrize("name", DRESSES)
def test_every_dress_gives_the_same_samples(name, reference):
    # Times in float64 but N t - 1 rounded; predictions of v and x_0 turn into each other by division by up to 1e4.
    torch.testing.assert_close(between(dressed(name)), reference, rtol=0, atol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["linear epsilon", "squaredcos_cap_v2 v_prediction zero-snr", "shifted flow", "ve", "edm", "continuous"]
)
def test_every_process_reaches_the_floor(name):
    """From its own start to its own end, by a tolerance."""
    model, sde = dressed(name)
    n = 400
    r = fastsde.sample(model, sde, shape=(n, 4), rtol=0.02, atol=1e-3, batch_size=n)
    assert r.success.all()
    near = torch.cdist(r.samples.double(), MEANS).argmin(1)
    share = near.bincount(minlength=3) / n
    # Four standard errors of a share of 400, 0.025 at most.
    torch.testing.assert_close(share.double(), vector(0.2, 0.3, 0.5), rtol=0, atol=0.1)
    # Spread around the means: variance 0.05 in 4 x 400 numbers, standard error 3.5 %; four of them.
    spread = (r.samples.double() - MEANS[near]).square().mean()
    # The components' tails that are nearer to another mean, and the tolerance, cost 2 % more.
    assert float(spread) == pytest.approx(0.05, rel=0.16)


def test_rows_get_their_own_time_label_and_text():
    network = Recording(in_channels=1, out_channels=1, sample_size=2, num_class_embeds=9)
    model, sde = from_diffusers(network, DDPM)
    text, labels = torch.arange(7.0).reshape(7, 1, 1).expand(7, 3, 2), torch.arange(7)
    cond = {"encoder_hidden_states": text, "class_labels": labels}
    x = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 1, 2, 2)
    # Each sample starts at its own state, and a zero prediction of the noise only scales it: rows are known by signs
    # and ratios, whatever slot they are in.
    r = fastsde.sample(model, sde, x_init=x, cond=cond, batch_size=3, rtol=0.05)
    assert r.success.all()
    for state, time, hidden, label in network.calls:
        assert time.dtype == torch.float32
        assert time.shape == (len(state),)
        assert torch.equal(hidden[:, 0, 0], label.float())
        scale = state[:, 0, 0, 0] / label.clamp(min=1)
        alpha = sde.alpha((time.double() + 1) / 1000)
        start = sde.alpha(vector(1.0))
        # x / alpha stays what it was at the start, in float32.
        torch.testing.assert_close(scale.double()[label > 0], (alpha / start)[label > 0], rtol=1e-4, atol=0)
    times = torch.cat([time for _, time, _, _ in network.calls])
    assert (times != times.round()).float().mean() > 0.5


def test_times_between_levels_reach_a_real_network():
    # diffusers rounds a time that is given as a Python number: this network would not tell 0.3 from 0.7.
    network = tiny.unet().double()
    model, _ = from_diffusers(network, DDPM)
    x = torch.randn(2, 3, 8, 8, generator=GENERATOR).double()
    out = model.output(x, vector(0.5013, 0.5017), {})
    by_hand = network(x, torch.tensor([500.3, 500.7]).double()).sample
    torch.testing.assert_close(out, by_hand, rtol=1e-9, atol=1e-9)
    assert (out[0] - model.output(x, vector(0.5017, 0.5017), {})[0]).abs().max() > 1e-7


NETWORKS = {
    "plain": (tiny.unet, DDPM, {}),
    "classes": (lambda: tiny.unet(num_class_embeds=5), DDPM, {"class_labels": torch.tensor([0, 4])}),
    "fourier": (
        lambda: tiny.unet(time_embedding_type="fourier", center_input_sample=True),
        diffusers.ScoreSdeVeScheduler(sigma_max=50.0).config,
        {},
    ),
    "text": (tiny.text_unet, DDPM, {"encoder_hidden_states": torch.randn(2, 7, 16, generator=GENERATOR)}),
    "sdxl": (
        tiny.sdxl_unet,
        DDPM,
        {
            "encoder_hidden_states": torch.randn(2, 7, 32, generator=GENERATOR),
            "text_embeds": torch.randn(2, 16, generator=GENERATOR),
            "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2),
        },
    ),
    "dit": (tiny.dit, DDPM, {"class_labels": torch.tensor([3, 10])}),
    "pixart": (
        tiny.pixart,
        DDPM,
        {
            "encoder_hidden_states": torch.randn(2, 5, 32, generator=GENERATOR),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        },
    ),
    "pixart with resolution": (
        lambda: tiny.pixart(use_additional_conditions=True),
        DDPM,
        {
            "encoder_hidden_states": torch.randn(2, 5, 32, generator=GENERATOR),
            "resolution": torch.tensor([[64.0, 64.0], [32.0, 64.0]]),
            "aspect_ratio": torch.tensor([[1.0], [0.5]]),
        },
    ),
    "sd3": (
        tiny.sd3,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config,
        {
            "encoder_hidden_states": torch.randn(2, 5, 32, generator=GENERATOR),
            "pooled_projections": torch.randn(2, 32, generator=GENERATOR),
        },
    ),
}


def by_hand(name, network, x, t, cond):
    """The network called as diffusers' pipelines do."""
    cond = dict(cond)
    added = {k: cond.pop(k) for k in ("text_embeds", "time_ids", "resolution", "aspect_ratio") if k in cond}
    if added:
        cond["added_cond_kwargs"] = added
    time = {"fourier": lambda: 0.01 * 5000**t, "sd3": lambda: 1000 * t}.get(name, lambda: 1000 * t - 1)()
    return network(x, timestep=time.float(), **cond).sample[:, : x.shape[1]]


def of_channels(name):
    return 4 if name in ("text", "sdxl", "dit", "sd3") or "pixart" in name else 3


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_is_called_as_its_pipeline_does(name):
    build, config, cond = NETWORKS[name]
    network = build()
    channels = of_channels(name)
    model, _ = from_diffusers(network, config, event_shape=(channels, 8, 8))
    x, t = torch.randn(2, channels, 8, 8, generator=GENERATOR), vector(0.3, 0.71)
    with torch.no_grad():
        # The same operations, but for the rounding of the time.
        torch.testing.assert_close(model.output(x, t, cond), by_hand(name, network, x, t, cond), rtol=1e-5, atol=1e-5)
    other = {key: value.flip(0) for key, value in cond.items()}
    r = fastsde.sample(model, n=2, nfe=5, cond=cond)
    assert r.success.all()
    assert r.nfe.tolist() == [5, 5]
    if cond:  # the condition matters, row by row; an untrained network listens little
        swapped = fastsde.sample(model, n=2, nfe=5, cond=other).samples
        assert (swapped - r.samples).flatten(1).abs().amax(1).min() > 0
        one = fastsde.sample(model, index=[1], nfe=5, cond={k: v[1:] for k, v in cond.items()}).samples
        torch.testing.assert_close(one[0], r.samples[1], rtol=1e-4, atol=1e-4 * float(r.samples.abs().max()))


def test_forward_derivatives_of_a_network():
    # Attention on a CPU has none.
    model, _ = from_diffusers(tiny.unet(add_attention=False).double(), DDPM)
    x, v = torch.randn(2, 2, 3, 8, 8, generator=GENERATOR, dtype=torch.float64)
    t = vector(0.3, 0.71)
    with torch.no_grad(), model.sampling():
        _, along = torch.func.jvp(lambda y: model.output(y, t), (x,), (v,))
        differences = (model.output(x + 1e-5 * v, t) - model.output(x - 1e-5 * v, t)) / 2e-5
    # Errors of the differences: 1e-10 from the step squared, and 1e-16 / 1e-5 from rounding.
    torch.testing.assert_close(along, differences, rtol=1e-7, atol=1e-7)


def test_weights_kept_in_eight_bits_are_used_in_more():
    network, exact = tiny.unet(), tiny.unet()
    network.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    model, _ = from_diffusers(network, DDPM)
    assert model.compute_dtype == from_diffusers(network, DDPM, clip=True).compute_dtype == torch.float32
    x, t = torch.randn(2, 3, 8, 8, generator=GENERATOR), vector(0.3, 0.71)
    with torch.no_grad():
        out, expected = model.output(x, t), from_diffusers(exact, DDPM).output(x, t)
    # Three bits behind the point: each weight is rounded by a 16th at most, in several layers one after another.
    assert 0 < float((out - expected).norm() / expected.norm()) < 1 / 8


def test_range_and_shape_come_from_the_configuration():
    model, _ = from_diffusers(tiny.unet(), DDPM)
    assert (model.event_shape, model.data_range) == ((3, 8, 8), (-1.0, 1.0))
    build, config, _ = NETWORKS["fourier"]
    model, sde = from_diffusers(build(), config)
    assert model.data_range == (0.0, 1.0)
    assert (model.prediction, repr(sde)) == ("score", "VESDE(sigma_min=0.01, sigma_max=50.0, t_min=1e-05, t_max=1.0)")
    assert from_diffusers(tiny.unet(size=(8, 4)), DDPM).event_shape == (3, 8, 4)


def test_the_score_sde_networks_divide_by_sigma_themselves():
    build, config, _ = NETWORKS["fourier"]
    network = build()
    model, sde = from_diffusers(network, config)
    x, t = torch.randn(2, 3, 8, 8, generator=GENERATOR), vector(0.5, 0.5)
    sigma = sde.sigma(t).float()
    last = {}
    network.conv_out.register_forward_hook(lambda _, inputs, out: last.update(out=out))
    with torch.no_grad():
        score = model(x, t).score
    # What its last layer gave, divided once: not by this library as well.
    torch.testing.assert_close(score, last["out"] / sigma[:, None, None, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_preconditioning_is_that_of_edm(prediction):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
    answer = torch.randn(2, 3, 4, 4, generator=GENERATOR).double()
    seen = []

    def network(x, timestep):
        seen.append((x, timestep))
        return answer

    model, _ = from_diffusers(network, scheduler.config)
    x, sigma = torch.randn(2, 3, 4, 4, generator=GENERATOR).double() * 3, vector(0.4, 7.0)
    x_0 = model(x, sigma).x_0
    for row, s in enumerate(sigma):
        torch.testing.assert_close(seen[0][0][row], scheduler.precondition_inputs(x[row], s), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen[0][1][row], scheduler.precondition_noise(s), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            x_0[row], scheduler.precondition_outputs(x[row], answer[row], s), rtol=1e-12, atol=1e-12
        )


def test_half_precision_networks_keep_a_full_precision_time():
    network = Recording(in_channels=1, out_channels=1, sample_size=2)
    module = tiny.unet().to(torch.bfloat16)
    model, _ = from_diffusers(module, DDPM)
    given = []
    module.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    r = fastsde.sample(model, n=2, nfe=4)
    assert r.samples.dtype == torch.float32
    (x, *_), kwargs = given[1]
    assert (x.dtype, kwargs["timestep"].dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(kwargs["timestep"], kwargs["timestep"].bfloat16().float())
    # Numbers per row keep their digits too; embeddings go along with the network.
    wide = DiffusersModel(network, read_schedule(DDPM))
    out = wide.call(
        torch.zeros(1, 1, 2, 2).bfloat16(), vector(3.3).float(), {"encoder_hidden_states": torch.ones(1, 1, 1)}
    )
    assert out[0].dtype == network.calls[0][2].dtype == torch.bfloat16


def test_guidance_of_a_network_counts_twice_and_dit_brings_its_null_label():
    network = tiny.dit()
    model, _ = from_diffusers(network, DDPM, guidance_scale=3.0)
    calls = []
    network.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["class_labels"]), with_kwargs=True)
    r = fastsde.sample(model, n=2, solver=DDIM(steps=3), cond={"class_labels": torch.tensor([1, 2])})
    assert r.nfe.tolist() == [8, 8]
    assert sum(map(len, calls)) == 16
    assert calls[0].tolist() == [1, 2, 10, 10]
    x, t = torch.randn(2, 4, 8, 8, generator=GENERATOR), vector(0.3, 0.6)
    cond = {"class_labels": torch.tensor([1, 2]), "negative_class_labels": torch.tensor([10, 10])}
    plain, _ = from_diffusers(network, DDPM)
    with torch.no_grad():
        out = model.output(x, t, {**cond, "guidance_scale": torch.tensor([3.0, 1.0])})
        wanted = plain.output(x, t, {"class_labels": torch.tensor([1, 2])})
        none = plain.output(x, t, {"class_labels": torch.tensor([10, 10])})
    expected = none + torch.tensor([3.0, 1.0])[:, None, None, None] * (wanted - none)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_clipping_has_a_switch():
    network, config = tiny.unet(), diffusers.DDPMScheduler().config
    x, t = 5 * torch.randn(2, 3, 8, 8, generator=GENERATOR), vector(0.3, 0.6)
    with torch.no_grad():
        clipped, free = (from_diffusers(network, config, clip=c)(x, t).x_0 for c in (None, False))
    assert free.abs().max() > 2
    torch.testing.assert_close(clipped, free.clamp(-1, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "config", "match"),
    [
        (lambda: tiny.text_unet(in_channels=9), DDPM, "wants an image beside the state"),
        (lambda: tiny.unet(time_embedding_type="fourier"), DDPM, "belong together"),
        (tiny.unet, diffusers.ScoreSdeVeScheduler().config, "belong together"),
        (lambda: tiny.unet(time_embedding_type="learned", num_train_timesteps=1000), DDPM, "integer timesteps only"),
        (tiny.sd3, DDPM, "flow-matching network"),
        (lambda: tiny.text_unet(time_cond_proj_dim=8), DDPM, "time_cond_proj_dim"),
        (tiny.unet, diffusers.LCMScheduler().config, "distilled"),
        (tiny.unet, diffusers.DDPMScheduler(rescale_betas_zero_snr=True).config, "zero terminal SNR"),
    ],
)
def test_pairs_that_cannot_work_are_refused(build, config, match):
    with pytest.raises(ValueError, match=match):
        from_diffusers(build(), config)


@pytest.mark.parametrize(
    "path", ["stabilityai/sdxl-turbo", "x/LCM_Dreamshaper", "FLUX.1-schnell", "a/Hyper-SD", "b/sd-dmd2"]
)
def test_names_of_distilled_checkpoints_are_refused(path):
    network = Recording(_name_or_path=path)
    with pytest.raises(ValueError, match="looks distilled"):
        from_diffusers(network, DDPM)
    assert from_diffusers(network, DDPM, allow_distilled=True)


@pytest.mark.parametrize("path", ["google/ddpm-cifar10-32", "/home/turbo/models/set/unet/x", "welcome/volcm"])
def test_other_names_are_not(path):
    assert from_diffusers(Recording(_name_or_path=path), DDPM)


def refused(match, build, cond, **options):
    network = build()
    calls = []
    network.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=match):
        fastsde.sample(*from_diffusers(network, DDPM, **options), n=2, cond=cond)
    assert not calls


def test_conditioning_is_checked_before_the_first_call():
    text = torch.zeros(2, 7, 16)
    refused("needs encoder_hidden_states in cond; got nothing", tiny.text_unet, {})
    refused("needs text_embeds, time_ids", tiny.sdxl_unet, {"encoder_hidden_states": torch.zeros(2, 7, 32)})
    refused(
        r"encoder_hidden_states must .* \(n, tokens, 16\)", tiny.text_unet, {"encoder_hidden_states": text[:, :, :8]}
    )
    refused("floating point .* torch.int64", tiny.text_unet, {"encoder_hidden_states": text.long()})
    added = {"encoder_hidden_states": torch.zeros(2, 7, 32), "text_embeds": torch.zeros(2, 16)}
    refused("embeddings of 40 numbers: .* got 16 and 5 x 4", tiny.sdxl_unet, added | {"time_ids": torch.zeros(2, 5)})
    refused("takes no prompt_embeds", tiny.text_unet, {"encoder_hidden_states": text, "prompt_embeds": text})
    refused("from 0 to 10; got 3 .. 11", tiny.dit, {"class_labels": torch.tensor([3, 11])})
    refused("integers with shape", tiny.dit, {"class_labels": torch.tensor([3.0, 1.0])})
    refused("without classes", tiny.unet, {"class_labels": torch.tensor([0, 1])})
    refused("the condition of the unguided half", lambda: tiny.unet(num_class_embeds=3), None, guidance_scale=2.0)


def test_wrong_models_are_refused(without_type_checks):
    for wrong, scheduler in ((3, DDPM), (tiny.unet(), None), (tiny.unet(), "DDPM")):
        with pytest.raises(TypeError, match=r"pipe_or_model|scheduler must be"):
            from_diffusers(wrong, scheduler)
    with pytest.raises(TypeError, match="only for models that are loaded"):
        from_diffusers(tiny.unet(), DDPM, torch_dtype=torch.float16)
    for options, match in (
        ({"clip": "yes"}, "clip must be"),
        ({"event_shape": (3, 0)}, "event_shape must be"),
        ({"event_shape": 8}, "event_shape must be"),
        ({"guidance_rescale": 0.7}, "need a guidance_scale above 1"),
        ({"guidance_interval": (0.1, 1.0)}, "need a guidance_scale above 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            from_diffusers(tiny.unet(), DDPM, **options)
    with pytest.raises(ValueError, match="sigma_data must be a positive"):
        read_schedule({"sigma_data": -1.0})
    with pytest.raises(ValueError, match="must take x and a time"):
        from_diffusers(lambda x: x, DDPM)


def test_a_model_is_where_its_network_is_now():
    network = tiny.unet()
    model, _ = from_diffusers(network, DDPM)
    network.to("meta")
    assert model.device == torch.device("meta")
    # Where group offloading (a hook of diffusers, for machines with an accelerator) brings weights for the time of use.
    group = SimpleNamespace(config=SimpleNamespace(onload_device="cpu"))
    network.mid_block._diffusers_hook = SimpleNamespace(get_hook={"group_offloading": group}.get)
    assert model.device == torch.device("cpu")


def test_offloaded_networks_compute_where_their_hook_says():
    accelerate = pytest.importorskip("accelerate")
    expected = fastsde.sample(*from_diffusers(tiny.unet(), DDPM), n=2, nfe=4).samples
    network = tiny.unet()
    accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in network.parameters())
    model, sde = from_diffusers(network, DDPM)
    assert (model.device, model.parameter.dtype) == (torch.device("cpu"), torch.float32)
    samples = fastsde.sample(model, sde, n=2, nfe=4).samples
    # Without hooks, convolutions work in another layout: roundings.
    torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


WRAPPED = {
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "both": lambda net: torch.nn.DataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.long
@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_network_is_read_like_the_one_inside(wrap):
    net = tiny.unet(num_class_embeds=10)
    arguments = {"n": 3, "nfe": 3, "seed": 1, "cond": {"class_labels": torch.arange(3)}}
    plain, wrapped = (
        fastsde.sample(from_diffusers(n, diffusers.DDPMScheduler()), **arguments).samples
        for n in (net, WRAPPED[wrap](net))
    )
    # A plain network is called with channels last, which rounds differently.
    torch.testing.assert_close(wrapped, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel"])
def test_networks_of_unknown_convention_are_refused(name):
    class Network(torch.nn.Module):
        def forward(self, hidden_states, timestep):
            raise AssertionError("called")

    Network.__name__ = name

    class Own(Network):
        pass

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Network()

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    for network in (Network(), torch.nn.DataParallel(Network()), Own(), Around()):
        with pytest.raises(
            ValueError, match=f"does not know how {name} is called.*sample_pipeline.*FastSDEScheduler.*diagnose"
        ):
            from_diffusers(network, diffusers.FlowMatchEulerDiscreteScheduler())


def test_the_time_is_never_given_to_keyword_arguments():
    with pytest.raises(ValueError, match=r"must take x and a time, .*it takes \(x, \*\*kwargs\)"):
        from_diffusers(lambda x, **kwargs: x, diffusers.DDPMScheduler())
    seen = []

    def network(x, *args, **kwargs):
        seen.append((len(args), sorted(kwargs)))
        return x

    fastsde.sample(from_diffusers(network, diffusers.DDPMScheduler()), shape=(2, 3), nfe=2)
    assert seen == [(1, []), (1, [])]


def test_audio_and_video_networks():
    schedule = diffusers.DDPMScheduler(clip_sample=False)
    audio = diffusers.UNet1DModel(
        sample_size=64,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        layers_per_block=1,
        time_embedding_type="positional",
        flip_sin_to_cos=False,
        use_timestep_embedding=True,
        out_block_type="OutConv1DBlock",
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
        act_fn="mish",
    )
    video = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    text = {"encoder_hidden_states": torch.zeros(1, 6, 8)}
    for network, event, known, cond in ((audio, (1, 64), (1, 64), {}), (video, (4, 3, 8, 8), None, text)):
        model, _ = from_diffusers(network, schedule)
        assert model.event_shape == known
        x, t = torch.randn(1, *event), torch.tensor([0.4], dtype=torch.float64)
        with torch.no_grad():
            theirs = network(x, 399.0 * torch.ones(1), **cond).sample  # level 399 is at t = 400 / 1000
            torch.testing.assert_close(model(x, t, cond).epsilon, theirs, rtol=1e-5, atol=1e-5)


def test_a_table_that_is_not_that_of_the_configuration_is_refused():
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    from_diffusers(lambda x, t: x, scheduler)
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-5, 0.01, 1000)).cumprod(0)
    with pytest.raises(ValueError, match="alphas_cumprod of DDPMScheduler are not those of its configuration"):
        from_diffusers(lambda x, t: x, scheduler)


def test_a_reading_is_known_again_in_another_process():
    """diffusers lists the settings that a network took by default in another order in each process."""
    settings = {"in_channels": 3, "sample_size": 8, "_use_default_values": ["act_fn", "freq_shift"]}
    first, second, third = (
        reading_hash(from_diffusers(Recording(**config), DDPM, event_shape=(3, 8, 8)))
        for config in (
            settings,
            settings | {"_use_default_values": ["freq_shift", "act_fn"]},
            settings | {"in_channels": 4},
        )
    )
    assert first == second != third
