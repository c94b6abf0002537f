r"""The live queue beside batches that wait for their slowest sample, beside `sample` alone, and over many requests.

Four parts. `same`: requests at random times with mixed settings, for an exact model, each beside `fastsde.sample` with
the same arguments. `throughput`: as many clients as there are slots, each asking again when it has its sample, of 5 to
20 or 5 to 50 calls. The network sleeps for a time a + b times its rows, so what else the machine does hardly matters.
Beside it are batches of the same number of clients that end with their slowest sample, at the same cost per turn.
`latency`: one client and the packaged network, beside `sample`, in turn. `memory`: many requests, and the memory of the
process.
"""

from __future__ import annotations

import gc
import random
import resource
import statistics
import threading
import time
from typing import Any

import click
import torch
from common import Row, command, in_turn, table

import fastsde
from fastsde.score.analytic import MixtureScore

SDE = fastsde.VPSDE()
SETTINGS: list[dict[str, Any]] = [
    *({"nfe": n} for n in range(5, 21)),
    *({"rtol": tolerance} for tolerance in (0.02, 0.05, 0.1, 0.3)),
    {"solver": fastsde.ExponentialPC(eta=1.0), "nfe": 12},
    {"solver": fastsde.ExtrapolatedEM(), "rtol": 0.3},
]


def mixture() -> fastsde.ScoreModel:
    """An exact model."""
    means = torch.tensor([[-0.7, 0.2], [0.5, -0.4]], dtype=torch.float64)
    return MixtureScore(SDE, torch.tensor([0.4, 0.6]), means, torch.zeros(2, 2, 0), torch.zeros(2, 0), floor=0.01)


def same(requests: int) -> Row:
    """Requests at random times, each beside the same samples alone."""
    chance, model, asked = random.Random(0), mixture(), []
    with fastsde.Sampler(model, max_waiting=10 * requests) as sampler:
        for seed in range(requests):
            how, n = chance.choice(SETTINGS), chance.randint(1, 4)
            asked.append((how, n, seed, sampler.submit(n=n, seed=seed, **how)))
            time.sleep(chance.expovariate(1000))
        results = [(how, n, seed, request.result()) for how, n, seed, request in asked]
    stats, worst, costs = sampler.stats(), 0.0, True
    for how, n, seed, live in results:
        alone = fastsde.sample(model, n=n, seed=seed, **how)
        worst = max(worst, float((live.samples - alone.samples).abs().max()))
        costs = costs and torch.equal(live.nfe, alone.nfe) and torch.equal(live.status, alone.status)
    rows = stats.rows / stats.needed
    return {"part": "same", "requests": requests, "worst difference": worst, "equal costs": costs, "rows": rows}


class Sleeper:
    """A zero network whose call takes a + b times its rows, in seconds."""

    def __init__(self, a: float, b: float) -> None:
        self.a, self.b = a, b

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(self.a + self.b * len(x))
        return -x


def throughput(samples: int, slots: int, most: int, a: float, b: float) -> Row:
    """A closed loop: every client asks for the next sample when it has the last one."""
    chance = random.Random(0)
    calls = [chance.randint(5, most) for _ in range(samples)]
    left, latencies, lock = list(calls), [], threading.Lock()
    model = fastsde.ScoreModel(Sleeper(a, b), SDE, event_shape=(1,))
    with fastsde.Sampler(model, batch_size=slots, max_waiting=2 * slots) as sampler:

        def client() -> None:
            while True:
                with lock:
                    if not left:
                        return
                    nfe = left.pop()
                since = time.perf_counter()
                sampler.submit(nfe=nfe).result()
                latencies.append(time.perf_counter() - since)

        start = time.perf_counter()
        clients = [threading.Thread(target=client) for _ in range(slots)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        seconds = time.perf_counter() - start
    # A batch takes all waiting clients, and ends when its slowest sample does; empty rows cost nothing.
    batches = [sorted(calls[k : k + slots]) for k in range(0, samples, slots)]
    waiting = [max(batch) * (a + b * len(batch)) for batch in batches]
    shrinking = [sum(a + b * sum(n > turn for n in batch) for turn in range(max(batch))) for batch in batches]
    stats = sampler.stats()
    return {
        "part": "throughput",
        "slots": slots,
        "most calls": most,
        "a": a,
        "b": b,
        "samples a second": samples / seconds,
        "in batches": samples / sum(waiting),
        "in batches that shrink": samples / sum(shrinking),
        "latency": statistics.median(latencies),
        "latency in batches": statistics.mean(waiting),
        "rows": stats.rows / stats.needed,
    }


def latency(seconds: float) -> Row:
    """One client beside `sample`."""
    model = fastsde.pretrained("fashion-mnist")
    with fastsde.Sampler(model, nfe=10) as sampler:

        def live() -> float:
            since = time.perf_counter()
            sampler.submit(seed=1).result()
            return time.perf_counter() - since

        def alone() -> float:
            since = time.perf_counter()
            fastsde.sample(model, n=1, seed=1, nfe=10)
            return time.perf_counter() - since

        return {"part": "latency", **in_turn(live, alone, seconds)}


def memory(requests: int) -> Row:
    """Requests without end, and what the process holds after a tenth of them and after all."""
    chance, held = random.Random(0), []
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
                held.append((sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), resident()))
    return {
        "part": "memory",
        "requests": requests,
        "tensors after a tenth": held[0][0],
        "tensors": held[-1][0],
        "MB after a tenth": held[0][1],
        "MB": held[-1][1],
    }


def resident() -> float:
    """Memory of this process in MB; the most so far where the system does not say it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@command(__doc__, "live", requests=50, samples=60, seconds=1.0, many=200)
@click.option("--requests", default=2000, help="Requests beside `sample`.")
@click.option("--samples", default=1000, help="Samples of a throughput.")
@click.option("--seconds", default=60.0, help="Of the comparison of latencies.")
@click.option("--many", default=10_000, help="Requests while memory is watched.")
def main(requests: int, samples: int, seconds: float, many: int) -> list[Row]:
    """Prints the rows."""
    rows = [
        same(requests),
        # Large networks: one that pays by the call, one by the row, one by both. And one that is small.
        *(throughput(samples, 32, 20, a, b) for a, b in ((0.1, 0.0), (0.0, 0.003), (0.05, 0.0015), (0.02, 0.0))),
        throughput(samples, 32, 50, 0.05, 0.0015),
        latency(seconds),
        memory(many),
    ]
    for row in rows:
        table([row])
    return rows


if __name__ == "__main__":
    main()
