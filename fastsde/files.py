"""Files: written whole or not at all; read with care, because anybody may have written them. Errors name the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy

_HEADERS: dict[tuple[int, int], Any] = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def sha256(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON text of a value: keys sorted, no spaces."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError without a file name, such as that of a full disk, the name of the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name only when it is whole and on the disk.

    Processes that write the same file have temporary names of their own.

    Raises:
        OSError: naming the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except FileNotFoundError:
        if not path.is_file():  # another process may have taken the temporary file for a left-over, and `path` is there
            raise
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else would reach code that takes strings for names on a hub.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it holds anything else, naming the file.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(value).__name__}.")
    return value


class ArrayFile:
    """An .npz file of plain arrays. An array is read only if the file is as long as the array's header says.

        with ArrayFile(path) as file:
            labels = file.read("arr_1")

    Args:
        path: the file. Of the arrays only the headers are read at first.

    Attributes:
        headers: shape and dtype of each array, by name.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is damaged or none of plain arrays, naming it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        with self._blamed():
            self._zip = zipfile.ZipFile(path)
            for member in self._zip.infolist():
                with self._zip.open(member) as file:
                    shape, _, dtype = _HEADERS[npy.read_magic(file)](file)
                    length = math.prod(shape) * dtype.itemsize
                    if member.file_size - file.tell() != length and not dtype.hasobject:  # those `read` refuses
                        raise ValueError(f"{member.filename} has {member.file_size} bytes, its header promises {shape}")
                self.headers[member.filename.removesuffix(".npy")] = (shape, dtype)

    def read(self, name: str) -> np.ndarray:
        """The array of that name, which is one of `headers`.

        Raises:
            ValueError: if the file is damaged, naming it.
        """
        with self._blamed(), self._zip.open(f"{name}.npy") as file:
            array: np.ndarray = npy.read_array(file, allow_pickle=False)
        return array

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # zip, deflate and numpy's parser each have their own errors for damage
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = f"{error}".rstrip(".") or type(error).__name__
            raise ValueError(f"{self.path} is damaged, or no .npz file of plain arrays: {what}.") from error

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()
