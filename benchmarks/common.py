"""What the benchmarks share: where numbers come from, how they are printed, where they are kept."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fastsde

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance(settings: dict[str, object]) -> dict[str, object]:
    """Settings, package versions and processor: what someone needs to judge or repeat a number."""
    versions = {"fastsde": fastsde.__version__, "torch": torch.__version__, "python": platform.python_version()}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if str(settings.get("device")).startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    settings = {key: value for key, value in settings.items() if key != "keep"}
    return {"settings": settings, "versions": versions, "machine": machine}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under a header, right-aligned but for the first column."""
    text = [list(header), *([str(cell) for cell in row] for row in rows)]
    width = [max(len(row[k]) for row in text) for k in range(len(header))]
    text.insert(1, ["-" * w for w in width])
    for first, *rest in text:
        print("  ".join([first.ljust(width[0]), *(c.rjust(w) for c, w in zip(rest, width[1:], strict=True))]))


def save(name: str, settings: dict[str, object], results: object) -> None:
    """Writes results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    record = provenance(settings) | {"results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: results/{name}.json")


def described(part: object) -> str:
    """A solver, or another dataclass, by its class and the arguments that are not the defaults: what was run says so.

    What is no dataclass is given by its repr; a number by up to six digits.
    """
    if not dataclasses.is_dataclass(part):
        return f"{part:g}" if isinstance(part, float) else repr(part)
    own = {field.name: (getattr(part, field.name), field.default) for field in dataclasses.fields(part)}
    changed = [f"{name}={described(value)}" for name, (value, default) in own.items() if value != default]
    return f"{type(part).__name__}({', '.join(changed)})"


def packaged_model(*, untrained: bool, device: str = "cpu") -> fastsde.ScoreModel:
    """The packaged class-conditional Fashion-MNIST model, or a network of the same shape with random weights."""
    if not untrained:
        model, _ = fastsde.pretrained("fashion-mnist", device=device)
        return model
    from fastsde.training.networks import small_unet

    torch.manual_seed(0)
    return fastsde.ScoreModel(
        small_unet(28, 1, 10).eval().to(device),
        fastsde.VPSDE(),
        "epsilon",
        event_shape=(1, 28, 28),
        timestep=lambda t: 1000 * t - 1,
        default_cond={"class_labels": torch.tensor(10)},
    )


class Recorder(nn.Module):
    """A network that notes the number of rows of each of its calls."""

    def __init__(self, network: Callable[..., object]) -> None:
        super().__init__()
        self.network = network
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> object:
        """Calls the network on x with shape (B, *event) and t with shape (B,), noting B."""
        self.rows.append(len(x))
        return self.network(x, t, **cond)


def recorded(model: fastsde.ScoreModel) -> tuple[fastsde.ScoreModel, list[int]]:
    """The same model with a `Recorder` around its network, and the list it fills."""
    recorder, model = Recorder(model.network), copy.copy(model)
    model.network = recorder
    return model, recorder.rows


def timed(work: Callable[[], object]) -> float:
    """Wall time of one call, and of what it left to a GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def keep_memory() -> None:
    """Has glibc keep freed memory, which is otherwise given back by where the heap happens to end.

    To get it again was a seventh of a forward on a CPU, and of two loops that are compared one may pay and one not.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-1, (1 << 31) - 1), (-2, 1 << 28), (-3, 1 << 25)):  # trim, pad and map from how many on
            libc.mallopt(option, value)


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], seconds: float) -> dict[str, object]:
    """Two works that return their time, in turn, for so many seconds and at least 5 times each.

    A machine that others use, too, is fast and slow by the minute, so one pair says little. Returns medians of both
    times and of the ratio of pairs, with the interval that holds the true one in 95 of 100 cases.
    """
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        if len(pairs) % 2:  # each goes first as often as the other
            b, a = theirs(), ours()
        else:
            a, b = ours(), theirs()
        pairs.append((a, b))
    ratios = sorted(a / b for a, b in pairs)
    low = max(0, math.floor((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2))
    return {
        "pairs": len(pairs),
        "ours_seconds": statistics.median(a for a, _ in pairs),
        "theirs_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_interval": [ratios[low], ratios[-1 - low]],
    }


def replay(model: fastsde.ScoreModel, rows: Sequence[int], device: str = "cpu") -> float:
    """Wall time of bare forwards of the network at the given batch sizes: the cost nobody can avoid."""
    network, largest = model.network, max(rows)
    x, t = torch.randn(largest, *model.event_shape, device=device), torch.full((largest,), 500.0, device=device)
    cond = {key: value.to(device).expand(largest, *value.shape) for key, value in (model.default_cond or {}).items()}
    inputs = {b: (x[:b], t[:b], {key: value[:b] for key, value in cond.items()}) for b in set(rows)}

    def forwards() -> None:
        for b in rows:
            x, t, cond = inputs[b]
            network(x, t, **cond)

    with torch.no_grad():
        return timed(forwards)
