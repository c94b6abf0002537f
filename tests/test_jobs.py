"""Jobs of shards: nothing is lost, doubled or half-written; other settings are refused; processes share."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from test_cli import network, run

from fastsde.evaluation.claims import Claims, make_here
from fastsde.evaluation.images import open_images
from fastsde.evaluation.jobs import ShardedJob, check_settings, processes, shard_arrays
from fastsde.result import SampleResult, Status

__all__ = ["network"]


def squares(indices):
    """Of each sample an image of four equal pixels, k * k, and that number."""
    values = np.array([k * k for k in indices])
    return {"arr_0": values[:, None, None, None].astype(np.uint8).repeat(4, 1), "nfe": values}


def begin(folder, n=10, size=4, **settings):
    return ShardedJob.begin(folder, n, size, settings)


def test_shards_hold_every_sample_once(tmp_path):
    job = begin(tmp_path / "x")
    assert list(job.run(squares)) == [0, 1, 2]
    assert job.column("index").tolist() == list(range(10))
    assert job.first(10)[:, 3, 0, 0].tolist() == job.column("nfe").tolist() == [k * k for k in range(10)]
    assert job.pending() == []


def test_a_job_goes_on_where_it_stopped_and_draws_nothing_twice(tmp_path):
    job, drawn = begin(tmp_path / "x"), []

    def draw(indices):
        drawn.append(indices[0])
        return squares(indices)

    stopped = job.run(draw)
    next(stopped)
    stopped.close()
    list(begin(tmp_path / "x").run(draw))
    assert drawn == [0, 4, 8]


def test_a_failure_leaves_no_half_shard(tmp_path, monkeypatch):
    job = begin(tmp_path / "x")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)  # after the bytes went to the temporary file
    with pytest.raises(OSError, match=r"No space left on device: .*samples-00000\.npz"):
        list(job.run(squares))
    assert [p.name for p in job.folder.iterdir()] == ["manifest.json"]


def test_left_overs_of_killed_processes_go_when_the_job_is_complete(tmp_path):
    job = begin(tmp_path / "x")
    (job.folder / ".samples-00001.npz.999.tmp").write_bytes(b"half")
    list(job.run(squares))
    assert sorted(p.name for p in job.folder.iterdir()) == [
        "manifest.json",
        "samples-00000.npz",
        "samples-00001.npz",
        "samples-00002.npz",
    ]


def changed(**arrays):
    """A shard 1 of the job with other arrays; None takes one out."""

    def write(folder):
        path = begin(folder, seed=0).path(1)
        with np.load(path) as file:
            kept = {**file, **arrays}
        np.savez(path, **{name: array for name, array in kept.items() if array is not None})

    return write


def of_another(**settings):
    """Shard 1 of a job with other settings, copied in."""

    def write(folder):
        other = begin(folder.with_name("other"), **{"seed": 0, **settings})
        list(other.run(squares))
        shutil.copy(other.path(1), folder)

    return write


def cut_short(folder):
    path = folder / "samples-00001.npz"
    path.write_bytes(path.read_bytes()[:-40])


FOREIGN = {
    "seed": (of_another(seed=1), "a job with other settings"),
    "dtype of the network": (of_another(dtype="float16"), "a job with other settings"),
    "fewer shards": (of_another(n=9), "a job with other settings"),
    "smaller shards": (of_another(size=2), "a job with other settings"),
    "before there were hashes": (changed(manifest_sha256=None), "an earlier version wrote it"),
    "other samples": (changed(index=np.arange(4)), "it holds other samples than 4 to 7"),
    "fewer rows": (changed(index=np.arange(4, 7)), r"its index is int64 with shape \(3,\)"),
    "fewer images": (changed(arr_0=np.zeros((3, 4, 1, 1), np.uint8)), "its arr_0 has 3 rows, not one for each of 4"),
    "fewer labels": (changed(arr_1=np.zeros(3, np.int64)), "its arr_1 has 3 rows, not one for each of 4"),
    "lost samples": (changed(status=np.array([1, 4, 1, 4])), "its arr_0 has 4 rows, not one for each of 2"),
    "no images": (changed(arr_0=None), "it has no images or no index"),
    "floats": (changed(arr_0=np.zeros((4, 4, 1, 1), np.float32)), "its images are float32"),
    "larger images": (changed(arr_0=np.zeros((4, 5, 1, 1), np.uint8)), r"shape \(5, 1, 1\), not uint8 with shape \(4"),
    "flat images": (changed(arr_0=np.zeros((4, 4), np.uint8)), "its images are uint8"),
    "costs as floats": (changed(nfe=np.zeros(4)), "its nfe is float64"),
    "cut short": (cut_short, "damaged"),
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_shard_that_is_not_the_jobs_is_found_and_left_alone(make, message, tmp_path):
    """When the job goes on, when its images are opened, and when the shard appears after the job was begun."""
    folder, path = tmp_path / "x", tmp_path / "x" / "samples-00001.npz"
    job = begin(folder, seed=0)
    list(job.run(squares))
    make(folder)
    before, wanted = path.read_bytes(), rf"samples-00001\.npz is .*{message}.* Delete it and run the job again\."
    for attempt in (
        lambda: begin(folder, seed=0),
        lambda: ShardedJob.load(folder),
        lambda: open_images(folder),
        job.check,
    ):
        with pytest.raises(ValueError, match=wanted):
            attempt()
    assert path.read_bytes() == before
    path.unlink()
    list(begin(folder, seed=0).run(squares))
    assert job.first(10)[:, 0, 0, 0].tolist() == [k * k for k in range(10)]


def test_a_shard_beyond_the_last_is_found(tmp_path):
    job = begin(tmp_path / "x")
    list(job.run(squares))
    shutil.copy(job.path(2), job.path(3))
    with pytest.raises(
        ValueError, match=r"samples-00003\.npz is not shard 3 of this job: the job has 3 shards, 0 to 2"
    ):
        begin(tmp_path / "x")


def test_the_image_shape_of_the_settings_counts_for_the_first_shard_too(tmp_path):
    job = begin(tmp_path / "x", image_shape=[5, 1, 1])
    list(job.run(squares))
    with pytest.raises(ValueError, match=r"samples-00000\.npz .* not uint8 with shape \(5, 1, 1\)"):
        begin(tmp_path / "x", image_shape=[5, 1, 1])


def test_checking_reads_no_images(tmp_path):
    """Images of random bytes, damaged in their middle: the header is whole, so only who reads them finds out."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 100, 10, 1), dtype=np.uint8)
    job = begin(tmp_path / "x")
    list(job.run(lambda numbers: squares(numbers) | {"arr_0": pixels[numbers.start : numbers.stop]}))
    content = bytearray(job.path(0).read_bytes())
    content[len(content) // 2] ^= 255
    job.path(0).write_bytes(content)
    again = begin(tmp_path / "x")
    with pytest.raises(ValueError, match=r"samples-00000\.npz is damaged"):
        again.read(0, "arr_0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"n": ' + "[" * 100_000, "is not JSON"),
        ("[1]", "must hold a JSON object; it holds a list"),
        ("", "is not JSON"),
        ("\0", "is not JSON"),
        ('{"n": 10}', "shard_size must be an integer of at least 1; got None"),
        ('{"n": -10, "shard_size": 4}', "n must be an integer of at least 1; got -10"),
        ('{"n": 10, "shard_size": 0}', "shard_size must be an integer of at least 1; got 0"),
        ('{"n": "10", "shard_size": 4}', "n must be an integer of at least 1; got '10'"),
        ('{"n": 10.5, "shard_size": 4}', "n must be an integer"),
        ('{"n": true, "shard_size": 4}', "n must be an integer"),
        ('{"n": 1e400, "shard_size": 4}', "n must be an integer"),
        ('{"n": null, "shard_size": null}', "n must be an integer"),
    ],
)
def test_a_damaged_manifest_is_named(text, message, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    for attempt in (ShardedJob.load, open_images):
        with pytest.raises(ValueError, match=rf"manifest\.json .*{message}"):
            attempt(tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json|other settings"):
        begin(tmp_path)


def test_a_manifest_may_promise_more_shards_than_can_be_counted(tmp_path):
    """10^12 shards: the answer does not wait for a list of them."""
    (tmp_path / "manifest.json").write_text('{"n": 1000000000000, "shard_size": 1}')
    with pytest.raises(FileNotFoundError, match="1000000000000 of 1000000000000 shards are missing, the first 0"):
        open_images(tmp_path)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_in_any_order_make_the_same_files(world_size, tmp_path):
    one, many = begin(tmp_path / "one"), begin(tmp_path / "many")
    list(one.run(squares))
    for rank in reversed(range(world_size)):
        list(many.run(squares, rank=rank, world_size=world_size))
    for k in range(one.shards):
        assert one.path(k).read_bytes() == many.path(k).read_bytes()


def draw_with(job, claims, draw=squares):
    """Draws what is pending in this thread; yields the files."""
    return make_here(job.pending, lambda path: job.whole(k := job.number(path), draw(job.indices(k))), claims)


def claim_of(job, k):
    """Where the claim on a shard is: part of the format, as processes of other versions may look at it."""
    return job.folder / f".samples-{k:05d}.npz.claim.tmp"


def files(job):
    return {path.name: path.read_bytes() for path in job.folder.iterdir()}


def test_a_process_begins_with_its_own_shards_and_goes_on_with_the_last_of_others(tmp_path):
    job = begin(tmp_path / "x", n=28)
    assert list(job.run(squares, rank=1, world_size=3)) == [1, 4, 6, 5, 3, 2, 0]


def test_living_processes_draw_every_shard_once(tmp_path):
    """Four threads, of which none knows of the others; each waits a little, so that they meet."""
    one, many, drawn = begin(tmp_path / "one", n=100), begin(tmp_path / "many", n=100), []

    def draw(indices):
        drawn.append(indices[0])
        time.sleep(0.01)
        return squares(indices)

    threads = [threading.Thread(target=lambda r=rank: list(many.run(draw, rank=r, world_size=4))) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    list(one.run(squares))
    assert sorted(drawn) == list(range(0, 100, 4))
    assert files(one) == files(many)


def test_a_claim_that_is_renewed_is_left_alone(tmp_path):
    """The other process ends without it, once it has seen a renewal, however long the claim has been there."""
    job = begin(tmp_path / "x")
    with Claims(every=0.01) as owner:
        assert owner.take(job.path(1))
        made = [job.number(path) for path in draw_with(job, Claims(every=0.01))]
    assert made == [0, 2]
    assert job.pending() == [job.path(1)]
    assert not claim_of(job, 1).exists()


def test_the_claim_of_a_machine_that_is_gone_expires(tmp_path):
    """Its content does not change, whatever the times of the file say."""
    job = begin(tmp_path / "x")
    claim_of(job, 0).write_text("another machine 1 17")
    os.utime(claim_of(job, 0), (2e9, 2e9))
    made = [job.number(path) for path in draw_with(job, Claims(every=0.01, expiry=0.05))]
    assert made == [1, 2, 0]
    assert not claim_of(job, 0).exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/ns/pid"), reason="elsewhere a claim is void by its age alone")
def test_the_claim_of_a_process_that_was_killed_here_is_void_at_once(tmp_path):
    """With the usual times, by which it would last for a minute."""
    job = begin(tmp_path / "x")
    program = f"""
import os
from pathlib import Path
from fastsde.evaluation.claims import Claims
assert Claims().take(Path({str(job.path(0))!r}))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert claim_of(job, 0).exists()
    assert list(job.run(squares)) == [0, 1, 2]


def test_a_claim_that_expires_although_its_owner_lives_costs_a_shard_drawn_twice(tmp_path):
    one, job, drawn = begin(tmp_path / "one"), begin(tmp_path / "x"), []
    list(one.run(squares))

    def overtaken(indices):
        """Draws the first shard for so long that another process finishes the whole job."""
        if not drawn:
            drawn.append(indices[0])
            claim_of(job, 0).write_text("another machine 1 17")  # as this one looks from there
            drawn.extend(job.number(path) for path in draw_with(job, Claims(every=0.01, expiry=0.05)))
        return squares(indices)

    made = [job.number(path) for path in draw_with(job, Claims(every=1000.0), overtaken)]
    assert drawn == [0, 1, 2, 0]
    assert made == [0]
    assert files(one) == files(job)


def test_claims_that_are_left_over_go_when_the_job_is_complete(tmp_path):
    one, job = begin(tmp_path / "one"), begin(tmp_path / "x")
    list(one.run(squares))
    next(stopped := job.run(squares))
    stopped.close()
    claim_of(job, 0).write_text("another machine 1 17")  # killed after it had written the shard
    list(job.run(squares))
    assert files(one) == files(job)


def test_a_failure_gives_the_claim_back(tmp_path):
    job = begin(tmp_path / "x")

    def fail(indices):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(job.run(fail))
    assert list(files(job)) == ["manifest.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"n": 11, "seed": 0}, "n: 10 there, 11 here"),
        ({"size": 5, "seed": 0}, "shard_size: 4 there, 5 here"),
        ({"seed": 0, "solver": "x"}, 'solver: null there, "x" here'),
    ],
)
def test_a_rerun_with_other_settings_is_refused(settings, message, tmp_path):
    begin(tmp_path / "x", seed=0)
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / "x", **settings)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"has no manifest\.json, but thesis\.tex"):
        begin(tmp_path / "x")
    check_settings(tmp_path / "y", "a.json", {})
    (tmp_path / "y" / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check_settings(tmp_path / "y", "a.json", {})


def test_an_interrupted_result_is_no_shard():
    pending = torch.tensor([int(Status.SUCCESS), int(Status.PENDING)])
    zeros = torch.zeros(2, dtype=torch.int64)
    result = SampleResult(torch.zeros(2, 1, 2, 2), zeros, zeros, zeros, pending, zeros, 0, 0.0)
    with pytest.raises(KeyboardInterrupt):
        shard_arrays(result, np.asarray, None)


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ((None, None), {}, (0, 1)),
        ((None, None), {"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ((1, 2), {"RANK": "2", "WORLD_SIZE": "4"}, (1, 2)),
    ],
)
def test_ranks_are_as_given_or_as_the_launcher_says(given, environment, expected):
    assert processes(*given, environment) == expected


def test_an_environment_that_makes_no_sense():
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE in the environment"):
        processes(None, None, {"RANK": "x"})
    with pytest.raises(ValueError, match="--world-size must be at least 1; got 0"):
        processes(0, 0, {})


def test_a_manifest_that_another_process_wrote_in_between_counts(tmp_path, monkeypatch):
    """Both saw no manifest; the second to write compares with the first."""
    is_file = type(tmp_path).is_file

    def first_time(path):
        if path.name == "a.json" and not seen:
            seen.append(1)
            path.write_text('{"seed": 1}')
            return False
        return is_file(path)

    seen = []
    monkeypatch.setattr(type(tmp_path), "is_file", first_time)
    with pytest.raises(ValueError, match="seed: 1 there, 2 here"):
        check_settings(tmp_path, "a.json", {"seed": 2})
    assert sorted(os.listdir(tmp_path)) == ["a.json"]


@pytest.mark.parametrize(
    ("given", "message"), [((2, 2), "must be in 0 .. 1; got 2"), ((0, None), "go together"), ((None, 3), "go together")]
)
def test_impossible_ranks_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes(*given, {})


OPTIONS = ["-n", 20, "--shard-size", 8, "--nfe", 5, "--batch-size", 8]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("network")
def test_sample_in_shards_is_sample_at_once(tmp_path):
    result = run("sample", *OPTIONS, "--out", tmp_path / "job")
    assert result.exit_code == 0, result.output
    assert "20 of 20 samples in 3 shards" in result.output
    once = run("sample", "-n", 20, "--nfe", 5, "--batch-size", 8, "--out", tmp_path / "once")
    assert once.exit_code == 0
    with np.load(tmp_path / "once" / "samples.npz") as whole:
        parts = [np.load(tmp_path / "job" / f"samples-0000{k}.npz") for k in range(3)]
        for name in ("arr_0", "arr_1"):
            assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    totals = json.loads((tmp_path / "job" / "samples.json").read_text())
    record = json.loads((tmp_path / "once" / "samples.json").read_text())
    assert totals["mean_nfe"] == record["mean_nfe"]
    assert totals["status_counts"] == {"SUCCESS": 20}
    assert np.concatenate([part["nfe"] for part in parts]).tolist() == record["nfe"]


@pytest.mark.usefixtures("network")
def test_ranks_of_sample_make_the_files_of_one_process(tmp_path):
    assert run("sample", *OPTIONS, "--out", tmp_path / "one").exit_code == 0
    for rank in (1, 0):
        result = run("sample", *OPTIONS, "--rank", rank, "--world-size", 2, "--out", tmp_path / "two")
        assert result.exit_code == 0, result.output
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "one")
    again = run("sample", *OPTIONS, "--out", tmp_path / "one")
    assert again.exit_code == 0
    assert contents(tmp_path / "one") == before


@pytest.mark.usefixtures("network")
def test_a_stale_folder_and_other_settings_are_refused_before_the_first_call(network, tmp_path):
    assert run("sample", *OPTIONS, "--out", tmp_path / "job").exit_code == 0
    network.fail_after = 0
    for options, message in (
        ([*OPTIONS, "--seed", 1], "seed: 0 there, 1 here"),
        (["-n", 4, "--nfe", 5], "n: 20 there, 4 here"),
    ):
        result = run("sample", *options, "--out", tmp_path / "job")
        assert result.exit_code == 1
        assert message in result.output
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "samples.npz").write_bytes(b"")
    result = run("sample", *OPTIONS, "--out", tmp_path / "other")
    assert "has no manifest.json, but samples.npz" in result.output


@pytest.mark.usefixtures("network")
def test_another_grid_of_as_many_steps_is_another_setting(tmp_path):
    options = ["-n", 4, "--shard-size", 2, "--solver", "DDIM", "--steps", 4, "--out", tmp_path / "job"]
    assert run("sample", *options, "--grid", "karras").exit_code == 0
    result = run("sample", *options, "--grid", "uniform")
    assert result.exit_code == 1
    assert "grid_times" in result.output


@pytest.mark.usefixtures("network")
def test_a_setting_that_cannot_work_claims_no_folder(tmp_path):
    options = ["-n", 6, "--shard-size", 2, "--out", tmp_path / "job"]
    assert "nfe must be at least" in run("sample", *options, "--nfe", 1).output
    assert run("sample", *options, "--nfe", 3).exit_code == 0


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("label", ["cycle", "none"])
def test_a_failure_inside_a_shard_leaves_the_job_as_it_was(network, tmp_path, label):
    """After samples of that shard were finished, one row at a time."""
    options = ["-n", 6, "--shard-size", 3, "--batch-size", 1, "--nfe", 3, "--label", label, "--out", tmp_path / "job"]
    network.fail_after = 14
    result = run("sample", *options)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "the same command goes on" in result.output
    assert sorted(os.listdir(tmp_path / "job")) == ["manifest.json", "samples-00000.npz"]


@pytest.mark.usefixtures("network")
def test_the_picture_takes_from_as_many_shards_as_it_needs(tmp_path):
    assert run("sample", "-n", 6, "--shard-size", 2, "--nfe", 3, "--out", tmp_path / "job").exit_code == 0
    assert run("sample", "-n", 6, "--nfe", 3, "--out", tmp_path / "once").exit_code == 0
    assert (tmp_path / "job" / "grid.png").read_bytes() == (tmp_path / "once" / "grid.png").read_bytes()


@pytest.mark.usefixtures("network")
def test_a_network_that_fails_midway_costs_one_shard(network, tmp_path):
    network.fail_after = 8  # the second shard's
    result = run("sample", *OPTIONS, "--out", tmp_path / "job")
    assert result.exit_code == 1
    assert "out of memory" in result.output
    assert sorted(os.listdir(tmp_path / "job")) == ["manifest.json", "samples-00000.npz"]
    network.fail_after = None
    assert run("sample", *OPTIONS, "--out", tmp_path / "job").exit_code == 0
    assert len(os.listdir(tmp_path / "job")) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", 2], "--workers is for --ray"),
        (["--ray", "--rank", 0, "--world-size", 2], "--ray shares the work itself; it goes without --rank"),
        (["--ray"], '--ray needs Ray: pip install "fastsde[ray]"'),
        (["--ray", "--pipeline", "x"], "--pipeline goes without --ray. Jobs of shards are for --model"),
        (["--out", "s3://bucket/x"], "s3://bucket/x is not a path on this machine"),
    ],
)
def test_options_of_many_machines_are_refused_where_they_mean_nothing(options, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("sample", "-n", 4, "--out", tmp_path / "x", *options)
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())
