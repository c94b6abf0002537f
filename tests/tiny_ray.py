"""Shards that take no time, and workers that die. Apart, because workers import it."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from fastsde.files import npz_bytes
from fastsde.result import SamplingError


def squares(indices):
    """Of each sample an image of four equal pixels, k * k in 8 bits, and its cost."""
    values = np.array([k * k % 256 for k in indices])
    return {"arr_0": values[:, None, None, None].astype(np.uint8).repeat(4, 1), "nfe": values}


def open_squares(job, marks=None, deadly=(), always=False, seconds=0.0, fails_at=None):
    """What a worker opens: it dies over the shards `deadly`, the first time or always, and marks each shard begun."""

    def make(k):
        if marks is not None:
            Path(marks).mkdir(exist_ok=True)
            first = not list(Path(marks).glob(f"{k}-*"))
            Path(marks, f"{k}-{time.time_ns()}").touch()
            if k in deadly and (first or always):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        if k == fails_at:
            raise SamplingError("out of memory", None)
        return npz_bytes(job.whole(k, squares(job.indices(k))))

    return make, {"maker": "squares"}
