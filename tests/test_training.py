"""Training: the loss is the published one, and a resumed run repeats an uninterrupted one."""

import dataclasses
import gzip
import math
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stubs import Stopped, equal, stop_at
from torch import nn

import fastsde
from fastsde.training.batches import Batches
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images, read_idx, to_unit_range
from fastsde.training.ema import ema_model
from fastsde.training.levels import geometric_levels, level_times
from fastsde.training.loop import train
from fastsde.training.losses import dsm_loss, stratified_times


class Tiny(nn.Module):
    """A network of two convolutions with a label embedding, enough to have every kind of state."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.label = nn.Embedding(4, 4)

    def forward(self, x, t, class_labels):
        return self.last(torch.tanh(self.first(x) + self.label(class_labels)[:, :, None, None]))


def tiny_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return fastsde.ScoreModel(Tiny().to(dtype), fastsde.VPSDE(), "epsilon", event_shape=(1, 8, 8))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (32, 1, 8, 8), generator=generator).byte(), torch.arange(32) % 3


@pytest.mark.parametrize("sde", [fastsde.VPSDE(), fastsde.SubVPSDE(), fastsde.VESDE(), fastsde.RectifiedFlow()])
def test_loss_is_the_weighted_score_error(sde):
    generator = torch.Generator().manual_seed(1)
    x_0, noise = (torch.randn(6, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(6, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    model = fastsde.ScoreModel(lambda x, t: torch.sin(x), sde)
    x_t = sde.marginal(x_0, t, noise)
    target = -noise / sde.sigma(t)[:, None, None]
    error = (torch.sin(x_t) - target).square().flatten(1).mean(1)
    # Both sides are the same formula in float64; 1e-10 leaves room for sigma / sigma.
    torch.testing.assert_close(dsm_loss(model, x_0, t, noise), sde.sigma(t) ** 2 * error, rtol=1e-10, atol=0)
    torch.testing.assert_close(dsm_loss(model, x_0, t, noise, weight=sde.g2), sde.g2(t) * error, rtol=1e-10, atol=0)


def test_the_minimiser_of_the_loss_is_the_score():
    # E[loss] over noise is least at the exact score: the derivative along any change of the score vanishes there.
    sde = fastsde.VPSDE()
    generator = torch.Generator().manual_seed(2)
    n = 200_000
    x_0, noise = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.full((n,), 0.4, dtype=torch.float64)
    exact = fastsde.score.GaussianScore(sde, torch.zeros(1), torch.ones(1))
    bump = torch.zeros((), dtype=torch.float64, requires_grad=True)
    model = fastsde.ScoreModel(lambda x, t: exact.exact_score(x, t) + bump * torch.sin(x), sde)
    dsm_loss(model, x_0, t, noise).mean().backward()
    assert bump.grad is not None
    # The gradient is a mean of n terms with standard deviation below 1; 5 / sqrt(n) is five standard errors.
    assert abs(float(bump.grad)) < 5 / n**0.5


def test_stratified_times_cover_the_range_evenly():
    sde = fastsde.VPSDE()
    t = stratified_times(sde, 100, torch.Generator().manual_seed(0))
    cell = ((t - sde.t_min) / (sde.t_max - sde.t_min) * 100).floor().long()
    # A common shift moves at most one time across the end of the range and back to its start.
    assert len(cell.unique()) >= 99
    assert sde.t_min <= t.min()
    assert t.max() <= sde.t_max


def test_average_warms_up():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    average = ema_model(model, 0.999)
    expected = 0.0
    for n in range(20):
        nn.init.constant_(model.weight, float(n))
        average.update_parameters(model)
        # torch copies the weights at the first update; from then on the decay is (1 + n) / (10 + n).
        expected = float(n) if n == 0 else expected + (1 - (1 + n) / (10 + n)) * (n - expected)
        assert float(average.module.weight.detach()) == pytest.approx(expected, rel=1e-5)  # single precision
    with pytest.raises(ValueError, match="decay"):
        ema_model(model, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_repeats_an_uninterrupted_run_bitwise(tmp_path, data, dtype):
    images, labels = data
    config = TrainConfig(steps=12, batch_size=8, warmup=3, bf16=False)
    whole, half = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    expected = train(whole, images, labels, config, tmp_path / "a.safetensors", save_every=4)

    with pytest.raises(Stopped):
        train(half, images, labels, config, tmp_path / "b.safetensors", save_every=4, callback=stop_at(8))
    other = tiny_model(seed=1, dtype=dtype)  # other weights: everything must come from the checkpoint
    resumed = train(other, images, labels, config, tmp_path / "b.safetensors", save_every=4, resume=True)
    assert equal(resumed.state_dict(), expected.state_dict())
    assert equal(*(load_file(tmp_path / f"{name}.safetensors") for name in "ab"))  # averages and Adam's moments, too


def test_checkpoint_of_another_run_is_refused(tmp_path, data):
    images, labels = data
    config = TrainConfig(steps=2, batch_size=4, bf16=False)
    path = tmp_path / "c.safetensors"
    train(tiny_model(), images, labels, config, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True goes on"):
        train(tiny_model(), images, labels, config, path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="batch_size: 4 there, 8 here"):
        train(tiny_model(), images, labels, TrainConfig(steps=4, batch_size=8, bf16=False), path, resume=True)
    other = fastsde.ScoreModel(nn.Conv2d(1, 1, 1), fastsde.VPSDE(), "epsilon")
    with pytest.raises(ValueError, match="another network"):
        train(other, images, labels, config, path, resume=True)
    with pytest.raises(ValueError, match="at step 2, beyond the 1 steps"):
        train(tiny_model(), images, labels, dataclasses.replace(config, steps=1), path, resume=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        train(tiny_model(), images, labels, config, path, resume=True)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no checkpoint of"):
        train(tiny_model(), images, labels, config, path, resume=True)
    with pytest.raises(FileNotFoundError, match="without --resume"):
        train(tiny_model(), images, labels, config, tmp_path / "none.safetensors", resume=True)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, data):
    images, labels = data
    path = tmp_path / "d.safetensors"
    config = TrainConfig(steps=4, batch_size=4, bf16=False)
    model = tiny_model()
    train(model, images, labels, TrainConfig(steps=1, batch_size=4, bf16=False), path)
    before = path.read_bytes()
    model.network.register_forward_hook(lambda module, inputs, out: out * math.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        train(model, images, labels, config, path, resume=True)
    assert path.read_bytes() == before


def test_a_gradient_or_weight_that_is_not_finite_is_not_saved(tmp_path, data):
    images, labels = data
    path = tmp_path / "d.safetensors"
    config = TrainConfig(steps=6, batch_size=4, bf16=False)
    model, calls = tiny_model(), []

    def spoil(gradient):
        calls.append(0)
        return gradient * math.nan if len(calls) == 4 else gradient

    model.network.last.weight.register_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"step 3: .*norm nan"):
        train(model, images, labels, config, path, save_every=2)
    kept = load_file(path)
    assert len(kept["history.loss"]) == 2
    assert all(torch.isfinite(value).all() for value in kept.values())
    model = tiny_model()
    model.network.register_buffer("odd", torch.zeros(()))
    model.network.register_forward_pre_hook(lambda network, _: setattr(network, "odd", torch.tensor(math.inf)))
    with pytest.raises(FloatingPointError, match="odd is not finite and was not saved"):
        train(model, images, labels, config, tmp_path / "other.safetensors", save_every=1)
    assert not (tmp_path / "other.safetensors").exists()


def test_a_network_with_batch_normalisation_is_averaged():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    average = ema_model(network)
    for _ in range(3):
        network(torch.randn(4, 1, 6, 6))
        average.update_parameters(network)
    assert int(average.module[1].num_batches_tracked) == 3


def test_other_data_and_other_processes_are_refused_on_resuming(tmp_path, data):
    images, labels = data
    path = tmp_path / "d.safetensors"
    config = TrainConfig(steps=1, batch_size=4, bf16=False)
    train(tiny_model(), images, labels, config, path)
    with pytest.raises(ValueError, match=r"other settings \(data"):
        train(tiny_model(), images.flip(0), labels, config, path, resume=True)
    model = fastsde.ScoreModel(tiny_model().network, fastsde.VPSDE(beta_max=10.0), "epsilon")
    with pytest.raises(ValueError, match=r"other settings \(sde"):
        train(model, images, labels, config, path, resume=True)
    with pytest.raises(FileNotFoundError, match="a folder that exists"):
        train(tiny_model(), images, labels, config, tmp_path / "no" / "d.safetensors")
    with pytest.raises(ValueError, match="save_every"):
        train(tiny_model(), images, labels, config, path, save_every=0)


def test_processes_share_the_rows_of_one(data):
    images, labels = data
    config = TrainConfig(batch_size=6, levels=10)

    def drawn(rank, size):
        return Batches(tiny_model(), images, labels, config, (rank, size)).draw(5, 1)[0]

    whole, parts = drawn(0, 1), [drawn(rank, 3) for rank in range(3)]
    for k in range(3):
        assert torch.equal(torch.stack([part[k] for part in parts], 1).flatten(0, 1), whole[k])
    assert torch.equal(torch.stack([p[3]["class_labels"] for p in parts], 1).flatten(), whole[3]["class_labels"])
    with pytest.raises(ValueError, match="cannot be shared evenly by 4"):
        drawn(0, 4)


def test_times_are_those_of_the_levels(data):
    """Uniform over the geometric levels of sigma / alpha, from one end of the process to the other (eqs. 8.1, 8.2)."""
    model, (images, labels) = tiny_model(), data
    t = Batches(model, images, labels, TrainConfig(batch_size=4000, levels=5)).draw(0)[0][1]
    found, count = (-0.5 * model.sde.log_snr(t)).unique(return_counts=True)
    ends = -0.5 * model.sde.log_snr(torch.tensor([model.sde.t_min, model.sde.t_max], dtype=torch.float64))
    merged = found[torch.cat([torch.tensor([True]), found.diff() > 1e-9])]
    torch.testing.assert_close(merged, torch.linspace(ends[0], ends[1], 5, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    # Five standard errors of a share of 4000.
    assert abs(int(count[found < merged[0] + 1e-6].sum()) / 4000 - 0.2) < 5 * (0.16 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (torch.full((9, 1, 8, 8), 7, dtype=torch.uint8), y[:9]), "all 9 images are the same"),
        (lambda x, y: (x.float().index_fill(0, torch.tensor([3]), math.nan), y), "not finite, the first at 3"),
        (lambda x, y: (x, y[:5]), "labels must be"),
        (lambda x, y: (x, y - 1), "labels must be"),
        (lambda x, y: (x[:1], y[:1]), "at least two"),
        (lambda x, y: (x.long(), y), "uint8 or floats"),
    ],
)
def test_data_that_teach_nothing_are_refused(tmp_path, data, change, words):
    path = tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match=words):
        train(tiny_model(), *change(*data), TrainConfig(steps=2, batch_size=4, bf16=False), path)
    assert not path.exists()


@pytest.mark.parametrize("sigmas", [[0.1, 1.0], [1.0, 1.0], [1.0, 0.0], []])
def test_levels_in_the_wrong_order_are_refused(sigmas):
    with pytest.raises(ValueError, match="must fall"):
        level_times(fastsde.VPSDE(), torch.tensor(sigmas), 3, torch.Generator())


def test_settings_may_be_numbers_of_numpy(tmp_path, data, without_type_checks):
    config = TrainConfig(np.int64(1), 4, np.float32(1e-3), betas=(np.float32(0.5), 0.9), bf16=False)
    train(tiny_model(), *data, config, tmp_path / "c.safetensors")
    train(tiny_model(), *data, dataclasses.replace(config, steps=2), tmp_path / "c.safetensors", resume=True)


def test_ends_of_the_process_are_levels_of_it():
    sde = fastsde.VPSDE()
    ends = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).div(-2).exp().tolist()
    t = level_times(sde, geometric_levels(*ends, 2).float(), 50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(t.unique(), torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigmas", [[200.0, 1.0], [1.0, 0.001]])
def test_levels_that_the_process_does_not_have_are_refused(sigmas):
    with pytest.raises(ValueError, match=r"noise over signal that the process has, 0\.01"):
        level_times(fastsde.VPSDE(), torch.tensor(sigmas), 3, torch.Generator())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "100"}, "steps must be an integer of at least 1; got '100'"),
        ({"batch_size": 1.5}, "batch_size must be an integer"),
        ({"learning_rate": "1e-3"}, "learning_rate must be in"),
        ({"betas": (0.9,)}, "betas must be a tuple of two"),
        ({"betas": (0.9, 1.0)}, "the second of betas must be in"),
        ({"seed": 1 << 40}, "seed must be in"),
        ({"levels": 1}, "levels must be 0 or from 2"),
    ],
)
def test_settings_that_are_none_are_refused(change, words, without_type_checks):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**change)
    with pytest.raises(TypeError, match="bf16 must be True or False"):
        TrainConfig(bf16="yes")


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_split(folder, split, images, labels):
    """As torchvision downloads MNIST."""
    write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
    write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels.astype(np.uint8))


def test_idx_files_are_read_and_checked(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)
    labels = np.arange(5, dtype=np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    with pytest.raises(FileNotFoundError, match="train-labels"):
        load_images(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    read, read_labels = load_images(tmp_path)
    assert np.array_equal(read[:, 0].numpy(), images)
    assert read_labels.tolist() == labels.tolist()
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    write_split(raw, "t10k", images[:2], labels[:2])
    assert len(load_images(tmp_path / "root", train=False)[0]) == 2
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels[:3])
    with pytest.raises(ValueError, match="as many whole labels"):
        load_images(tmp_path)
    header = bytes([0, 0, 0x0D, 1]) + struct.pack(">I", 5)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(header + (labels + 0.5).astype(">f4").tobytes())
    )
    with pytest.raises(ValueError, match=r"as many whole labels; got .* >f4"):
        load_images(tmp_path)
    (tmp_path / "short").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]))
    with pytest.raises(ValueError, match="damaged"):
        read_idx(tmp_path / "short")
    for name, raw in (("cut.gz", gzip.compress(bytes(1000))[:-12]), ("plain.gz", b"hello")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match="not a whole gzip file"):
            read_idx(tmp_path / name)
    (tmp_path / "text").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(tmp_path / "text")


def test_unit_range_is_the_inverse_of_eight_bit_rounding():
    levels = torch.arange(256).byte()
    assert to_unit_range(levels)[[0, 255]].tolist() == [-1.0, 1.0]
    assert torch.equal(((to_unit_range(levels) + 1) * 127.5).round().byte(), levels)
