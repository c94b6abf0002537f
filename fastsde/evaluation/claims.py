"""Claims: which process makes which file of a folder that several share, told by small files beside it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastsde.files import Content, write_whole

EVERY, EXPIRY = 5.0, 60.0
"""Seconds between two renewals of a claim, and seconds without one after which it is void."""


def _processes_seen() -> str:
    """A name for the set of processes that this one can see: one start of one machine, outside or inside a container.

    Empty where the system does not say, so that no claim is ever void but by its age.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Claims:
    """Claims of this process on files that it makes, in folders where other processes make others.

    A claim on `x.npz` is the file `.x.npz.claim.tmp`, which only one process can create. Its owner writes another
    number into it every few seconds, and removes it when `x.npz` is there. A claim is void once its content was seen
    unchanged for `expiry` seconds, by the clock of the process that looks: times of two machines are never compared.
    Where /proc says that its owner has ended, it is void at once.

    A claim saves work and protects nothing. What two processes claim is made twice, and written whole twice.

        with Claims() as claims:
            for path in claims.turns(pending):
                ...

    Args:
        every: seconds between renewals of the claims that are held.
        expiry: seconds after which a claim that nobody renewed is void; several times `every`.
    """

    def __init__(self, every: float = EVERY, expiry: float = EXPIRY) -> None:
        self.every, self.expiry = every, expiry
        self._owner = f"{_processes_seen()} {os.getpid()}"
        self._held: dict[Path, Path] = {}
        # What claims of other processes hold, since when it was the same, and whether that was ever renewed.
        self._seen: dict[Path, tuple[str, float, bool]] = {}
        self._ended, self._renewals = threading.Event(), threading.Thread(target=self._renew, daemon=True)

    def take(self, path: Path) -> bool:
        """Claims a file, unless it is there, or this process or another one has claimed it."""
        if path in self._held or path.exists():
            return False
        claim = path.with_name(f".{path.name}.claim.tmp")
        if not (self._create(claim) or (self._void(claim) and self._create(claim))):
            return False
        self._seen.pop(claim, None)
        self._held[path] = claim
        if path.exists():  # its owner wrote it in between, and gave its claim back
            self.release(path)
            return False
        return True

    def release(self, path: Path) -> None:
        """Gives a claim back."""
        self._held.pop(path).unlink(missing_ok=True)

    def turns(self, pending: Callable[[], Iterable[Path]]) -> Iterator[Path | None]:
        """Files to make, each claimed until `release`; None where there is nothing to take now, so that one waits.

        Ends when all are there, or processes that renew their claims make all that is left.

        Args:
            pending: the files that are not there, in the order in which this process wants them; read anew when all of
                it was tried.
        """
        while True:
            left, taken = [], False
            for path in pending():
                if self.take(path):
                    taken = True
                    yield path
                else:
                    left.append(path)
            if not taken:
                if all(self._lives(path) for path in left):
                    return
                yield None

    def _create(self, claim: Path) -> bool:
        try:
            with claim.open("x") as file:
                file.write(f"{self._owner} 0")
        except FileExistsError:
            return False
        return True

    def _void(self, claim: Path) -> bool:
        """Whether a claim of another process is void; then it is gone."""
        try:
            content = claim.read_text()
        except FileNotFoundError:
            return True
        before, since, renewed = self._seen.get(claim, (content, time.monotonic(), False))
        if content != before:
            since, renewed = time.monotonic(), True
        self._seen[claim] = content, since, renewed
        machine, _, rest = content.partition(" ")
        here = bool(machine) and machine == self._owner.partition(" ")[0]
        ended = here and not Path("/proc", rest.partition(" ")[0]).exists()
        if not ended and time.monotonic() - since < self.expiry:
            return False
        claim.unlink(missing_ok=True)
        del self._seen[claim]
        return True

    def _lives(self, path: Path) -> bool:
        """Whether a file is there, or its claim was renewed while this process looked."""
        _, _, renewed = self._seen.get(path.with_name(f".{path.name}.claim.tmp"), ("", 0.0, False))
        return path.exists() or (path not in self._held and renewed)

    def _renew(self) -> None:
        count = 0
        while not self._ended.wait(self.every):
            count += 1
            for claim in tuple(self._held.values()):
                # The file system may fail for a while, or the claim be lost: that costs a file made twice.
                with contextlib.suppress(OSError), claim.open("r+") as file:
                    file.write(f"{self._owner} {count}")
                    file.truncate()

    def __enter__(self) -> Claims:
        self._renewals.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for path in tuple(self._held):
            self.release(path)


def make_here(
    pending: Callable[[], Iterable[Path]], make: Callable[[Path], Content], claims: Claims | None = None
) -> Iterator[Path]:
    """Makes files in this process; yields each once it is on the disk.

    Args:
        pending: as in `Claims.turns`.
        make: the content of a file.
        claims: other times of expiry.
    """
    with claims or Claims() as held:
        for path in held.turns(pending):
            if path is None:
                time.sleep(held.every / 5)
                continue
            write_whole(path, make(path))
            held.release(path)
            yield path
