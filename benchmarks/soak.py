r"""A server under good and bad clients for some minutes: what they were answered, and what the server holds.

`fastsde serve` with the packaged network runs in a process of its own. Eight clients do, at random: draw images; stream
samples to the end, or go away in the midst; send half of a body and go; send what is no JSON, unknown fields, numbers
out of range, pictures that are none, bodies that are too long; ask for more than fits into the queue. Memory and open
files of the server are read on the way. Needs Linux, and `pip install -e '.[bench,dev]'`.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import httpx
from common import Row, command, table

_HEAD = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Clients:
    """What clients do, and what they were answered."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://localhost:{port}"
        self.answers: collections.Counter[tuple[str, str]] = collections.Counter()
        self.seconds: list[float] = []
        self.kinds: dict[str, tuple[int, Callable[[random.Random, httpx.Client], str]]] = {
            "draws": (8, self.draws),
            "streams": (2, self.streams),
            "goes away": (3, self.goes_away),
            "half a body": (1, self.half),
            "no JSON": (1, lambda chance, http: self.posted(http, content=b"{{{")),
            "unknown field": (1, lambda chance, http: self.posted(http, json={"mode": 1})),
            "out of range": (1, lambda chance, http: self.posted(http, json={"nfe": 10**9})),
            "no picture": (1, lambda chance, http: self.posted(http, json={"image": "AAAA"})),
            "too long": (1, lambda chance, http: self.posted(http, content=b" " * (9 << 20))),
            "too many": (1, lambda chance, http: self.posted(http, json={"n": 100})),
        }

    def posted(self, http: httpx.Client, **body: object) -> str:
        """The status of an answer."""
        headers = {"Content-Type": "application/json"}
        return str(http.post("/v1/images/generations", headers=headers, **body).status_code)  # type: ignore[arg-type]

    def draws(self, chance: random.Random, http: httpx.Client) -> str:
        """Asks for a few images and waits."""
        since = time.perf_counter()
        status = self.posted(http, json={"n": chance.randint(1, 4), "nfe": chance.randint(3, 15)})
        if status == "200":
            self.seconds.append(time.perf_counter() - since)
        return status

    def streams(self, chance: random.Random, http: httpx.Client) -> str:
        """Reads all events."""
        with http.stream("POST", "/v1/samples", json={"n": 2, "nfe": 8}) as answer:
            last = ""
            for line in answer.iter_lines():
                last = line.removeprefix("event: ") if line.startswith("event: ") else last
        return f"{answer.status_code} {last}"

    def goes_away(self, chance: random.Random, http: httpx.Client) -> str:
        """Reads a few events of a long request, and closes the connection."""
        with http.stream("POST", "/v1/samples", json={"n": 4, "nfe": 200}) as answer:
            lines = answer.iter_lines()
            for _ in range(chance.randint(1, 6)):
                next(lines, None)
        return str(answer.status_code)

    def half(self, chance: random.Random, http: httpx.Client) -> str:
        """Promises a body and sends a part of it."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"{_HEAD}Content-Length: 500\r\n\r\n{{".encode())
            time.sleep(chance.random() / 5)
        return "gone"

    def run(self, seed: int, end: float) -> None:
        """One client until the time is over."""
        chance = random.Random(seed)
        names, weights = list(self.kinds), [weight for weight, _ in self.kinds.values()]
        while time.monotonic() < end:
            name = chance.choices(names, weights)[0]
            with httpx.Client(base_url=self.url, timeout=120) as http:
                try:
                    answer = self.kinds[name][1](chance, http)
                except httpx.HTTPError as error:
                    answer = type(error).__name__
            self.answers[name, answer] += 1
            time.sleep(chance.random() / 10)


def held(pid: int) -> tuple[float, int]:
    """Resident memory of a process in MB, and its open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))


def free_port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@command(__doc__, "soak", minutes=0.1)
@click.option("--minutes", default=10.0, help="How long.")
def main(minutes: float) -> list[Row]:
    """Prints the table."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "fastsde", "serve", "fashion-mnist", "--port", str(port), "--max-waiting", "24"]
    )
    try:
        with httpx.Client(base_url=f"http://localhost:{port}", timeout=60) as http:
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/healthz").status_code == 200:
                        break
                time.sleep(0.1)
            clients, end = Clients(port), time.monotonic() + 60 * minutes
            threads = [threading.Thread(target=clients.run, args=(seed, end)) for seed in range(8)]
            for thread in threads:
                thread.start()
            tenths = []
            for _ in range(9):
                time.sleep(6 * minutes)
                tenths.append(held(server.pid))
            for thread in threads:
                thread.join()
            time.sleep(2)
            tenths.append(held(server.pid))
            about = http.get("/v1/about").json()
    finally:
        server.terminate()
        server.wait(30)
    rows: list[Row] = [
        {"client": name, "answer": answer, "times": times} for (name, answer), times in sorted(clients.answers.items())
    ]
    times = sorted(clients.seconds)
    rows.append({"client": "all", "answer": "median seconds of images", "times": times[len(times) // 2]})
    for tenth in (1, 2, 4, 6, 8, 10):
        memory, files = tenths[tenth - 1]
        rows.append({"client": "server", "answer": f"MB after {tenth} tenths", "times": memory})
        rows.append({"client": "server", "answer": f"open files after {tenth} tenths", "times": files})
    rows.append({"client": "server", "answer": "samples left", "times": about["running"] + about["waiting"]})
    table(rows)
    return rows


if __name__ == "__main__":
    main()
