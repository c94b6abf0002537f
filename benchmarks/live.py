r"""The live queue beside `sample` and beside batches, and a server under good and bad clients. Needs Linux.

`queue` has four parts. `same`: requests at random times with mixed settings, for an exact model, each beside
`fastsde.sample` with the same arguments. `throughput`: as many clients as there are slots, each asking again when it
has its sample; the network sleeps for a time a + b times its rows, so what else the machine does hardly matters.
Beside it are batches of the same clients that end with their slowest sample, at the same cost per turn. `latency`: one
client and the packaged network, beside `sample`, in turn. `memory`: many requests, and the memory of the process.

`server`: `fastsde serve` with the packaged network runs in a process of its own, and eight clients do at random what
`Clients` lists. What were they answered, and what does the server hold? Needs `pip install -e '.[bench,dev]'`.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import httpx
import torch
from common import Row, command, in_turn, timed

import fastsde
from fastsde.score.analytic import MixtureScore

SDE = fastsde.VPSDE()
SETTINGS: list[dict[str, Any]] = [
    *({"nfe": n} for n in range(5, 21)),
    *({"rtol": tolerance} for tolerance in (0.02, 0.05, 0.1, 0.3)),
    {"solver": fastsde.ExponentialPC(eta=1.0), "nfe": 12},
    {"solver": fastsde.ExtrapolatedEM(), "rtol": 0.3},
]
HEAD = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

main = click.Group(help=__doc__)


def mixture() -> fastsde.ScoreModel:
    """An exact model."""
    means = torch.tensor([[-0.7, 0.2], [0.5, -0.4]], dtype=torch.float64)
    return MixtureScore(SDE, torch.tensor([0.4, 0.6]), means, torch.zeros(2, 2, 0), torch.zeros(2, 0), floor=0.01)


def same(requests: int) -> Row:
    """Requests at random times, each beside the same samples alone."""
    chance, model, asked = random.Random(0), mixture(), []
    with fastsde.Sampler(model, max_waiting=10 * requests) as sampler:
        for seed in range(requests):
            how = {"n": chance.randint(1, 4), "seed": seed, **chance.choice(SETTINGS)}
            asked.append((how, sampler.submit(**how)))
            time.sleep(chance.expovariate(1000))
        results = [(how, request.result()) for how, request in asked]
    stats, worst, costs = sampler.stats(), 0.0, True
    for how, live in results:
        alone = fastsde.sample(model, **how)
        worst = max(worst, float((live.samples - alone.samples).abs().max()))
        costs = costs and torch.equal(live.nfe, alone.nfe) and torch.equal(live.status, alone.status)
    rows = stats.rows / stats.needed
    return {"part": "same", "requests": requests, "worst difference": worst, "equal costs": costs, "rows": rows}


def throughput(samples: int, slots: int, most: int, a: float, b: float) -> Row:
    """A closed loop: every client asks for the next sample when it has the last one."""
    chance = random.Random(0)
    calls = [chance.randint(5, most) for _ in range(samples)]

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(a + b * len(x))
        return -x

    model = fastsde.ScoreModel(network, SDE, event_shape=(1,))
    with fastsde.Sampler(model, batch_size=slots, max_waiting=2 * slots) as sampler, ThreadPoolExecutor(slots) as pool:
        start = time.perf_counter()
        latencies = list(pool.map(lambda nfe: timed(lambda: sampler.submit(nfe=nfe).result()), calls))
        seconds = time.perf_counter() - start
    # A batch takes all waiting clients, and ends when its slowest sample does; empty rows cost nothing.
    batches = [sorted(calls[k : k + slots]) for k in range(0, samples, slots)]
    waiting = [max(batch) * (a + b * len(batch)) for batch in batches]
    shrinking = [sum(a + b * sum(n > turn for n in batch) for turn in range(max(batch))) for batch in batches]
    row: Row = {"part": "throughput", "most calls": most, "a": a, "b": b, "samples a second": samples / seconds}
    row |= {"in batches": samples / sum(waiting), "in batches that shrink": samples / sum(shrinking)}
    return row | {"latency": statistics.median(latencies), "latency in batches": statistics.mean(waiting)}


def latency(seconds: float) -> Row:
    """One client beside `sample`."""
    model = fastsde.pretrained("fashion-mnist")
    with fastsde.Sampler(model, nfe=10) as sampler:
        return {"part": "latency"} | in_turn(
            lambda: timed(lambda: sampler.submit(seed=1).result()),
            lambda: timed(lambda: fastsde.sample(model, n=1, seed=1, nfe=10)),
            seconds,
        )


def memory(requests: int) -> Row:
    """Requests without end, and what the process holds after a tenth of them and after all."""
    chance, tenths = random.Random(0), []
    with fastsde.Sampler(mixture(), max_waiting=256) as sampler:
        waiting = []
        for k in range(requests):
            waiting.append(sampler.submit(seed=k, timeout=None, **chance.choice(SETTINGS[:20])))
            if len(waiting) == 200 or k == requests - 1:
                for request in waiting:
                    request.result()
                waiting.clear()
            if (k + 1) % (requests // 10) == 0:
                gc.collect()
                tenths.append((sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), held(os.getpid())[0]))
    found: Row = {"part": "memory", "requests": requests, "tensors after a tenth": tenths[0][0]}
    return found | {"tensors": tenths[-1][0], "MB after a tenth": tenths[0][1], "MB": tenths[-1][1]}


def held(pid: int) -> tuple[float, int]:
    """Resident memory of a process in MB, and its open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, len(os.listdir(f"/proc/{pid}/fd"))


@command("live", main, requests=50, samples=60, seconds=1.0, many=200)
def queue(requests: int = 2000, samples: int = 1000, seconds: float = 60.0, many: int = 10_000) -> list[Row]:
    """Does the queue give what `sample` gives, and what does it bring?"""
    return [
        same(requests),
        # Large networks: one that pays by the call, one by the row, one by both. And one that is small.
        *(throughput(samples, 32, 20, a, b) for a, b in ((0.1, 0.0), (0.0, 0.003), (0.05, 0.0015), (0.02, 0.0))),
        throughput(samples, 32, 50, 0.05, 0.0015),
        latency(seconds),
        memory(many),
    ]


class Clients:
    """What clients do, how often of 20 times, and what they were answered."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: collections.Counter[tuple[str, str]] = collections.Counter()
        self.seconds: list[float] = []
        bad = {
            "no JSON": {"content": b"{{{"},
            "unknown field": {"json": {"mode": 1}},
            "out of range": {"json": {"nfe": 10**9}},
            "no picture": {"json": {"image": "AAAA"}},
            "too long": {"content": b" " * (9 << 20)},
            "too many": {"json": {"n": 100}},
        }
        self.kinds: dict[str, tuple[int, Callable[[random.Random, httpx.Client], str]]] = {
            "draws": (8, self.draws),
            "streams": (2, self.streams),
            "goes away": (3, self.goes_away),
            "half a body": (1, self.half),
            **{name: (1, lambda _, http, body=body: self.posted(http, **body)) for name, body in bad.items()},
        }

    def posted(self, http: httpx.Client, **body: Any) -> str:
        """The status of an answer."""
        headers = {"Content-Type": "application/json"}
        return str(http.post("/v1/images/generations", headers=headers, **body).status_code)

    def draws(self, chance: random.Random, http: httpx.Client) -> str:
        """Asks for a few images and waits."""
        since = time.perf_counter()
        status = self.posted(http, json={"n": chance.randint(1, 4), "nfe": chance.randint(3, 15)})
        if status == "200":
            self.seconds.append(time.perf_counter() - since)
        return status

    def streams(self, _: random.Random, http: httpx.Client) -> str:
        """Reads all events."""
        with http.stream("POST", "/v1/samples", json={"n": 2, "nfe": 8}) as answer:
            events = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
        return f"{answer.status_code} {events[-1] if events else ''}"

    def goes_away(self, chance: random.Random, http: httpx.Client) -> str:
        """Reads a few events of a long request, and closes the connection."""
        with http.stream("POST", "/v1/samples", json={"n": 4, "nfe": 200}) as answer:
            for _ in zip(range(chance.randint(1, 6)), answer.iter_lines(), strict=False):
                pass
        return str(answer.status_code)

    def half(self, chance: random.Random, _: httpx.Client) -> str:
        """Promises a body and sends a part of it."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"{HEAD}Content-Length: 500\r\n\r\n{{".encode())
            time.sleep(chance.random() / 5)
        return "gone"

    def run(self, seed: int, end: float) -> None:
        """One client until the time is over."""
        chance = random.Random(seed)
        names, weights = list(self.kinds), [weight for weight, _ in self.kinds.values()]
        while time.monotonic() < end:
            name = chance.choices(names, weights)[0]
            with httpx.Client(base_url=f"http://localhost:{self.port}", timeout=120) as http:
                try:
                    answer = self.kinds[name][1](chance, http)
                except httpx.HTTPError as error:
                    answer = type(error).__name__
            self.answers[name, answer] += 1
            time.sleep(chance.random() / 10)


@contextlib.contextmanager
def serving(port: int) -> Any:
    """`fastsde serve` in a process of its own, when it answers, and a client."""
    words = [sys.executable, "-m", "fastsde", "serve", "fashion-mnist", "--port", str(port), "--max-waiting", "24"]
    server = subprocess.Popen(words)
    try:
        with httpx.Client(base_url=f"http://localhost:{port}", timeout=60) as http:
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/healthz").status_code == 200:
                        break
                time.sleep(0.1)
            yield server, http
    finally:
        server.terminate()
        server.wait(30)


@command("soak", main, minutes=0.1)
def server(minutes: float = 10.0) -> list[Row]:
    """Does a server last under good and bad clients?"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with serving(port) as (process, http):
        clients, end, tenths = Clients(port), time.monotonic() + 60 * minutes, []
        with ThreadPoolExecutor(8) as pool:
            runs = [pool.submit(clients.run, seed, end) for seed in range(8)]
            for _ in range(9):
                time.sleep(6 * minutes)
                tenths.append(held(process.pid))
        for run in runs:
            run.result()  # raises what a client did not expect
        time.sleep(2)
        tenths.append(held(process.pid))
        about = http.get("/v1/about").json()
    rows: list[Row] = [
        {"client": name, "answer": answer, "times": times} for (name, answer), times in sorted(clients.answers.items())
    ]
    times = sorted(clients.seconds)
    rows.append({"client": "all", "answer": "median seconds of images", "times": times[len(times) // 2]})
    for tenth in (1, 2, 4, 6, 8, 10):
        for what, value in zip(("MB", "open files"), tenths[tenth - 1], strict=True):
            rows.append({"client": "server", "answer": f"{what} after {tenth} tenths", "times": value})
    return [*rows, {"client": "server", "answer": "samples left", "times": about["running"] + about["waiting"]}]


if __name__ == "__main__":
    main()
