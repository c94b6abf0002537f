r"""Does a sweep survive SIGKILL, and do two processes do twice the work of one? With the packaged network.

First, one sweep of 6 solvers x 4 budgets runs to its end; the same sweep, in another folder, is killed with SIGKILL at
random moments, again and again; then a shard of another cell is copied in, which the next run must name and leave as it
is; deleted, the sweep runs to its end. The tables must be the same bytes. Second, one sampling job
is drawn by one single-threaded process and by two, with --rank and --world-size. The files must be the same bytes; the
time is that of the whole commands and of the sampling alone, which begins when the manifest is there.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from common import Row, command, table

TABLES = ("results.jsonl", "results.csv", "summary.csv")
SINGLE = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """Begins `fastsde` with these arguments, on one thread."""
    command = [sys.executable, "-m", "fastsde", *map(str, arguments)]
    return subprocess.Popen(command, env=SINGLE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits for all; raises if one failed."""
    codes = [process.wait() for process in processes]
    if any(codes):
        raise click.ClickException(f"a process failed: {codes}")


def survives(folder: Path, n: int, nfe: str, kills: int) -> dict[str, object]:
    """The same sweep left alone and killed: whether a foreign shard is found, and the tables are the same bytes."""
    sweep = ["bench", "--nfe", nfe, "-n", n, "--shard-size", 64, "--bootstrap", 20, "--out"]
    begun = time.perf_counter()
    finish([start(*sweep, folder / "alone")])
    alone = time.perf_counter() - begun
    chance, hits = random.Random(0), []
    while len(hits) < kills:
        process, wait = start(*sweep, folder / "killed"), chance.uniform(3.0, 3.0 + 1.6 * alone / kills)
        time.sleep(wait)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        hits.append(round(wait, 2))
    found = finds_a_foreign_shard(folder, sweep)
    finish([start(*sweep, folder / "killed")])
    same = {name: (folder / "alone" / name).read_bytes() == (folder / "killed" / name).read_bytes() for name in TABLES}
    shards = sorted(path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*.npz"))
    same["shards"] = all((folder / "alone" / p).read_bytes() == (folder / "killed" / p).read_bytes() for p in shards)
    left = [str(path) for path in (folder / "killed").rglob("*.tmp*")]
    return {
        "seconds_alone": alone,
        "kills_after_seconds": hits,
        "foreign_shard_found": found,
        "same_bytes": same,
        "left_over": left,
    }


def finds_a_foreign_shard(folder: Path, sweep: Sequence[object]) -> bool:
    """Copies a shard of the first cell to the place of one of the last; whether the sweep names it and keeps it."""
    first, *_, last = sorted(path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*.npz"))
    place = folder / "killed" / last.parent / first.name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "alone" / first, place)
    command = [sys.executable, "-m", "fastsde", *map(str, sweep), str(folder / "killed")]
    done = subprocess.run(command, env=SINGLE, capture_output=True, text=True, check=False)
    kept = place.read_bytes() == (folder / "alone" / first).read_bytes()
    place.unlink()
    return done.returncode == 1 and str(place) in done.stderr and kept


def shared(folder: Path, n: int, pairs: int) -> dict[str, object]:
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
        names = [path.name for path in (folder / f"{k}-1").glob("*.npz")]
        one, two = folder / f"{k}-1", folder / f"{k}-2"
        same &= all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
        whole.append(seconds[0] / seconds[1])
        inner.append(sampling[0] / sampling[1])
    return {"whole_commands": whole, "sampling": inner, "same_bytes": same}


@command(__doc__, "survival", samples=130, nfe="5", kills=1, job=130, pairs=1)
@click.option("--samples", "-n", default=192, help="Samples of each cell of the sweep.")
@click.option("--nfe", default="5,6,8,10", help="Budgets of the sweep.")
@click.option("--kills", default=20)
@click.option("--job", default=2048, help="Samples of the job that is shared.")
@click.option("--pairs", default=3, help="Repetitions of one process and two.")
def main(samples: int, nfe: str, kills: int, job: int, pairs: int) -> Row:
    """Prints what was found."""
    with tempfile.TemporaryDirectory() as folder:
        killed, two = survives(Path(folder), samples, nfe, kills), shared(Path(folder), job, pairs)
    table([{"what": key, "found": value} for key, value in (killed | two).items()])
    return {"killed": killed, "two_processes": two}


if __name__ == "__main__":
    main()
