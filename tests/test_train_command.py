"""`fastsde train`: settings, runs, what it refuses, several processes."""

import csv
import dataclasses
import json
import os
import shlex
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from test_training import write_split

import fastsde
from fastsde.cli.main import main
from fastsde.cli.train_settings import Settings, as_toml, read_settings
from fastsde.training.config import TrainConfig
from fastsde.training.masking import Masking

TOML = """
data = "there"
classes = ["a", "b"]
samples_every = 0

[training]
steps = 7
learning_rate = 1

[network]
widths = [8, 8, 16]

[adversary]
loss = "hinge"
compare = "average"
updates = "simultaneous"
two_discriminators = true

[adversary.masking]
patch = 4
"""
TINY = ["--set", "network.widths=[8,8,16]", "--set", "training.bf16=false", "--batch-size", 4]


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in ("train", *args)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, n in (("train", 20), ("t10k", 4)):
        write_split(folder, split, generator.integers(0, 256, (n, 8, 8), dtype=np.uint8), np.arange(n) % 2)
    return folder


def pictures(folder, sizes):
    folder.mkdir()
    for k, size in enumerate(sizes):
        pixels = np.random.default_rng(k).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def test_a_file_then_set_then_options(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    found = read_settings(path, ["training.steps=9", "adversary.weight=2", "title=Name; MIT"], {"training.steps": 11})
    assert found.training.steps == 11
    assert found.training.learning_rate == 1.0
    assert found.training.betas == (0.0, 0.9)  # adversarial: no momentum of the score network
    assert found.adversary.weight == 2.0
    assert found.adversary.masking == Masking(patch=4)
    assert found.title == "Name; MIT"
    assert found.classes == ("a", "b")
    built = found.adversary.build(1, 8)
    assert built.updates == "simultaneous"
    assert built.spectral_discriminator is not built.discriminator
    loss = built.loss
    u, v = torch.tensor([0.3, -2.0]), torch.tensor([1.5, 0.1])
    expected = (1 - u + v.mean()).clamp(min=0).mean() + (1 + v - u.mean()).clamp(min=0).mean()
    torch.testing.assert_close(loss.discriminator(u, v), expected)
    assert read_settings(None, [], {}) == Settings()
    assert read_settings(path, ["training.betas=[0.5, 0.9]"], {}).training.betas == (0.5, 0.9)


def test_what_differs_can_be_said_again():
    """The command on the card gives the same settings."""
    masked = Masking(space=0.1, bands=32)
    first = read_settings(None, ["adversary.loss=sgan", "adversary.masking.space=0.1"], {})
    first = dataclasses.replace(first, adversary=dataclasses.replace(first.adversary, masking=masked))
    again = read_settings(None, [f"{key}={as_toml(value)}" for key, value in first.differences()], {})
    assert again == first
    tokens = shlex.split(" ".join(f"--set {shlex.quote(f'{k}={as_toml(v)}')}" for k, v in first.differences()))
    assert read_settings(None, [t for t in tokens if t != "--set"], {}) == first
    assert not list(Settings(data="x", title="y", classes=("z",)).differences())


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.step=3", "no setting training.step;"),
        ("steps=3", "no setting steps;"),
        ("training.steps=many", "training.steps must be of the kind int"),
        ("training.steps=0", "training: steps must be an integer of at least 1"),
        ("training.levels=1", "levels must be 0 or from 2"),
        ("training=3", "training must be a table"),
        ("training.betas=[0.1]", "a list of 2"),
        ("training.learning_rate=-1", "learning_rate must be in (0, inf)"),
        ("adversary.loss=gan", "adversary.loss must be one of sgan"),
        ("adversary.masking.space=1.5", "adversary.masking: space"),
        ("network.widths=[8, 8, 9]", "multiples of 8"),
        ("network.prediction=noise", "network.prediction must be one of epsilon, v_prediction"),
        ("samples_every=300", "a multiple"),
        ("training.steps", "KEY=VALUE"),
        ("adversary.steps=0", "adversary: steps must be"),
        ("adversary.updates=both", "adversary: updates must be one of alternating, simultaneous"),
        ("adversary.two_discriminators=true", "adversary: spectral_discriminator needs masking"),
        ("adversary.halvings=0", "adversary: halvings must be"),
        ("adversary.halvings=4", "adversary: halvings must leave a pixel of 8"),
        ("adversary.width=0", "adversary: width must be"),
        ("adversary.weight=nan", "adversary: weight must be"),
        ("training.seed=-1", "seed must be"),
        ('classes=["a", "a"]', "different names"),
        ("data.x=3", "data is no table"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(tmp_path, data, assignment, words):
    (tmp_path / "c.toml").write_text(f'data = "{data}"')
    result = run("--config", tmp_path / "c.toml", "--out", tmp_path / "out", "--set", assignment)
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_data_that_cannot_be_learned_from_are_refused(tmp_path, data):
    mixed = pictures(tmp_path / "mixed", [8, 8, 12])
    constant = pictures(tmp_path / "constant", [8])
    for k in range(3):
        Image.open(constant / "0.png").save(constant / f"copy{k}.png")
    np.savez(tmp_path / "nan.npz", arr_0=np.full((3, 8, 8, 1), np.nan, np.float32))
    (tmp_path / "broken.toml").write_text("data = ")
    cases = [
        (["--data", mixed], "sizes must agree"),
        (["--data", constant], "are the same"),
        (["--data", tmp_path / "nan.npz"], "not finite"),
        (["--data", mixed, "--out", mixed / "run"], "lies in --data"),
        (["--data", tmp_path / "nowhere"], "neither a file nor a folder"),
        (["--data", data, "--classes", "a,b,c"], "3 classes; the data have 2"),
        ([], "--data is needed"),
        (["--config", tmp_path / "broken.toml"], "no TOML file"),
    ]
    for options, words in cases:
        result = run("--out", tmp_path / "out", *options, *TINY)
        assert result.exit_code == 1, options
        assert words in " ".join(result.output.split()), options
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_both_discriminators_train_where_the_network_is(tmp_path, data, device):
    options = ["--data", data, "--out", tmp_path / "run", *TINY, "--steps", 1, "--device", device]
    options += ["--set", "samples_every=0", "--set", "adversary.width=4", "--set", "adversary.halvings=1"]
    options += ["--set", "adversary.two_discriminators=true", "--set", "adversary.masking.patch=4"]
    result = run(*options)
    assert result.exit_code == 0, result.output


def test_an_adversarial_run_and_what_it_leaves(tmp_path, data):
    out = tmp_path / "run"
    options = ["--data", data, "--out", out, *TINY, "--set", "save_every=2", "--set", "samples_every=2"]
    options += ["--set", "adversary.width=4", "--set", "adversary.halvings=2", "--set", "adversary.masking.patch=3"]
    assert run(*options, "--steps", 4).exit_code == 0
    assert run(*options, "--steps", 6, "--resume").exit_code == 0
    (out / "losses.csv").unlink()
    assert run(*options, "--steps", 6, "--resume").exit_code == 0  # nothing left to do but what was lost
    text = (out / "losses.csv").read_text()
    assert text.startswith("step,loss,discriminator,gini\n")
    rows = list(csv.DictReader(text.splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(6))
    history = load_file(out / "checkpoint.safetensors")
    assert [float(row["discriminator"]) for row in rows] == history["history.discriminator"].tolist()
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["000002.png", "000004.png", "000006.png"]
    # Four rows of ten images with gaps of 2 pixels, enlarged to 56 pixels each.
    assert Image.open(out / "samples" / "000006.png").size == (7 * (2 + 10 * 10), 7 * (2 + 4 * 10))
    model, _ = fastsde.pretrained(out / "model")
    assert model.network.config.block_out_channels == [8, 8, 16]
    card = json.loads((out / "model" / "card.json").read_text())
    assert card["adversary"]["masking"]["patch"] == 3
    assert "--set adversary.masking.patch=3" in card["command"]
    assert card["settings"]["betas"] == [0.0, 0.9]
    before = (out / "checkpoint.safetensors").read_bytes()
    other = run(*options, "--steps", 8, "--resume", "--set", "network.widths=[8,16,16]")
    assert other.exit_code == 1
    assert "another network" in other.output
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_weights_and_card_belong_together(tmp_path, data):
    out = tmp_path / "run"
    diverged = run("--data", data, "--out", out, *TINY, "--steps", 1, "--learning-rate", 1e9)
    assert diverged.exit_code == 1
    assert "diverged" in diverged.output
    assert not (out / "model").exists()
    out = tmp_path / "other"
    assert run("--data", data, "--out", out, *TINY, "--steps", 1).exit_code == 0
    card = json.loads((out / "model" / "card.json").read_text())
    (out / "model" / "card.json").write_text(json.dumps(card | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="is not the file that"):
        fastsde.pretrained(out / "model")


def test_pictures_without_labels(tmp_path):
    out = tmp_path / "run"
    options = ["--data", pictures(tmp_path / "p", [8] * 6), "--out", out, *TINY]
    assert run(*options, "--steps", 2, "--set", "network.prediction=v_prediction").exit_code == 0
    model, _ = fastsde.pretrained(out / "model")
    assert model.prediction == "v_prediction"
    other = run(*options, "--steps", 4, "--resume")
    assert other.exit_code == 1
    assert 'prediction: "v_prediction" there, "epsilon" here' in other.output
    assert model.event_shape == (3, 8, 8)
    assert model.default_cond is None


def test_two_processes_take_the_steps_of_one(tmp_path, data, monkeypatch):
    """Each batch is the same set of rows, and gradients are averaged: only rounding differs."""
    options = ["--data", data, "--steps", 3, *TINY, "--set", "samples_every=0", "--set", "adversary.width=4"]
    options += ["--set", "adversary.halvings=2", "--set", "training.learning_rate=1e-4"]
    assert run(*options, "--out", tmp_path / "one").exit_code == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [*options, "--out", tmp_path / "two"]
    command = [str(c) for c in (sys.executable, "-m", "fastsde", "train", *both)]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # what torchrun says to each

    def of(rank):
        return os.environ | place | {"RANK": rank, "LOCAL_RANK": rank}

    other = subprocess.Popen(command, env=of("1"), stdout=subprocess.PIPE, text=True)
    for name, value in of("0").items():
        monkeypatch.setenv(name, value)
    result = run(*both)
    told = other.communicate(timeout=300)[0]
    assert (result.exit_code, other.returncode) == (0, 0), result.output
    assert "is ready" in result.output
    assert "is ready" not in told
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    # Sums over rows in another order, in float32; Adam divides by the root of the gradient's square, which turns the
    # rounding of small gradients into up to the learning rate itself: 3 steps of 1e-4.
    for key in (k for k in one if k.startswith("network.")):
        assert (one[key] - two[key]).abs().max() <= 3e-4, key
    for name in ("history.loss", "history.discriminator"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="at least 1"):
        TrainConfig(batch_size=0)
