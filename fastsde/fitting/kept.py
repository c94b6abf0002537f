"""The files of a fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsde.files import ArrayFile, json_hash, write_whole
from fastsde.score.network import module_of
from fastsde.solvers.fitted import FittedSolver


class Kept:
    """The file of a finished fit, and beside it CACHE.part, the state of one that is not."""

    def __init__(self, path: Path, settings: Mapping[str, Any], network: object) -> None:
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise ValueError(f"cache= must be a file in a folder that exists; got {path}.")
        if module_of(network) is None:
            raise ValueError("cache= needs a torch module, to know it by its weights; got a function.")
        self.path, self.settings = path, settings
        self.part = path.with_name(f"{path.name}.part")
        self.cost, self.done = 0, dict[str, Any]()
        self.found: tuple[np.ndarray, np.ndarray] | None = None
        if self.part.is_file():
            self._read()

    def finished(self) -> FittedSolver | None:
        """The solver in the file, if it was made for the same settings."""
        if not self.path.exists():
            return None
        solver = FittedSolver.load(self.path)
        same = all(solver.record.get(key) == value for key, value in self.settings.items())
        return solver if same else None

    def _read(self) -> None:
        try:
            with ArrayFile(self.part) as file:
                record = bytes(file.read("record")).decode()
                target, course = file.read("target"), file.read("course")
            content = json.loads(record)
            if content["settings"] != json_hash(dict(self.settings)):
                return
            self.cost, self.done, self.found = int(content["cost"]), dict(content["done"]), (target, course)
        except (OSError, ValueError, KeyError, TypeError):
            return  # damaged: begun again

    def solution(self) -> tuple[Tensor, Tensor] | None:
        """The accurate solution of an interrupted fit: the samples, and states on the way."""
        return None if self.found is None else (torch.as_tensor(self.found[0]), torch.as_tensor(self.found[1]))

    def keep(self, target: np.ndarray, course: np.ndarray, cost: int) -> None:
        """Writes the accurate solution, and what it cost."""
        self.found, self.cost = (target, course), cost
        self._write()

    def put(self, key: str, value: Any) -> None:
        """Writes what came of a part of the fit beside it; `done` has it when the fit goes on."""
        self.done[key] = value
        self._write()

    def _write(self) -> None:
        content = {"settings": json_hash(dict(self.settings)), "cost": self.cost, "done": self.done}
        text = np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)
        assert self.found is not None  # `keep` comes first
        write_whole(self.part, {"target": self.found[0], "course": self.found[1], "record": text})

    def finish(self, solver: FittedSolver) -> None:
        """Writes the solver, and removes what was kept on the way."""
        solver.save(self.path)
        self.part.unlink(missing_ok=True)
