r"""What does sampling cost beside the network?

`runs`: time of `sample` over the bare forwards it made, in turn, with the 95 % interval of the median (of five pairs,
94 %); and one increment of noise over one forward, both for the full batch. Mark: 1.10 at batch 64 of the packaged
network. Algorithm 6 runs at rtol 0.5, which takes a quarter of the calls of 0.05: what a step costs does not depend on
it. Five minutes on two cores.

`batching`: what continuous batching saves. Rows that the network evaluates over rows that are needed, and the same for
waiting: batches one after the other, each until its slowest sample is done. Mark: 1.03 for 256 samples, 32 at a time.

Run it on a quiet machine.
"""

from __future__ import annotations

import copy
import ctypes
import statistics

import click
import torch
from common import Row, command, described, in_turn, labels, timed
from torch import Tensor

import fastsde
from fastsde.noise import BrownianPath, FreshNoise
from fastsde.score.analytic import MixtureScore

MARK, ROWS_MARK = 1.10, 1.03

main = click.Group(help=__doc__)


def recorded(model: fastsde.ScoreModel) -> tuple[fastsde.ScoreModel, list[int]]:
    """The same model, and a list of the rows of each call of its network."""
    rows, own, model = list[int](), model.network, copy.copy(model)

    def network(x: Tensor, t: Tensor, **cond: Tensor) -> object:
        rows.append(len(x))
        return own(x, t, **cond)

    model.network = network
    return model, rows


def keep_memory() -> None:
    """Has glibc keep freed memory, which it otherwise gives back by where the heap happens to end.

    To get it again was a seventh of a forward on a CPU, of one loop and not the other.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-1, (1 << 31) - 1), (-2, 1 << 28), (-3, 1 << 25)):  # trim, pad and map from how many on
            libc.mallopt(option, value)


def forwards(model: fastsde.ScoreModel, rows: list[int]) -> float:
    """Wall time of bare forwards of the network at the given batch sizes: the cost nobody can avoid."""
    network, largest = model.network, max(rows)
    device = next(network.parameters()).device
    x = torch.randn(largest, *model.event_shape, device=device)
    t, classes = torch.full((largest,), 500.0, device=device), torch.full((largest,), 10, device=device)

    def run() -> None:
        for b in rows:
            network(x[:b], t[:b], class_labels=classes[:b])

    with torch.no_grad():
        return timed(run)


def whole(model: fastsde.ScoreModel, n: int, seconds: float, device: str, **options: object) -> Row:
    """`sample` over its bare forwards, in turn."""
    said = {"n": n, "batch_size": n, "cond": labels(n), "device": device, **options}
    counting, rows = recorded(model)
    nfe = float(fastsde.sample(counting, **said).nfe.double().mean())
    times = in_turn(lambda: timed(lambda: fastsde.sample(model, **said)), lambda: forwards(model, list(rows)), seconds)
    name = described(options["solver"]) + (f", rtol {options['rtol']:g}" if "rtol" in options else "")
    return {"run": name, "nfe": nfe, "forwards": len(rows)} | times | {"met": times["ratio"] <= MARK}


def increment(label: str, noise: object, model: fastsde.ScoreModel, n: int, device: str) -> Row:
    """One increment of noise, and one bare forward."""
    index = torch.arange(n, device=device)
    t = torch.linspace(0.2, 0.9, n, dtype=torch.float64, device=device)  # each row's own, as in an adaptive run
    carry = noise.start(index, t)

    def draw() -> None:
        noise.increment(index, index, t, t - 0.01, carry)

    draw()
    pairs = [(timed(draw), forwards(model, [n])) for _ in range(10)]
    own, bare = (1e3 * statistics.median(part) for part in zip(*pairs, strict=True))
    return {"noise": label, "noise_ms": own, "forward_ms": bare, "percent": 100 * own / bare}


@command("overhead", main, by_device=True, batch=4, seconds=0.0)
def runs(batch: int = 64, seconds: float = 45.0, device: str = "cpu") -> Row:
    """Time of sample over its bare forwards."""
    keep_memory()
    model, sde = fastsde.pretrained("fashion-mnist", device=device)
    said = [
        {"solver": fastsde.ExponentialPC(), "nfe": 15},
        {"solver": fastsde.ExponentialPC(eta=1.0), "nfe": 15},
        {"solver": fastsde.ExtrapolatedEM(), "rtol": 0.5},
    ]
    found = [whole(model, batch, seconds, device, **options) for options in said]
    path = BrownianPath(0, model.event_shape, torch.float32, t_min=sde.t_min, t_max=sde.t_max)
    noises = {"fresh": FreshNoise(0, model.event_shape, torch.float32), "Brownian path": path}
    noise = [increment(label, one, model, batch, device) for label, one in noises.items()]
    return {"runs": found, "noise": noise}


def unequal() -> MixtureScore:
    """Four well-separated Gaussians in 16 dimensions with standard deviations 0.5, 0.05, 0.005 and 0.0005."""
    means = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.eye(16, dtype=torch.float64).expand(4, 16, 16)
    variances = torch.tensor([0.5, 0.05, 0.005, 0.0005], dtype=torch.float64)[:, None].expand(4, 16) ** 2
    return MixtureScore(fastsde.VPSDE(), torch.full((4,), 0.25, dtype=torch.float64), means, basis, variances)


def count(name: str, model: fastsde.ScoreModel, n: int, batch: int, cond: dict[str, Tensor] | None) -> Row:
    """Rows evaluated against rows needed, by Algorithm 6, whose samples differ most in their numbers of calls."""
    options = {"n": n, "batch_size": batch, "cond": cond, "solver": fastsde.ExtrapolatedEM(), "rtol": 0.05}
    counting, rows = recorded(model)
    r = fastsde.sample(counting, **options)
    waiting = [len(part) for part in r.nfe.split(batch) for _ in range(int(part.max()))]
    needed = int(r.nfe.sum())
    row: Row = {"problem": name, "nfe": [int(r.nfe.min()), float(r.nfe.double().mean()), int(r.nfe.max())]}
    row |= {"rows over needed": sum(rows) / needed, "waiting": sum(waiting) / needed}
    return row | {"met": row["rows over needed"] <= ROWS_MARK}


@command("batching", main, samples=8, batch=4, network=False)
def batching(samples: int = 256, batch: int = 32, network: bool = True) -> list[Row]:
    """What continuous batching saves."""
    rows = [count("unequal mixture", unequal(), samples, batch, None)]
    if network:
        model, _ = fastsde.pretrained("fashion-mnist")
        rows.append(count("fashion-mnist", model, samples, batch, labels(samples)))
    return rows


if __name__ == "__main__":
    main()
