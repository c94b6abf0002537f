"""Jobs on a Ray cluster: the files of one process, whatever dies, joins or leaves."""

import os
from functools import partial
from pathlib import Path

import pytest
from test_cli import run
from tiny_ray import open_squares, squares

from fastsde.evaluation.cluster import RayWorkers
from fastsde.evaluation.jobs import ShardedJob
from fastsde.result import SamplingError

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head that works nothing, and a machine with two cores, which both are processes here."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # workers import tiny_ray
        small = {"object_store_memory": 80 << 20, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        found.node = found.add_node(num_cpus=2, object_store_memory=80 << 20)
        ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
        yield found
        ray.shutdown()
        found.shutdown()


def begin(folder, n=40, size=4):
    return ShardedJob.begin(folder, n, size, {})


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(job, **options):
    make_all = partial(
        RayWorkers().make_all, open_maker=partial(open_squares, job, **options), record={"maker": "squares"}
    )
    return job.run(squares, make_all=make_all)


@pytest.mark.parametrize("command", ["sample", "bench"])
def test_the_files_are_those_of_one_process(command, cluster, tmp_path):
    options = {
        "sample": ["-n", 20, "--shard-size", 8, "--rtol", 0.5],
        "bench": ["-n", 130, "--shard-size", 65, "--solvers", "DDIM", "--nfe", 4, "--bootstrap", 2],
    }[command]
    for more in (["--out", tmp_path / "one"], ["--ray", "--workers", 2, "--out", tmp_path / "two"]):
        result = run(command, *options, *more)
        assert result.exit_code == 0, result.output
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_shards_of_workers_that_die_are_drawn_by_others(cluster, tmp_path):
    one, job, marks = begin(tmp_path / "one"), begin(tmp_path / "x"), tmp_path / "marks"
    list(one.run(squares))
    assert sorted(drawn(job, marks=marks, deadly={1, 7})) == list(range(10))
    assert files(one.folder) == files(job.folder)
    begun = sorted(int(mark.name.partition("-")[0]) for mark in marks.iterdir())
    assert begun == [0, 1, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]


def test_machines_leave_and_join(cluster, tmp_path):
    """The only one with cores goes while it draws, then another comes."""
    one, job = begin(tmp_path / "one"), begin(tmp_path / "x")
    list(one.run(squares))
    made = drawn(job, seconds=0.2)
    found = [next(made)]
    cluster.remove_node(cluster.node, allow_graceful=False)
    cluster.node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    assert sorted(found + list(made)) == list(range(10))
    assert files(one.folder) == files(job.folder)


def test_a_worker_with_another_model_is_refused(cluster, tmp_path):
    job = begin(tmp_path / "x")
    make_all = partial(RayWorkers().make_all, open_maker=partial(open_squares, job), record={"maker": "cubes"})
    with pytest.raises(ValueError, match='maker: "squares" there, "cubes" here'):
        list(job.run(squares, make_all=make_all))
    assert list(files(job.folder)) == ["manifest.json"]


def test_a_shard_that_kills_every_worker_ends_the_job(cluster, tmp_path):
    job, marks = begin(tmp_path / "x"), tmp_path / "marks"
    with pytest.raises(RuntimeError, match=r"5 workers died while making samples-00003\.npz"):
        list(drawn(job, marks=marks, deadly={3}, always=True))
    assert len(list(marks.glob("3-*"))) == 5


def test_an_error_of_a_worker_is_told_and_the_job_goes_on_without_ray(cluster, tmp_path):
    one, job = begin(tmp_path / "one"), begin(tmp_path / "x")
    list(one.run(squares))
    with pytest.raises(SamplingError, match="out of memory"):
        list(drawn(job, fails_at=6))
    assert job.path(6) in job.pending()
    assert not list(job.folder.glob(".*"))
    list(job.run(squares))
    assert files(one.folder) == files(job.folder)
