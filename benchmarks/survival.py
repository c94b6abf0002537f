r"""Does shared work survive what kills processes, and what does sharing bring? All files must be the same bytes.

`sweep`: with the packaged network, by the command line. One sweep of 6 solvers x 4 budgets runs to its end; the same,
in another folder, is killed with SIGKILL at random moments, again and again, and then runs to its end. Then one job is
drawn by one single-threaded process and by two; the time is that of the whole commands, and of the sampling alone,
which begins when the manifest is there.

`ray`: the network is one that sleeps, so that other work of the machine hardly matters and only sharing is measured.
First, one process and two workers of Ray draw the same job. Second, shards whose costs differ by up to ten are drawn by
four processes with shards of their own alone, by four with claims, and by four workers of Ray, beside the schedule that
gives the longest shard left to the process that is free first. Third, workers are killed with SIGKILL at random, a
machine joins and another leaves (both are processes here).
"""

from __future__ import annotations

import contextlib
import heapq
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import Row, command

from fastsde.evaluation.claims import make_here
from fastsde.evaluation.cluster import RayWorkers
from fastsde.evaluation.jobs import ShardedJob
from fastsde.files import npz_bytes

TABLES = ("results.jsonl", "results.csv", "summary.csv")
SINGLE = os.environ | {"OMP_NUM_THREADS": "1"}

main = click.Group(help=__doc__)


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """Begins `fastsde` with these arguments, on one thread."""
    command = [sys.executable, "-m", "fastsde", *map(str, arguments)]
    return subprocess.Popen(command, env=SINGLE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits for all; raises if one failed."""
    codes = [process.wait() for process in processes]
    if any(codes):
        raise click.ClickException(f"a process failed: {codes}")


def alike(one: Path, two: Path, pattern: str) -> bool:
    """Whether the files of a folder that match are the same bytes in another."""
    return all(path.read_bytes() == (two / path.relative_to(one)).read_bytes() for path in one.rglob(pattern))


def survives(folder: Path, n: int, nfe: str, kills: int) -> Row:
    """The same sweep left alone and killed: when, and whether the files are the same bytes."""
    sweep = ["bench", "--nfe", nfe, "-n", n, "--shard-size", 64, "--bootstrap", 20, "--out"]
    begun = time.perf_counter()
    finish([start(*sweep, folder / "alone")])
    alone = time.perf_counter() - begun
    chance, hits = random.Random(0), list[float]()
    while len(hits) < kills:
        process, wait = start(*sweep, folder / "killed"), chance.uniform(3.0, 3.0 + 1.6 * alone / kills)
        time.sleep(wait)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        hits.append(round(wait, 2))
    finish([start(*sweep, folder / "killed")])
    same = {files: alike(folder / "alone", folder / "killed", files) for files in (*TABLES, "*.npz")}
    return {"kills_after_seconds": hits, "same_bytes": same}


def shared(folder: Path, n: int, pairs: int) -> Row:
    """Throughput of two single-threaded processes over that of one, in turn."""
    job = ["sample", "-n", n, "--shard-size", 64, "--nfe", 10, "--out"]
    whole, inner, same = [], [], True
    for k in range(pairs):
        seconds, sampling = [], []
        for world in (1, 2):
            out, begun = folder / f"{k}-{world}", time.perf_counter()
            processes = [start(*job, out, "--rank", rank, "--world-size", world) for rank in range(world)]
            finish(processes)
            ended = time.time()
            seconds.append(time.perf_counter() - begun)
            sampling.append(ended - (out / "manifest.json").stat().st_mtime)
        same &= alike(folder / f"{k}-1", folder / f"{k}-2", "*.npz")
        whole.append(seconds[0] / seconds[1])
        inner.append(sampling[0] / sampling[1])
    return {"whole_commands": whole, "sampling": inner, "same_bytes": same}


@command("survival", main, samples=130, nfe="5", kills=1, job=130, pairs=1)
def sweep(samples: int = 130, nfe: str = "5,6,8,10", kills: int = 20, job: int = 1024, pairs: int = 3) -> Row:
    """Does a sweep survive SIGKILL, and do two processes do twice the work of one?"""
    with tempfile.TemporaryDirectory() as folder:
        killed, two = survives(Path(folder), samples, nfe, kills), shared(Path(folder), job, pairs)
    return {"killed": killed, "two_processes": two}


def open_sleeper(
    job: ShardedJob, marks: Path, costs: Sequence[float], crew: int
) -> tuple[Callable[[int], bytes], Mapping[str, Any]]:
    """What draws by sleeping; begins when all of the crew are ready, and notes when each shard began and ended."""
    (marks / f"ready-{os.getpid()}").touch()
    while len(list(marks.glob("ready-*"))) < crew:
        time.sleep(0.01)

    def make(k: int) -> bytes:
        (marks / f"begun-{k}-{os.getpid()}").touch()
        begin = time.monotonic()
        time.sleep(costs[k])
        values = np.array([i * i % 251 for i in job.indices(k)])
        content = npz_bytes(job.whole(k, {"arr_0": values.astype(np.uint8)[:, None, None, None], "nfe": values}))
        (marks / f"ended-{k}-{begin}-{time.monotonic()}").touch()
        return content

    return make, {}


def draw_here(rank: int, world: int, share: bool, job: ShardedJob, marks: Path, costs: Sequence[float]) -> None:
    """One of several processes, with or without the pending shards of others."""
    make, _ = open_sleeper(job, marks, costs, world)

    def pending() -> list[Path]:
        return [path for path in job.pending(rank, world) if share or job.number(path) % world == rank]

    for _ in make_here(pending, lambda path: make(job.number(path))):
        pass


def draw_on_ray(workers: RayWorkers, crew: int, job: ShardedJob, marks: Path, costs: Sequence[float]) -> Iterator[int]:
    """The same by workers of a cluster; yields the numbers of shards."""
    open_maker = partial(open_sleeper, job, marks, costs, crew)
    return job.run(dict, make_all=partial(workers.make_all, open_maker=open_maker, record={}))  # type: ignore[arg-type]


def draw_by_processes(world: int, share: bool, job: ShardedJob, marks: Path, costs: Sequence[float]) -> None:
    """So many processes at once."""
    context = multiprocessing.get_context("spawn")
    crew = [context.Process(target=draw_here, args=(k, world, share, job, marks, costs)) for k in range(world)]
    for process in crew:
        process.start()
    for process in crew:
        process.join()


class Bench:
    """Jobs in a folder of their own, of shards with these costs in seconds, and what their marks say."""

    def __init__(self, costs: Sequence[float], size: int) -> None:
        self.costs, self.size = costs, size
        self._kept = tempfile.TemporaryDirectory()  # goes with this object
        self.folder = Path(self._kept.name)

    def run(self, name: str, draw: Callable[..., object]) -> tuple[float, list[float], Counter[str]]:
        """Draws a job: seconds from the first beginning to the last end, those of each shard, and begins of each."""
        marks = self.folder / f"{name}-marks"
        marks.mkdir()
        job = ShardedJob.begin(self.folder / name, len(self.costs) * self.size, self.size, {})
        draw(job=job, marks=marks, costs=self.costs)
        times = [tuple(map(float, path.name.split("-")[2:])) for path in marks.glob("ended-*")]
        begun = Counter(path.name.split("-")[1] for path in marks.glob("begun-*"))
        return max(end for _, end in times) - min(begin for begin, _ in times), [b - a for a, b in times], begun

    def same(self, *names: str) -> bool:
        """Whether all jobs have the same files."""
        files = [{path.name: path.read_bytes() for path in (self.folder / name).iterdir()} for name in names]
        return all(found == files[0] for found in files)


def longest_first(costs: Sequence[float], workers: int) -> float:
    """Time of the schedule that gives the longest shard left to whoever is free first."""
    free = [0.0] * workers
    for cost in sorted(costs, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def equal(shards: int, seconds: float, repeats: int) -> Row:
    """One process and two workers."""
    ratios, whole, same = [], [], True
    for _ in range(repeats):
        bench = Bench([seconds] * shards, 50)
        one, *_ = bench.run("one", partial(draw_here, 0, 1, True))
        with RayWorkers.connected(count=2) as workers:
            start = time.monotonic()
            two, *_ = bench.run("two", lambda **job: list(draw_on_ray(workers, 2, **job)))
            whole.append(one / (time.monotonic() - start))
        ratios.append(one / two)
        same &= bench.same("one", "two")
    return {"shards": shards, "ratio": ratios, "ratio_with_the_start_of_workers": whole, "same_bytes": same}


def skewed(shards: int, seconds: float, workers: int, repeats: int) -> list[Row]:
    """Costs from 1 to 10 in random order: time over that of the schedule."""

    def on_ray(**job: Any) -> None:
        with RayWorkers.connected(count=workers) as crew:
            list(draw_on_ray(crew, workers, **job))

    ways = {
        "own shards alone": partial(draw_by_processes, workers, False),
        "claims": partial(draw_by_processes, workers, True),
        "Ray": on_ray,
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    twice, same = Counter[str](), True
    for seed in range(repeats):
        costs = [seconds * 10 ** (k / (shards - 1)) for k in range(shards)]
        random.Random(seed).shuffle(costs)
        bench = Bench(costs, 4)
        for name, draw in ways.items():
            found, each, begun = bench.run(name, draw)
            ratios[name].append(found / longest_first(each, workers))
            twice[name] += sum(count > 1 for count in begun.values())
        same &= bench.same(*ways)
    return [{"way": name, "ratio": ratios[name], "drawn_twice": twice[name], "same_bytes": same} for name in ways]


def beset(shards: int, seconds: float, kills: int) -> Row:
    """Workers that die, a machine that joins, and one that leaves."""
    import ray
    from ray.cluster_utils import Cluster

    bench, chance = Bench([seconds] * shards, 2000 // shards), random.Random(0)
    bench.run("one", partial(draw_here, 0, 1, True))
    small = {"object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    first = cluster.add_node(num_cpus=2, **small)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    hit: list[str] = []

    def draw(job: ShardedJob, marks: Path, costs: Sequence[float]) -> None:
        when = sorted(chance.sample(range(1, shards - 4), kills))
        killer = threading.Thread(target=lambda: [kill(job, marks, count, hit, chance) for count in when])
        killer.start()
        for count, _ in enumerate(draw_on_ray(RayWorkers(), 1, job, marks, costs)):
            if count == shards // 3:
                cluster.add_node(num_cpus=2, **small)
            if count == 2 * shards // 3:
                cluster.remove_node(first, allow_graceful=False)
        killer.join()

    *_, begun = bench.run("killed", draw)
    ray.shutdown()
    cluster.shutdown()
    return {
        "samples": bench.size * shards,
        "kills": len(hit),
        "shards_begun_again": sum(begun.values()) - shards,
        "machines_joined": 1,
        "machines_left": 1,
        "same_bytes": bench.same("one", "killed"),
    }


def kill(job: ShardedJob, marks: Path, count: int, hit: list[str], chance: random.Random) -> None:
    """Once so many shards are there, kills a worker in the midst of drawing, and adds it to those that were hit."""
    while len(job.there()) < job.shards:
        time.sleep(chance.uniform(0.0, 0.2))
        ended = {path.name.split("-")[1] for path in marks.glob("ended-*")}
        drawing = [path.name.split("-")[1:] for path in marks.glob("begun-*")]
        living = sorted(pid for k, pid in drawing if not (k in ended or pid in hit) and Path("/proc", pid).exists())
        if living and len(job.there()) >= count:
            hit.append(chance.choice(living))
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(hit[-1]), signal.SIGKILL)
            return


@command("ray_jobs", main, shards=6, seconds=0.1, kills=1, repeats=1)
def ray(shards: int = 40, seconds: float = 0.5, kills: int = 10, repeats: int = 3) -> Row:
    """What do claims and Ray bring to a job of shards, and what do they survive?"""
    found: Row = {"equal": equal(shards, seconds, repeats), "skewed": skewed(shards, seconds / 3, 4, repeats)}
    return found | {"killed": beset(shards, seconds, kills)}


if __name__ == "__main__":
    main()
