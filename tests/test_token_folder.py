"""Folders of token models, and `fastsde sample` on them."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastsde
from fastsde.cli.main import main
from fastsde.cli.tokens import token_cells
from fastsde.evaluation.features import Features
from fastsde.evaluation.images import open_images
from fastsde.evaluation.reference import Reference
from fastsde.evaluation.sweep import Problem, Sweep
from fastsde.tokens import SINE, Masking, load_tokens, save_tokens
from fastsde.tokens.networks import CodeBook, TokenTransformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokens") / "model"
    make = {"classes": 3, "width": 8, "depth": 1, "heads": 2}
    generator, critic = TokenTransformer(6, 4, **make), TokenTransformer(6, 4, outputs=1, **make)
    torch.nn.init.normal_(generator.head.weight)
    book = CodeBook(codes=6, width=4, code_width=3)
    save_tokens(path, generator, (2, 2), process=Masking(SINE), critic=critic, book=book)
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_draws_what_python_draws(folder, tmp_path):
    run("sample", "--model", folder, "-n", 5, "--rtol", 0.2, "--seed", 3, "--out", tmp_path)
    opened = load_tokens(folder)
    cond = {"class_labels": torch.arange(5) % 3}
    expected = fastsde.sample(opened.model, n=5, rtol=0.2, seed=3, cond=cond)
    files = np.load(tmp_path / "samples.npz")
    assert np.array_equal(files["tokens"], expected.samples.numpy())
    assert files["arr_0"].shape == (5, 8, 8, 1)
    images = (opened.images(expected.samples) * 127.5 + 127.5).movedim(1, -1).numpy()
    assert np.abs(files["arr_0"] - images).max() <= 0.5 + 1e-3  # rounded to 8 bits
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["nfe"] == expected.nfe.tolist()
    assert record["report"]["bound"] == pytest.approx(expected.report["bound"].tolist())
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (("--nfe", 2), 2),
        (("--steps", 2), 2),
        (("--solver", "Unmask", "-o", "order=confidence", "-o", "choice_temperature=2", "--steps", 2), 2),
        (("--solver", "TokenCritic", "--nfe", 3), 3),
        (("--solver", "FirstHitting"), 4),
    ],
)
def test_solvers_of_tokens_have_names(folder, tmp_path, arguments, calls):
    run("sample", "--model", folder, "-n", 2, "--out", tmp_path, *arguments)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["nfe"] == [calls, calls]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--solver", "DDIM", "--steps", 3), "solvers of tokens are"),
        (("--atol", 0.1), "--atol is for score models"),
        (("-o", "order=random"), "-o needs --solver"),
        (("--solver", "FirstHitting", "--steps", 3), "takes no number of steps"),
        (("--label", 7), "--label must be 0 .. 2"),
        (("--solver", "Unmask", "-o", "order=best", "--steps", 2), "order must be one of"),
    ],
)
def test_bad_options_are_refused(folder, tmp_path, arguments, said):
    out = tmp_path / "out"
    assert said in run("sample", "--model", folder, "-n", 2, "--out", out, *arguments, code=1)
    assert not out.exists()


def test_a_job_of_tokens_has_the_files_of_one_draw(folder, tmp_path):
    """Of a model with images and of one without."""
    bare = tmp_path / "bare"
    opened = load_tokens(folder)
    save_tokens(bare, opened.model.network, (2, 2), process=Masking(SINE))
    for model, names in ((folder, ["arr_0", "arr_1", "tokens"]), (bare, ["arr_1", "tokens"])):
        options = ["--model", model, "-n", 5, "--rtol", 0.2, "--seed", 3, "--batch-size", 1]
        run("sample", *options, "--out", tmp_path / model.name / "once")
        job = [*options, "--shard-size", 2, "--out", tmp_path / model.name / "job"]
        for rank in (1, 0):
            run("sample", *job, "--rank", rank, "--world-size", 2)
        whole = np.load(tmp_path / model.name / "once" / "samples.npz")
        parts = [np.load(tmp_path / model.name / "job" / f"samples-0000{k}.npz") for k in range(3)]
        assert sorted(whole.files) == names
        for name in names:
            assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])
        once, totals = (json.loads((tmp_path / model.name / x / "samples.json").read_text()) for x in ("once", "job"))
        assert totals["mean_nfe"] == once["mean_nfe"]
        assert (tmp_path / model.name / "job" / "grid.png").is_file() == ("arr_0" in names)
        assert "seed: 3 there, 4 here" in run("sample", *job, "--seed", 4, code=1)
    assert open_images(tmp_path / "model" / "job").n == 5
    with pytest.raises(ValueError, match="holds tokens without images"):
        open_images(tmp_path / "bare" / "job")


def test_damaged_folders_are_refused(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "critic.safetensors").write_bytes((copy / "book.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not the file that"):
        load_tokens(copy)
    (copy / "generator.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="generator"):
        load_tokens(copy)
    (copy / "tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe"):
        load_tokens(copy)


def test_a_sweep_measures_decoded_tokens(folder, tmp_path):
    opened = load_tokens(folder)
    features = Features(lambda x: (x.flatten(1)[:, :4], x.flatten(1)[:, :3]), "corner", 1, shape=(1, 8, 8))
    generator = torch.Generator().manual_seed(0)
    feats = torch.rand(60, 4, generator=generator)
    described = {"features": features.describe(), "image_shape": [1, 8, 8], "n": 60, "source": "random"}
    reference = Reference(feats.double().mean(0), feats.double().T.cov(), feats, described)
    problem = Problem(opened.model, features, reference, {"model": "tokens"}, opened.classes, opened.images)
    cells = token_cells(opened, ["EntropyBudget", "Unmask", "TokenCritic"], [3], [0.2], [0])
    assert [(cell.label, cell.setting) for cell in cells] == [
        ("EntropyBudget", "rtol 0.2"),
        ("Unmask", "nfe 3"),
        ("Unmask", "rtol 0.2"),
        ("TokenCritic", "nfe 3"),
    ]
    sweep = Sweep(tmp_path / "bench", problem, cells, 20, batch_size=8, shard_size=16, draws=2)
    list(sweep.run())
    for cell, row in zip(cells, sweep.rows(), strict=True):
        assert row["fid"] is not None
        options = {"nfe": cell.nfe, "rtol": cell.rtol, "cond": {"class_labels": torch.arange(20) % 3}}
        r = fastsde.sample(opened.model, n=20, seed=0, solver=cell.solver, **options)
        assert row["mean_nfe"] == float(r.nfe.double().mean())
        # In 8 bits; batches of other sizes round decoded values differently.
        assert np.abs(sweep.images(cell, 20) - problem.images(r.samples).astype(int)).max() <= 1
    with pytest.raises(ValueError, match="--solvers FirstHitting"):
        token_cells(opened, ["FirstHitting"], [3], [], [0])
    with pytest.raises(ValueError, match="is for score models"):
        token_cells(opened, ["DDIM"], [3], [], [0])
