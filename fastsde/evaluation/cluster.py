"""Workers of a Ray cluster that make the files of jobs; this process gives out shards and writes what comes back."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastsde.checks import check_count
from fastsde.evaluation.claims import Claims
from fastsde.files import as_json, differences, write_whole

LOCAL = "local"
"""The address that stands for a cluster of this machine alone, which ends with the command."""
_TRIES = 5
"""Workers that may die over one file; a shard that needs more memory than there is would kill all."""
_EVERY = 1.0
"""Seconds between two looks at how large the cluster is."""

Make = Callable[..., bytes]
"""In a worker: the bytes of a file, from what `request` says of it, and the contents of the files that it needs."""
OpenMaker = Callable[[], tuple[Make, Mapping[str, Any]]]
"""Runs in a worker, once: what makes files, and a record, which must be that of all workers."""


class _Worker:
    """One process of the cluster, with a model of its own."""

    def __init__(self, open_maker: OpenMaker, folder: str) -> None:
        self._open = open_maker
        with contextlib.suppress(OSError):  # where machines have the same folders, relative paths mean the same
            os.chdir(folder)

    def ready(self) -> dict[str, Any]:
        """Opens the model; what may not differ from this machine's."""
        self._make, record = self._open()
        return dict(record)

    def make(self, what: Any, contents: list[Any]) -> bytes:
        """The bytes of a file; contents of files that it is made from are fetched one at a time."""
        import ray

        return self._make(what, *([map(ray.get, contents)] if contents else []))


class _Crew:
    """The workers that there are now: which are idle, and what the others are busy with."""

    def __init__(self, ray: Any, open_maker: OpenMaker, record: Mapping[str, Any], needs: Mapping[str, int]) -> None:
        self._ray = ray  # which is imported late
        self._start = ray.remote(_Worker).options(**needs).remote
        self._open, self._record = open_maker, as_json(record)
        self.idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Path | None]] = {}  # by what they will give; None where the model is opened
        self._deaths: collections.Counter[Path | None] = collections.Counter()

    def grow(self, room: int) -> None:
        """Starts workers until there are as many as there is room for; those that died are replaced so, too."""
        while len(self.idle) + len(self._busy) < room:
            worker: Any = self._start(self._open, os.getcwd())
            self._busy[worker.ready.remote()] = worker, None

    def give(self, path: Path, what: Any, files: Iterable[Path]) -> None:
        """Has an idle worker make a file."""
        worker = self.idle.pop()
        self._busy[worker.make.remote(what, [self._ray.put(file.read_bytes()) for file in files])] = worker, path

    def collect(self, seconds: float) -> Iterator[tuple[Path, bytes | None]]:
        """Files that were made, within so many seconds; without content if the worker died."""
        if not self._busy:
            time.sleep(seconds)
            return
        for ref in self._ray.wait(list(self._busy), timeout=seconds)[0]:
            worker, path = self._busy.pop(ref)
            try:
                found = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except self._ray.exceptions.RayError as error:  # its process or its machine is gone
                self._lost(worker, path, error)
                if path is not None:
                    yield path, None
                continue
            self._deaths[path] = 0
            if path is None and (other := differences(as_json(found), self._record)):
                raise ValueError(f"a worker has another model or other versions than this process ({other}).")
            self.idle.append(worker)
            if path is not None:
                yield path, found

    def _lost(self, worker: Any, path: Path | None, error: Exception) -> None:
        self._ray.kill(worker)
        self._deaths[path] += 1
        if self._deaths[path] == _TRIES:
            where = "opening the model" if path is None else f"making {path.name}"
            raise RuntimeError(f"{_TRIES} workers died while {where}: {error}") from error

    def close(self) -> None:
        """Ends all workers."""
        for worker in (*self.idle, *(worker for worker, _ in self._busy.values())):
            self._ray.kill(worker)


class RayWorkers:
    """Workers of a cluster: one for each GPU, or where it has none one for each CPU.

    Machines may join and leave while they work. What a worker that died was making is given to another one. Contents
    come back over the network and are written here, so no disk is shared. At most one content for each worker waits in
    memory.

    Args:
        count: of workers; by default as many as the cluster has room for. Those that it has no room for wait, and a
            cluster that grows on demand grows for them.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = None if count is None else check_count("workers", count, 1)
        self.device = "cuda" if self._resources().get("GPU", 0) >= 1 else "cpu"

    @classmethod
    @contextlib.contextmanager
    def connected(cls, address: str = LOCAL, count: int | None = None) -> Iterator[RayWorkers]:
        """The workers of a cluster; `with` disconnects at the end, or ends the cluster that it started.

        Args:
            address: host:port of the cluster, "auto" on one of its machines; "local" starts one on this machine.
            count: as of the class.

        Raises:
            ImportError: if Ray is not installed.
            ConnectionError: if there is no cluster.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells its makers of each cluster otherwise
        try:
            import ray
        except ImportError as error:
            raise ImportError('--ray needs Ray: pip install "fastsde[ray]".') from error
        if ray.is_initialized():  # a program that has a cluster already keeps it
            yield cls(count)
            return
        options: dict[str, Any] = {"include_dashboard": False, "num_cpus": count} if address == LOCAL else {}
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError) as error:
            place = f'host:port, "auto" or nothing; got {address!r}'
            raise ConnectionError(f"--ray must name a cluster that runs, by {place} ({error}).") from error
        with contextlib.suppress(ValueError):  # of threads that are not the main one, which have no handlers
            signal.signal(signal.SIGTERM, before)  # Ray's own would end this process without a word
        try:
            yield cls(count)
        finally:
            ray.shutdown()

    def _resources(self) -> Mapping[str, float]:
        import ray

        found: Mapping[str, float] = ray.cluster_resources()
        return found

    def make_all(
        self,
        pending: Callable[[], Iterable[Path]],
        request: Callable[[Path], tuple[Any, Iterable[Path]]],
        open_maker: OpenMaker,
        record: Mapping[str, Any],
    ) -> Iterator[Path]:
        """Makes files in the workers; yields each once it is on the disk of this machine.

        Args:
            pending: as in `Claims.turns`.
            request: of a file, what the worker is told, and the files whose contents it needs.
            open_maker: opens the model of a worker.
            record: what its record must be.

        Raises:
            ValueError: if a worker's record differs.
            RuntimeError: if five workers died over one file.
            Exception: what making a file raised.
        """
        import ray

        needs: dict[str, int] = {"num_cpus": 1, "num_gpus": 1} if self.device == "cuda" else {"num_cpus": 1}
        most = max(1, sum(1 for _ in pending()))
        crew = _Crew(ray, open_maker, record, needs)
        try:
            with Claims() as held:
                turns: Iterator[Path | None] = held.turns(pending)
                again: list[Path] = []
                look = 0.0
                while True:
                    if time.monotonic() >= look:
                        crew.grow(min(self._room(), most))
                        look = time.monotonic() + _EVERY
                    while crew.idle:
                        try:
                            path = again.pop() if again else next(turns)
                        except StopIteration:
                            return
                        if path is None:
                            break
                        crew.give(path, *request(path))
                    for made, content in crew.collect(_EVERY):
                        if content is None:
                            again.append(made)
                            continue
                        write_whole(made, content)
                        held.release(made)
                        yield made
        finally:
            crew.close()

    def _room(self) -> int:
        """How many workers there should be now."""
        if self.count is not None:
            return self.count
        return int(self._resources().get("GPU" if self.device == "cuda" else "CPU", 0))
