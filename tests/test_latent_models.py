"""Latent models: an autoencoder, a score network of its latents, and both in one folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import run
from test_training import write_split

import fastsde
from fastsde.checkpoints import AUTOENCODER, CARD, CONFIG, WEIGHTS, load_autoencoder
from fastsde.cli.bench import build_cells
from fastsde.diffusers import decode_latents, encode_images
from fastsde.diffusers.latents import measure_scale
from fastsde.evaluation.features import Features
from fastsde.evaluation.images import to_uint8
from fastsde.evaluation.reference import Reference
from fastsde.evaluation.sweep import Problem, Sweep
from fastsde.training.data import load_images
from fastsde.training.networks import small_autoencoder

TINY = ["--set", "training.bf16=false", "--batch-size", 8, "--set", "samples_every=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Squares at 16 places, in two classes by their grey."""
    folder = tmp_path_factory.mktemp("data")
    for split, n in (("train", 64), ("t10k", 16)):
        images = np.zeros((n, 8, 8), dtype=np.uint8)
        for k, image in enumerate(images):
            image[k % 4 * 2 :][:2, k // 4 % 4 * 2 :][:, :2] = 255 if k % 2 else 120
        write_split(folder, split, images, np.arange(n) % 2)
    return folder


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory):
    """Folders of an autoencoder and of a latent model, trained for a few steps."""
    out = tmp_path_factory.mktemp("runs")
    command = ["train", "--data", data, *TINY]
    options = ["--steps", 25, "--set", "model=vae", "--set", "vae.widths=[8,8]", "--set", "vae.beta=50"]
    assert run(*command, "--out", out / "vae", *options).exit_code == 0
    options = ["--steps", 10, "--set", "model=latent", "--set", f"autoencoder={out / 'vae' / 'model'}"]
    options += ["--set", "network.widths=[8]", "--set", "network.prediction=v_prediction"]
    found = run(*command, "--out", out / "latent", *options)
    assert found.exit_code == 0, found.output
    return out / "vae" / "model", out / "latent" / "model"


@pytest.fixture(scope="module")
def model(folders):
    return fastsde.pretrained(folders[1])


def test_one_folder_has_both(folders, model, data):
    vae, folder = folders
    assert model.event_shape == (4, 4, 4)
    assert model.image_shape == (1, 8, 8)
    ours, theirs = (load_file(path / WEIGHTS) for path in (vae, folder / AUTOENCODER))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    card = json.loads((folder / CARD).read_text())
    assert card["latents"] == {key: model.autoencoder.config[key] for key in ("latents_mean", "latents_std")}
    assert "--set 'model=\"vae\"'" in card["autoencoder"]["command"]
    assert "--set autoencoder=FOLDER" in card["command"]
    with pytest.raises(ValueError, match="is an autoencoder"):
        fastsde.pretrained(vae)


def test_latents_have_mean_zero_and_variance_one_at_most(folders, model, data):
    """Over the data, and the decoder undoes the scale."""
    images = load_images(data)[0]
    z = model.encode(images)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    # Weights of the folder are in half precision, those the scale was measured with were not.
    assert float(z.square().mean((0, 2, 3)).max()) == pytest.approx(1.0, abs=0.01)
    with torch.no_grad():
        vae = load_autoencoder(folders[0])
        raw = vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
        expected = vae.decode(raw).sample
    torch.testing.assert_close(model.decode(z), expected, rtol=0, atol=1e-4)
    again = measure_scale(vae, images)
    torch.testing.assert_close(again, z, rtol=0, atol=2e-3)
    assert torch.equal(encode_images(vae, images), encode_images(vae, images.float() / 127.5 - 1))


def test_solvers_likelihood_encoding_and_fits_take_latents(model, data):
    cond = {"class_labels": torch.arange(4) % 2}
    fitted = fastsde.fit(model, nfe=3, pilots=12, calls=800)
    assert fastsde.sample(model, n=4, cond=cond, solver=fitted).nfe.tolist() == [3] * 4
    r = fastsde.sample(model, n=4, cond=cond, nfe=8)
    assert r.samples.shape == (4, 4, 4, 4)
    assert model.decode(r.samples).shape == (4, 1, 8, 8)
    x, rough = model.encode(load_images(data)[0][:4]), {"cond": cond, "rtol": 1e-3, "atol": 1e-3}
    found = fastsde.log_likelihood(model, x=x, cond=cond, rtol=0.1, atol=0.1)
    assert torch.isfinite(found.log_prob).all()
    there = fastsde.encode(model, x=x, **rough).samples
    back = fastsde.sample(model, x_init=there, solver=fastsde.ProbabilityFlow(), denoise=False, **rough).samples
    # Two solves at the tolerance of 1e-3 a step, whose errors the flow stretches, on latents of variance 1.
    assert float((back - x).square().mean().sqrt()) < 0.03


def test_a_run_that_resumes_does_not_encode_again(tmp_path, folders, data):
    """To the same numbers; latents of another autoencoder are refused."""
    options = ["--data", data, *TINY, "--set", "model=latent", "--set", "network.widths=[8]", "--set", "save_every=1"]
    own = [*options, "--set", f"autoencoder={folders[0]}"]
    for name, steps in (("whole", (3,)), ("half", (1, 3))):
        for k, n in enumerate(steps):
            found = run("train", *own, "--out", tmp_path / name, "--steps", n, *["--resume"][:k])
            assert found.exit_code == 0, found.output
    latents = [load_file(tmp_path / name / "latents.safetensors") for name in ("whole", "half")]
    assert all(torch.equal(latents[0][key], latents[1][key]) for key in ("train", "test"))
    card = json.loads((tmp_path / "half" / "model" / CARD).read_text())
    assert card["latents"] == json.loads((tmp_path / "whole" / "model" / CARD).read_text())["latents"]
    other = shutil.copytree(folders[0], tmp_path / "other")
    save_file({key: 1.5 * value for key, value in load_file(other / WEIGHTS).items()}, other / WEIGHTS)
    found = run(
        "train", *options, "--set", f"autoencoder={other}", "--out", tmp_path / "half", "--steps", 4, "--resume"
    )
    assert found.exit_code == 1
    assert "is of other data or another autoencoder" in " ".join(found.output.split())
    cache = tmp_path / "half" / "latents.safetensors"
    cache.write_bytes(cache.read_bytes()[:100])
    assert f"{cache} is truncated" in run("train", *own, "--out", tmp_path / "half", "--steps", 4, "--resume").output


def test_batches_of_the_decoder_do_not_matter(model):
    z = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    # Convolutions of other batches sum in another order.
    torch.testing.assert_close(model.decode(z, batch_size=2), model.decode(z), rtol=0, atol=1e-5)
    assert torch.equal(model.decode(z), decode_latents(model.autoencoder, z, batch_size=64))


def test_sample_and_diagnose_decode(tmp_path, folders, data):
    folder = folders[1]
    for name, options in (("one", []), ("job", ["--shard-size", 3])):
        found = run("sample", "--model", folder, "-n", 6, "--nfe", 4, "--out", tmp_path / name, *options)
        assert found.exit_code == 0, found.output
    one = np.load(tmp_path / "one" / "samples.npz")["arr_0"]
    assert one.shape == (6, 8, 8, 1)
    job = [np.load(tmp_path / "job" / f"samples-0000{k}.npz")["arr_0"] for k in range(2)]
    # 8 bits of the same samples at another batch size: rounding may move one by one level.
    assert np.abs(np.concatenate(job).astype(int) - one).max() <= 1
    found = run("diagnose", "--model", folder, "--data", data)
    assert found.exit_code in (0, 1), found.output
    assert "Traceback" not in found.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / AUTOENCODER / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda f: (f / AUTOENCODER / CONFIG).write_text("{}x"), "is not JSON"),
        (lambda f: write_config(f, _class_name="VQModel"), "a network 'VQModel', not AutoencoderKL"),
        (lambda f: write_config(f, block_out_channels=[8, 16]), "does not fit"),
        (lambda f: write_config(f, latents_std=[0.5] * 4), "another scale of latents"),
        (lambda f: write_config(f, latents_mean=None), "another scale of latents"),
        (lambda f: other_weights(f, 2.0), "is not the file that the card describes"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, folders, change, words):
    folder = shutil.copytree(folders[1], tmp_path / "model")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        fastsde.pretrained(folder)


def write_config(folder, **change):
    path = folder / AUTOENCODER / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def other_weights(folder, factor):
    path = folder / AUTOENCODER / WEIGHTS
    save_file({key: value * factor for key, value in load_file(path).items()}, path)


def test_latents_that_are_none_are_refused(model, without_type_checks):
    z = torch.zeros(3, 4, 4, 4)
    z[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 latents are not finite, the first at 1"):
        model.decode(z)
    for wrong in (torch.zeros(3, 4, 8, 8), torch.zeros(4, 4, 4), torch.zeros(3, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"latents must have shape \(n, 4, 4, 4\)"):
            model.decode(wrong)
    with pytest.raises(ValueError, match=r"latents must be floating point with shape \(n, 4, h, w\)"):
        decode_latents(model.autoencoder, torch.zeros(3, 3, 4, 4))
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, 8, 8\)"):
        model.encode(torch.zeros(3, 1, 4, 4))
    constant = small_autoencoder(8, 1, widths=(8, 8))
    constant.quant_conv.weight.data.zero_()
    with pytest.raises(ValueError, match="the same latents"):
        measure_scale(constant, torch.zeros(3, 1, 8, 8))


def test_settings_that_do_not_fit_are_refused(tmp_path, data, folders):
    cases = [
        (["model=gan"], "model must be one of score, vae"),
        (["model=latent"], "model=latent needs autoencoder=FOLDER"),
        (["model=vae", "autoencoder=there"], "no other model takes one"),
        (["model=vae", "adversary.weight=1"], "an adversary goes with model=score"),
        (["model=introvae", "vae.alpha=-1"], "vae: alpha must be in"),
        (["model=vae", "vae.widths=[8,8,8,8,8]"], "divisible by 16"),
        (["model=latent", f"autoencoder={tmp_path}"], "is missing"),
        (["model=latent", f"autoencoder={folders[1]}"], "a network 'UNet2DModel', not AutoencoderKL"),
        (["model=latent", f"autoencoder={folders[0]}", "network.widths=[8,8,8,8]"], "divisible by 8"),
    ]
    for assignments, words in cases:
        options = [part for text in assignments for part in ("--set", text)]
        found = run("train", "--data", data, "--out", tmp_path / "out", *TINY, *options, "--steps", 1)
        assert found.exit_code == 1, assignments
        assert words in " ".join(found.output.split()), found.output
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_a_sweep_measures_what_is_decoded(tmp_path, model):
    features = Features(lambda x: (x.flatten(1)[:, 20:23], None), "three pixels", 1, shape=(1, 8, 8))
    reference = Reference(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), None, {})
    cells = build_cells(model, ["DDIM"], [3], [], [0])
    sweep = Sweep(tmp_path / "bench", Problem(model, features, reference, {}, 2), cells, 20, batch_size=10)
    assert list(sweep.run()) == cells
    assert sweep.row(cells[0])["fid"] > 0
    cond = {"class_labels": torch.arange(20) % 2}
    r = fastsde.sample(model, n=20, nfe=3, solver=fastsde.DDIM(), seed=0, cond=cond, batch_size=10)
    assert np.array_equal(sweep.images(cells[0], 4), to_uint8(model.decode(r.samples), (-1.0, 1.0))[:4])


def test_latents_go_where_the_decoder_is(folders, device):
    model = fastsde.pretrained(folders[1], device=device)
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = fastsde.pretrained(folders[1]).decode(z)
    # Convolutions of two devices, in float32 or TF32.
    torch.testing.assert_close(model.decode(z), expected, rtol=0, atol=1e-5 if device.type == "cpu" else 1e-2)
    assert model.encode(expected).device.type == "cpu"
