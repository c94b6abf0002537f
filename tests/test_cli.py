"""The command line, as a user meets it: files, records, refusals."""

import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_training import write_split

import fastsde
from fastsde.checkpoints import ASSETS
from fastsde.cli import output
from fastsde.cli.info import solver_table
from fastsde.cli.main import main
from fastsde.cli.sample import sample as sample_command
from fastsde.cli.solver_options import SOLVER_NAMES, Steps, configured
from fastsde.evaluation.images import image_grid, to_uint8
from fastsde.score import GaussianScore


class Border(torch.nn.Module):
    """Stands in for a network: fast, and its exact samples are known. Predicts the noise of an image of label / 10."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.fail_after = None

    def forward(self, x, t, class_labels):
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise RuntimeError("out of memory")
        sde = fastsde.VPSDE()
        time = (t.double() + 1) / 1000
        image = (class_labels / 10).float().reshape(-1, 1, 1, 1)
        shape = (-1, 1, 1, 1)
        return (x - sde.alpha(time).float().reshape(shape) * image) / sde.sigma(time).float().reshape(shape)


@pytest.fixture
def network(monkeypatch):
    network = Border()

    def load(name, device="cpu"):
        model = fastsde.pretrained(name, device=device)
        model.network = network
        return model

    monkeypatch.setattr("fastsde.cli.models.pretrained", load)
    return network


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_neither_the_package_nor_its_help_imports_what_few_need():
    program = """
import sys
import fastsde
from fastsde.cli.main import main
main(["--help"], standalone_mode=False)
main(["sample", "--help"], standalone_mode=False)
print({"diffusers", "transformers", "matplotlib", "scipy", "ray"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr


@pytest.mark.usefixtures("network")
def test_sample_writes_grid_samples_and_record(tmp_path):
    out = tmp_path / "a" / "b"
    result = run("sample", "-n", 11, "--rtol", 0.1, "--seed", 3, "--batch-size", 4, "--out", out)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "samples.json").read_text())
    with np.load(out / "samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (11, 28, 28, 1)
    assert images.dtype == np.uint8
    # A point mass at label / 10 is denoised exactly; the map to 8 bits sends [-1, 1] to 0 .. 255.
    expected = np.round((np.arange(11) % 10 / 10 + 1) * 127.5)
    assert np.abs(images - expected[:, None, None, None]).max() <= 1
    assert labels.tolist() == record["label"] == [i % 10 for i in range(11)]
    assert Image.open(out / "grid.png").size == ((8 * 30 + 2) * 3, (2 * 30 + 2) * 3)
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "samples.json", "samples.npz"]
    assert len(record["nfe"]) == len(record["status"]) == 11
    assert record["seed"] == 3
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["weights_sha256"]) == 64
    # One call a step and one to start with; the last is the denoised sample.
    steps = [a + r for a, r in zip(record["accepted"], record["rejected"], strict=True)]
    assert record["nfe"] == [k + 1 for k in steps]


@pytest.mark.usefixtures("network")
def test_json_on_standard_output_is_the_record(tmp_path):
    result = run("sample", "-n", 2, "--rtol", 0.5, "--label", "none", "--json", "--out", tmp_path)
    assert json.loads(result.stdout) == json.loads((tmp_path / "samples.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rtol", "0"], "rtol must be"),
        (["-n", "0"], "0 is not in the range"),
        (["--label", "10"], "0 .. 9"),
        (["--label", "shirt"], "cycle"),
        (["--model", "cifar"], "fashion-mnist"),
        (["--pipeline", "./none"], "there is no such folder"),
        (["--seed", "-1"], "seed must be"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "meta"),
    ],
)
def test_bad_options_are_refused_before_sampling(network, tmp_path, arguments, message):
    network.fail_after = 0
    result = run("sample", "--out", tmp_path, *arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert "out of memory" not in result.output


def test_unwritable_out_is_found_before_sampling(network, tmp_path):
    network.fail_after = 0
    (tmp_path / "file").write_text("")
    result = run("sample", "--out", tmp_path / "file" / "below")
    assert result.exit_code == 1
    assert "cannot be written to" in result.output
    assert "out of memory" not in result.output


def test_an_unwritable_plot_is_told_by_its_own_option(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("diagnose", "--plot", tmp_path / "file" / "below" / "plot.png")
    assert result.exit_code == 1
    assert f"--plot {tmp_path / 'file' / 'below'} cannot be written to" in result.output


def test_too_little_room_is_found_before_sampling(network, tmp_path, monkeypatch):
    network.fail_after = 0
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    result = run("sample", "-n", 10_000, "--out", tmp_path)
    assert result.exit_code == 1
    assert "MiB free" in result.output


@pytest.mark.usefixtures("network")
def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    result = run("sample", "-n", 2, "--rtol", 0.5, "--out", tmp_path)
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_late_failure_keeps_what_is_finished(network, tmp_path):
    network.fail_after = 50
    result = run("sample", "-n", 40, "--batch-size", 2, "--rtol", 0.5, "--out", tmp_path)
    assert result.exit_code == 1
    assert "out of memory" in result.output
    record = json.loads((tmp_path / "samples.json").read_text())
    assert 0 < record["finished"] < 40
    with np.load(tmp_path / "samples.npz") as arrays:
        assert len(arrays["arr_0"]) == record["finished"]


def test_a_failure_in_the_last_call_is_told_per_sample(network, tmp_path):
    options = ["-n", 5, "--batch-size", 3, "--rtol", 0.5, "--label", "0", "--out", tmp_path]
    options += ["--solver", "ExtrapolatedEM"]  # which ends with a call to denoise
    calls = []
    plain = network.forward
    network.forward = lambda *a, **k: (calls.append(1), plain(*a, **k))[1]
    assert run("sample", *options).exit_code == 0
    network.fail_after = len(calls) - 1
    assert run("sample", *options).exit_code == 1
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["status_counts"]["NOT_DENOISED"] == 2  # the second pool: 5 - 3
    assert record["in_npz"] == [0, 1, 2, 3, 4]


def test_interrupted_before_anything_is_finished_leaves_old_results_alone(network, tmp_path):
    options = ["-n", 2, "--rtol", 0.5, "--out", tmp_path]
    assert run("sample", *options).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    network.forward = interrupt
    result = run("sample", *options)
    assert result.exit_code == 1
    assert "nothing was written" in result.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rounding_to_eight_bits_is_to_the_nearest():
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    exact = levels.double() / 127.5 - 1
    # Anything within half a level comes back to its level; truncation would lose a half level on one side.
    for shift in (-0.49, 0.0, 0.49):
        assert np.array_equal(to_uint8(exact + shift / 127.5, (-1.0, 1.0))[0, :, :, 0], levels[0, 0].numpy())
    assert to_uint8(torch.full((1, 1, 1, 1), 7.0), (0.0, 1.0)).item() == 255


def test_grid_puts_images_in_rows():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 84, 84, 3), np.uint8)
    sheet = np.asarray(image_grid(images, columns=3))
    assert sheet.shape == (2 * 86 + 2, 3 * 86 + 2, 3)
    assert [sheet[40, 40, 0], sheet[40, 126, 0], sheet[126, 40, 0], sheet[126, 126, 0]] == [0, 1, 3, 4]
    assert sheet[0, 0, 0] == sheet[126, 212, 0] == 255


def test_info_agrees_with_the_package():
    record = json.loads(run("info", "--json").stdout)
    assert set(record["solvers"]) == {solver.__name__ for solver in (*fastsde.SOLVERS, fastsde.FittedSolver)}
    assert record["models"]["fashion-mnist"]["event_shape"] == [1, 28, 28]
    assert "fashion-mnist" in run("info").stdout


def test_solver_table_in_the_docs_is_the_generated_one(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "reference" / "solver-table.md").read_text()
    assert solver_table() in text, "run `fastsde info --markdown` and put its table into docs/reference/solver-table.md"


@pytest.mark.parametrize("command", [[], ["sample"], ["train"], ["info"]])
def test_help_has_an_example(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output


def test_help_shows_defaults():
    text = run("sample", "--help").output
    for parameter in sample_command.params:
        assert max(parameter.opts, key=len) in text
    assert "[default: (0.05)]" in text


def test_train_then_sample(tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    generator = np.random.default_rng(0)
    write_split(data, "train", generator.integers(0, 256, (20, 8, 8), dtype=np.uint8), np.arange(20) % 2)
    options = ["--data", data, "--out", out, "--steps", 2, "--batch-size", 4]
    assert run("train", *options).exit_code == 0
    again = run("train", *options)
    assert again.exit_code == 1
    assert "--resume" in again.output
    model, _ = fastsde.pretrained(out / "model")
    assert model.event_shape == (1, 8, 8)
    write_split(data, "t10k", np.zeros((3, 12, 12), np.uint8), np.zeros(3))
    other = run("train", "--data", data, "--out", out / "y", "--steps", 2)
    assert other.exit_code == 1
    assert "test split has other image sizes" in other.output
    assert not (out / "y").exists()
    missing = run("train", "--data", tmp_path / "nothing", "--out", out / "x")
    assert missing.exit_code == 1
    assert "neither a file nor a folder" in missing.output


CARD = json.loads((ASSETS / "fashion-mnist" / "card.json").read_text())
DAMAGED = {
    "deep": ("card.json", "[" * 9999, "is not JSON"),
    "a list": ("card.json", "[1]", "must hold a JSON object"),
    "negative shape": (
        "card.json",
        CARD | {"event_shape": [1, -28, 28]},
        "event_shape must be an integer of at least 1",
    ),
    "no range": ("card.json", CARD | {"data_range": [1]}, "data_range must be a list of 2; got [1]"),
    "empty range": ("card.json", CARD | {"data_range": [1, 1]}, "data_range must be two numbers, the lower first"),
    "levels": ("card.json", CARD | {"timestep_levels": "many"}, "timestep_levels must be in"),
    "classes": ("card.json", CARD | {"classes": 5}, "classes must be a list"),
    "process": ("card.json", CARD | {"sde": 3}, "does not describe a network"),
    "width": ("config.json", {"block_out_channels": [10**30] * 4}, "does not describe a network"),
    "other network": ("config.json", {"block_out_channels": [32] * 4}, "does not fit"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_model_is_one_line_that_names_the_file(name, content, message, tmp_path):
    shutil.copytree(ASSETS / "fashion-mnist", tmp_path / "m")
    (tmp_path / "m" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    result = run("sample", "-n", 1, "--nfe", 3, "--model", tmp_path / "m", "--out", tmp_path / "out")
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert message in result.output
    assert name in result.output
    assert not (tmp_path / "out").exists()


def test_what_nobody_expected_is_one_line_too(monkeypatch):
    """A model of others, or a damaged file, may raise anything."""

    def fail(*args):
        raise AttributeError("no such\n\tthing" + 9999 * " and more")

    monkeypatch.setattr("fastsde.cli.sample.open_model", fail)
    result = run("sample")
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert result.output.startswith("Error: AttributeError: no such thing and more and")
    assert len(result.output) <= 1010


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--out"],
        ["sample", "--fitted"],
        ["bench", "--nfe", "5", "--out"],
        ["stats", "--data", "x", "--out"],
        ["stats", "--out", "x", "--data"],
        ["evaluate"],
        ["fit", "--nfe", "5", "--out"],
        ["train", "--out"],
        ["train-features", "--data", "x", "--out"],
    ],
)
def test_an_empty_path_is_not_this_folder(command):
    result = run(*command, "")
    assert result.exit_code == 2
    assert "an empty path; write . for this folder" in result.output


@pytest.mark.usefixtures("network")
def test_folders_made_above_out_are_told_and_out_itself_is_not(tmp_path):
    options = ["sample", "-n", 1, "--nfe", 3, "--json", "--out"]
    result = run(*options, tmp_path / "a" / "b" / "c")
    assert f"{tmp_path / 'a'} was not there and is made" in result.stderr
    json.loads(result.stdout)
    assert "was not there" not in run(*options, tmp_path / "d").stderr


def test_files_that_could_not_be_written_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for command in (["fit", "--nfe", 5], ["stats", "--data", tmp_path / "none"], ["evaluate", tmp_path / "none"]):
        assert "is a folder; name a file" in run(*command, "--out", tmp_path).output
        assert "cannot be written to: Not a directory" in run(*command, "--out", tmp_path / "file" / "x" / "y").output
    assert "--plot" in run("fit", "--nfe", 5, "--out", tmp_path / "c.json", "--plot", tmp_path).output


def test_no_data_set_comes_with_the_package_and_the_message_says_so(tmp_path):
    for command in (["stats"], ["train"], ["train-features"]):
        result = run(*command, "--data", tmp_path / "fashion-mnist", "--out", tmp_path / "x")
        assert result.exit_code == 1
        assert "o data set comes with fastsde" in result.output


# ---- solvers by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_every_solver_can_be_built_by_name_with_a_grid(name):
    options = ("eta=0.3",) if name == "AnnealedLangevin" else ()
    sde = fastsde.VPSDE()
    solver, controller = Steps(name, options=options, steps=3).build(sde)
    model = GaussianScore(sde, torch.zeros(2), torch.ones(2))
    r = fastsde.sample(model, n=2, solver=solver, controller=controller)
    assert r.success.all()
    first = solver.calls_per_step * (3 + solver.warm_up) + (not solver.keeps_x_0)
    assert r.nfe.tolist() == [first] * 2


def test_options_reach_the_solver():
    assert configured(fastsde.DDIM(), ["eta=0.5"]) == fastsde.DDIM(eta=0.5)
    assert configured(fastsde.ProbabilityFlow(), ["tableau=RK4", "steps=7"]) == fastsde.ProbabilityFlow(7, fastsde.RK4)
    options = ["predictor=Ancestral", "predictor.posterior=false", "corrector.snr=0.1"]
    built = configured(fastsde.PredictorCorrector(), options)
    assert built == fastsde.PredictorCorrector(fastsde.Ancestral(posterior=False), fastsde.Langevin(0.1))
    _, grid = Steps("DDIM", steps=5, grid="karras").build(fastsde.VPSDE())
    assert torch.equal(grid.times, fastsde.Grid.karras(fastsde.VPSDE(), 5).times)
    assert Steps("ProbabilityFlow", rtol=0.1).build(fastsde.VPSDE()) == (fastsde.ProbabilityFlow(), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "DDIM"], "--solver DDIM walks a grid: say how many steps with --steps"),
        (["--grid", "karras"], "--grid needs --steps"),
        (["--solver", "DDIM", "--steps", "5", "--rtol", "0.1"], "give either --steps, which fixes the grid, or --rtol"),
        (["--solver", "DDIM", "--steps", "5", "-o", "eta"], "--option must be KEY=VALUE; got 'eta'"),
        (["--solver", "DDIM", "--steps", "5", "-o", "eta=much"], "is 0.0 by default; 'much' is of another kind"),
        (["--solver", "DDIM", "--steps", "5", "-o", "eta=7"], "eta must be in"),
        (["--solver", "DDIM", "--steps", "5", "-o", "spin=7"], "DDIM has no option 'spin'; it has steps, eta"),
        (["--solver", "DDIM", "--steps", "5", "-o", "eta=DDIM"], "is of another kind"),
        (["--solver", "DDIM", "--steps", "5", "-o", "eta.x=1"], "DDIM.eta has no options of its own"),
        (["--solver", "Magic"], "'Magic' is not one of"),
        (["--solver", "Unmask"], "--solver Unmask is for models of tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_solver_options_are_refused_by_name(arguments, message, tmp_path):
    result = run("sample", *arguments, "--out", str(tmp_path))
    assert result.exit_code != 0
    assert message in result.output.replace("\n", " ")


def test_sample_with_another_solver_says_so_in_the_record(tmp_path):
    run("sample", "-n", "2", "--solver", "DPMSolverPP", "--steps", "4", "-o", "eta=1", "--out", str(tmp_path))
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["solver"] == repr(fastsde.DPMSolverPP(eta=1.0))
    assert record["grid"].startswith("Grid(4 steps")
    assert record["nfe"] == [5, 5]
    assert "rtol" not in record


def test_info_on_one_topic():
    assert "models" not in run("info", "solvers").output
    parts = json.loads(run("info", "models", "--json").output)
    assert set(parts) == {"versions", "models"}


@pytest.mark.usefixtures("network")
def test_a_budget_and_a_fitted_solver(tmp_path):
    assert run("sample", "-n", 3, "--nfe", 6, "--out", tmp_path).exit_code == 0
    assert json.loads((tmp_path / "samples.json").read_text())["nfe"] == [6, 6, 6]
    file = tmp_path / "f.json"
    result = run("fit", "--nfe", 3, "--pilots", 8, "--out", file)
    assert result.exit_code == 0, result.output
    assert "held-out" in result.output
    again = run("fit", "--nfe", 3, "--pilots", 8, "--out", file, "--json")
    assert json.loads(again.stdout) == json.loads(file.read_text())
    assert run("sample", "-n", 3, "--fitted", file, "--out", tmp_path).exit_code == 0
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["nfe"] == [3, 3, 3]
    assert record["solver"] == repr(fastsde.FittedSolver.load(file))
    for wrong in (["--nfe", 6, "--steps", 5], ["--nfe", 6, "--rtol", 0.1]):
        result = run("sample", "-n", 3, *wrong, "--out", tmp_path)
        assert result.exit_code == 1
        assert "give either" in result.output
    for wrong in (["--nfe", 6], ["--rtol", 0.1], ["-o", "eta=1"]):
        result = run("sample", "-n", 3, *wrong, "--fitted", file, "--out", tmp_path)
        assert result.exit_code == 1
        assert f"it goes without {wrong[0]}" in result.output


def test_sample_from_diffusers_models(tmp_path):
    import tiny

    tiny.dit_pipeline().save_pretrained(tmp_path / "dit")
    tiny.ddpm().save_pretrained(tmp_path / "ddpm")
    out = tmp_path / "out"

    def drawn(*arguments):
        result = run("sample", *arguments, "-n", "3", "--rtol", "0.3", "--out", str(out))
        assert result.exit_code == 0, result.output
        return np.load(out / "samples.npz"), json.loads((out / "samples.json").read_text())

    arrays, record = drawn("--model", str(tmp_path / "dit"), "--label", "7", "--guidance-scale", "1")
    assert arrays["arr_1"].tolist() == record["label"] == [7, 7, 7]
    whole, _ = drawn("--model", str(tmp_path / "ddpm"))
    network, record = drawn("--model", str(tmp_path / "ddpm" / "unet"))
    assert np.array_equal(whole["arr_0"], network["arr_0"])
    assert len(record["weights_sha256"]) == 64


def test_what_a_model_does_not_take_is_refused(tmp_path):
    import tiny

    tiny.stable_diffusion().save_pretrained(tmp_path / "sd")
    tiny.ddpm().save_pretrained(tmp_path / "ddpm")
    for arguments, message in (
        (("--model", str(tmp_path / "sd")), f"`fastsde sample --pipeline {tmp_path / 'sd'} --prompt ..`"),
        (("--model", str(tmp_path / "ddpm"), "--prompt", "a"), "--model goes without --prompt"),
        (("--guidance-scale", "3"), "no guidance"),
        (("--model", str(tmp_path / "ddpm"), "--label", "3"), "--label must be"),
    ):
        result = run("sample", "-n", "1", *arguments, "--out", str(tmp_path / "out"))
        assert result.exit_code == 1
        assert message in result.output
