"""The sweep: calls as the network counts them, survival of SIGKILL, ranks, and a page that a browser shows."""

import csv
import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import run
from tiny_sweep import MEAN, SHAPE, STD, finish, problem, sweep

import fastsde
from fastsde.cli.bench import build_cells
from fastsde.evaluation.jobs import ShardedJob
from fastsde.evaluation.report import draw, page, plot
from fastsde.evaluation.sweep import pareto, summarise
from fastsde.score import GaussianScore

TABLES = ("results.jsonl", "results.csv", "summary.csv")


def tables(folder):
    return {name: (folder / name).read_bytes() for name in TABLES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("sweep") / "whole")


def test_the_tables_hold_every_cell(finished):
    with (finished.folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [(row["solver"], row["setting"], row["seed"]) for row in rows]
    expected = [
        (solver, setting, str(seed))
        for solver, settings in (("ExponentialPC", ("nfe 5", "nfe 8", "rtol 0.1")), ("DDIM", ("nfe 5", "nfe 8")))
        for setting in settings
        for seed in (0, 1)
    ]
    assert names == expected
    assert all(int(row["n"]) == 60 and json.loads(row["status"]) == {"SUCCESS": 60} for row in rows)
    lines = [json.loads(line) for line in (finished.folder / "results.jsonl").read_text().splitlines()]
    assert [float(row["fid"]) for row in rows] == [line["fid"] for line in lines]


def test_figures_are_those_of_the_samples(finished):
    """The Frechet distance of the first cell, from its shards, by hand."""
    images = column(finished, finished.cells[0], "arr_0").reshape(60, -1)
    x = torch.from_numpy(images).double() / 127.5 - 1
    cov, exact = x.T.cov(), torch.diag(STD.flatten() ** 2)
    cross = torch.linalg.eigvals(cov @ exact).sqrt().real.sum()
    fid = (x.mean(0) - MEAN.flatten()).square().sum() + cov.trace() + exact.trace() - 2 * cross
    assert finished.rows()[0]["fid"] == pytest.approx(float(fid), rel=1e-5)  # features are in single precision


def column(work, cell, name):
    """An array of all shards of a cell."""
    return ShardedJob.load(work.folder / "cells" / cell.name).column(name)


class Counting(torch.nn.Module):
    """An exact network that counts the calls of each sample, which it knows by its label."""

    def __init__(self):
        super().__init__()
        self.exact, self.calls = GaussianScore(fastsde.VPSDE(), MEAN, STD), torch.zeros(61, dtype=torch.int64)

    def forward(self, x, t, class_labels):
        self.calls += torch.bincount(class_labels, minlength=61)
        return self.exact.network(x, t)


def counted(folder, solvers, nfe, rtol, wrap=lambda model: model):
    """Calls of each sample by the network's own count, and by the sweep's, for each cell."""
    counting = Counting()
    inside = fastsde.ScoreModel(counting, fastsde.VPSDE(), "score", event_shape=SHAPE)
    task = dataclasses.replace(problem(wrap(inside)), classes=60)
    # One row at a time: in wider batches, slots that wait for nothing are evaluated along and counted by nobody.
    work = sweep(folder, solvers, nfe, rtol, 1, problem=task, batch_size=1)
    for cell in work.run():
        told = torch.from_numpy(column(work, cell, "nfe"))
        assert work.rows()[-1]["mean_nfe"] == pytest.approx(float(told.double().mean()))
        yield cell, counting.calls.clone(), told
        counting.calls.zero_()


@pytest.mark.long
@pytest.mark.parametrize(
    ("solvers", "nfe", "rtol"),
    [("ExponentialPC", (6,), ()), ("EulerMaruyama Heun", (7,), ()), ("ExtrapolatedEM", (), (0.5,))],
)
def test_calls_are_those_that_the_network_counts_for_each_sample(solvers, nfe, rtol, tmp_path):
    """Denoising and rejections included: EulerMaruyama ends with a call of its own, ExtrapolatedEM rejects steps."""
    for cell, own, told in counted(tmp_path / "x", solvers, nfe, rtol):
        assert torch.equal(own[:60], told), cell
        assert not nfe or int(told.max()) <= nfe[0]


def test_guided_calls_count_twice(tmp_path):
    """The other half of guidance carries label 60: one of its calls for each of a sample's own."""

    def guide(model):
        return fastsde.score.ClassifierFreeGuidance(model, scale=2.0, negative={"class_labels": torch.tensor(60)})

    for _, own, told in counted(tmp_path / "x", "ExponentialPC", (8,), (), guide):
        assert told.tolist() == [8] * 60
        assert own.tolist() == [4] * 60 + [240]


def test_two_processes_make_the_tables_of_one(finished, tmp_path):
    for rank in (1, 0):
        work = finish(tmp_path / "two", rank, 2)
    assert tables(work.folder) == tables(finished.folder)
    assert (work.folder / "report.html").read_bytes() == (finished.folder / "report.html").read_bytes()


def test_two_processes_at_once_make_the_tables_of_one(finished, tmp_path):
    """Neither knows of the other; who ends last writes the tables."""
    program = [sys.executable, str(Path(__file__).with_name("tiny_sweep.py")), str(tmp_path / "x"), "0", "1"]
    both = [subprocess.Popen(program, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert tables(tmp_path / "x") == tables(finished.folder)
    assert not [path for path in (tmp_path / "x").rglob("*.tmp*")]


def test_killed_at_random_moments_it_ends_with_the_same_bytes(finished, tmp_path):
    """SIGKILL, twice, at moments drawn from the work; then to the end. (Twenty times: benchmarks/README.md.)"""
    program = [sys.executable, str(Path(__file__).with_name("tiny_sweep.py")), str(tmp_path / "x"), "0", "1"]
    chance, killed = random.Random(0), 0
    for _ in range(2):
        process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "started\n"
        time.sleep(chance.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert killed > 0
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    assert tables(tmp_path / "x") == tables(finished.folder)
    assert not [path for path in (tmp_path / "x").rglob("*.tmp*")]


def test_more_cells_may_join_but_other_settings_may_not(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "x")
    more = sweep(tmp_path / "x", "ExponentialPC DDIM Heun")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*.npz")}
    list(more.run())
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert len(more.rows()) == len(finished.cells) + 4
    for options, message in (
        ({"n": 61}, "n: 60 there, 61 here"),
        ({"problem": problem(weights="other")}, "weights: null there"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(tmp_path / "x", **options)


def test_a_shard_or_a_figure_of_another_cell_is_found_before_the_first_call(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "x")

    def network(x, t):
        raise AssertionError("called")

    work = sweep(tmp_path / "x", problem=problem(fastsde.ScoreModel(network, fastsde.VPSDE(), event_shape=SHAPE)))
    first, other = (work.folder / "cells" / cell.name for cell in (work.cells[0], work.cells[-1]))
    for name, message in (
        ("samples-00001.npz", "not shard 1 of this job: it is of a job with other settings"),
        ("result.json", "of other settings than this sweep"),
    ):
        kept = (other / name).read_bytes()
        shutil.copy(first / name, other / name)
        with pytest.raises(ValueError, match=rf"{re.escape(str(other / name))} is {message}.*Delete it and run the"):
            list(work.run())
        (other / name).write_bytes(kept)
    (other / "result.json").write_text("[" * 9999)
    with pytest.raises(ValueError, match=r"result\.json is not JSON"):
        list(work.run())


def test_samples_that_are_lost_are_told_and_cost_the_others_nothing(tmp_path):
    sde = fastsde.VPSDE()
    exact = GaussianScore(sde, MEAN, STD)

    def network(x, t):
        out = exact.network(x, t)
        out[:1] = torch.nan
        return out

    work = finish(tmp_path / "x", solvers="DDIM", nfe=(5,), rtol=(), problem=problem(
        fastsde.ScoreModel(network, sde, "score", event_shape=SHAPE)
    ))  # fmt: skip
    assert [row["fid"] for row in work.rows()] == [None, None]
    assert "are not finite: nothing was measured" in work.rows()[0]["note"]
    assert (work.folder / "report.html").is_file()


def row(solver, fid, error=0.1, setting="nfe 10", calls=10.0, seed=0):
    base = {"solver": solver, "setting": setting, "seed": seed, "n": 100, "mean_nfe": calls, "max_nfe": 10}
    return base | {"status": {"SUCCESS": 100}, "fid": fid, "fid_error": error}


def test_differences_inside_the_error_are_not_ranked():
    """2 x the joint error of 0.1 and 0.1 is 0.28: 1.0 and 1.2 share a rank, 1.45 is behind the first alone."""
    summary = summarise(
        [row("a", 1.0), row("b", 1.2), row("c", 1.45), row("d", 9.0), row("e", 1.0, setting="rtol 0.1")]
    )
    assert [line["rank"] for line in summary] == [1, 1, 2, 4, None]


def test_the_error_is_the_larger_of_bootstrap_and_spread():
    quiet = summarise([row("a", 1.0, 0.4, seed=0), row("a", 1.0, 0.4, seed=1)])[0]
    assert quiet["fid_error"] == pytest.approx(0.4 / 2**0.5)
    loud = summarise([row("a", 1.0, 0.1, seed=0), row("a", 3.0, 0.1, seed=1)])[0]
    assert loud["fid"] == 2
    assert loud["fid_error"] == pytest.approx(2**0.5 / 2**0.5)


def test_pareto_front():
    rows = [row("a", 3.0, calls=5.0), row("b", 2.0, calls=9.0), row("c", 2.5, calls=10.0), row("d", 1.0, calls=12.0)]
    assert [line["solver"] for line in pareto(rows)] == ["a", "b", "d"]


def test_the_plot_has_the_points_and_the_page_needs_no_other_file(finished):
    html = (finished.folder / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', html) == []
    assert html.count("<figure>") == 1 + 5  # the plot, and a strip of images for each solver and setting
    assert "ExponentialPC" in html
    assert '"bootstrap": 4' in html.replace("&quot;", '"')
    picture = np.asarray(Image.open(finished.folder / "plot.png").convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two: a line for each solver
        assert (np.abs(picture.astype(int) - colour).max(1) < 12).sum() > 100


@pytest.mark.parametrize("spread", [1.2, 8.0, 40.0, 5000.0])
def test_the_axes_have_plain_numbers(spread):
    """Over less than a decade and over several: at least two ticks on each axis, labelled as they are."""
    rows = [row("a", 0.01 * spread**k, 1e-4, f"nfe {n}", n) for k, n in enumerate((8, 9, 30))]
    figure = draw(summarise(rows))
    figure.draw_without_rendering()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        low, high = axis.get_view_interval()
        inside = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        labels = [float(tick.label1.get_text()) for tick in inside]
        assert len(labels) >= 2
        assert labels == pytest.approx([tick.get_loc() for tick in inside])
        assert not [tick for tick in axis.get_minor_ticks() if tick.label1.get_text()]


@pytest.mark.parametrize("count", [1, 4])
def test_the_pareto_front_is_drawn_as_the_page_says(count):
    """Also where it is a single setting: at each number of calls the least FID of as many or fewer."""
    rows = [row("a", 3.0, calls=5.0), row("b", 2.0, calls=9.0), row("c", 2.5, calls=10.0), row("d", 1.0, calls=12.0)]
    line = next(line for line in draw(summarise(rows[:count])).axes[0].lines if line.get_drawstyle() == "steps-post")
    expected = [(5.0, 3.0), (9.0, 2.0), (12.0, 1.0), (12.0, 1.0)] if count == 4 else [(5.0, 3.0), (5.0, 3.0)]
    assert list(zip(*line.get_data(), strict=True)) == expected
    assert line.get_linewidth() > 0.5
    assert line.get_color() == "black"


def test_names_cannot_break_the_page():
    summary = summarise([row("<script>alert(1)</script>", 1.0)])
    html = page(summary, plot(summary), [("nfe 1", "<b>", np.zeros((1, 4, 4, 1), np.uint8))], {"x": "</pre>"}, "<i>")
    assert "<script>" not in html
    assert html.count("</pre>") == 1


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.parametrize("width", [1200, 600])
def test_a_browser_shows_the_page(finished, tmp_path, width):
    """All images are decoded, nothing runs out of the window, and the table needs no scrolling on a wide one."""
    script = """<script>onload = () => document.title = JSON.stringify({
      images: [...document.images].map(i => i.naturalWidth), wide: document.body.scrollWidth - innerWidth,
      table: document.querySelector("table").offsetWidth - document.body.clientWidth})</script>"""
    copy = tmp_path / "page.html"
    copy.write_text((finished.folder / "report.html").read_text().replace("</body>", script + "</body>"))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},2000",
        f"--user-data-dir={tmp_path}",
    ]
    dom = subprocess.run(
        [BROWSER, *options, "--dump-dom", "--virtual-time-budget=5000", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom, re.S).group(1).replace("&quot;", '"'))
    assert len(seen["images"]) == 6
    assert min(seen["images"]) > 100
    assert seen["wide"] <= 0
    assert seen["table"] <= 0 or width < 1200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solvers", "Euler", "--nfe", "5"], "no solver 'Euler'"),
        (["--solvers", "DDIM:eta", "--nfe", "5"], "must be KEY=VALUE"),
        (["--solvers", "DDIM:grid=round", "--nfe", "5"], "no grid 'round'"),
        (["--solvers", "DDIM", "--rtol", "0.1"], "takes --nfe, and none was given"),
        (["--solvers", "ExtrapolatedEM", "--nfe", "5"], "takes --rtol, and none was given"),
        (["--solvers", "DDIM"], "give --nfe, --rtol or both"),
        (["--solvers", "DDIM DDIM", "--nfe", "5"], "DDIM-nfe-5-seed0 twice"),
        (["--nfe", "few"], "--nfe must be numbers"),
        (["--solvers", "AnnealedLangevin", "--nfe", "5"], "AnnealedLangevin"),
        (["--nfe", "5", "-n", "100"], "n = 100 samples are too few for 64 features: at least 130"),
        (["--nfe", "5", "--rank", "3", "--world-size", "2"], "--rank must be in 0 .. 1"),
        (["--nfe", "5", "--reference", "none.npz"], "no reference at none.npz"),
        (["--nfe", "5", "--model", "nothing"], "no model 'nothing'"),
    ],
)
def test_bad_sweeps_are_refused_before_sampling(arguments, message, tmp_path):
    result = run("bench", *arguments, "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert message in result.output
    assert not list((tmp_path / "x").rglob("*.npz"))


def test_solvers_take_what_they_can():
    model = GaussianScore(fastsde.VPSDE(), MEAN, STD)
    solvers = ["ExponentialPC:eta=1", "DPMSolverPP:order=3,grid=karras", "ExtrapolatedEM"]
    cells = build_cells(model, solvers, [10], [0.1], [3])
    assert [(cell.label, cell.setting) for cell in cells] == [
        ("ExponentialPC:eta=1", "nfe 10"),
        ("ExponentialPC:eta=1", "rtol 0.1"),
        ("DPMSolverPP:order=3,grid=karras", "nfe 10"),
        ("ExtrapolatedEM", "rtol 0.1"),
    ]
    assert cells[0].solver == fastsde.ExponentialPC(eta=1.0)
    assert cells[2].solver.order == 3
    assert torch.equal(cells[2].controller.times, fastsde.Grid.karras(model.sde, 9).times)
    assert all(cell.seed == 3 for cell in cells)
