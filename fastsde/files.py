"""Files: written whole or not at all; read with care, because anybody may have written them. Errors name the file."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

_HEADERS: dict[tuple[int, int], Any] = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def sha256(*parts: bytes | np.ndarray) -> str:
    """SHA-256 of bytes and arrays, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.tobytes())
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON text of a value: keys sorted, no spaces."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


Content = bytes | Mapping[str, np.ndarray] | Callable[[Path], object]
"""Bytes; arrays, for an .npz; or a function that writes to the path it is given, which has the suffix of the file."""


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """What `write_whole` writes of arrays."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def write_whole(path: Path, content: Content) -> None:
    """Writes a file that appears under its name only when it is whole and on the disk; an OSError names the file.

    Processes that write the same file have temporary names of their own.
    """
    write_together({path: content})


def write_together(files: Mapping[Path, Content]) -> None:
    """Writes files that belong together: all of them, or none and an OSError that names the one that cannot be."""
    pairs = {path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}"): path for path in files}
    try:
        for temporary, path in pairs.items():  # first all of them whole, under other names
            content = files[path]
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content if isinstance(content, bytes) else npz_bytes(content))
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        for temporary, path in pairs.items():
            try:
                os.replace(temporary, path)
            except FileNotFoundError:
                if not path.is_file():  # another process may have cleared it as a left-over, once `path` was there
                    raise
    except OSError as error:  # such as that of a full disk, which names no file
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        error.filename = error.filename or str(path)
        raise
    finally:
        clear(pairs)


def write_first(path: Path, content: bytes) -> None:
    """As `write_whole`, unless another process has written the file in between: then that file stays."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.first.tmp{path.suffix}")
    try:
        write_whole(temporary, content)
        os.link(temporary, path)  # fails if it exists, which replacing it would not
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(temporary, path)
    finally:
        clear([temporary])


def json_text(value: Any) -> bytes:
    """A JSON value as it is written to files."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """As `write_whole`, of a JSON value."""
    write_whole(path, json_text(value))


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a JSON file gives them back: lists for tuples, Python's numbers for numpy's."""
    found: dict[str, Any] = json.loads(json.dumps(dict(settings), default=lambda value: np.asarray(value).tolist()))
    return found


def differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Settings that differ, with both values; empty if none does."""
    changed = sorted(key for key in stored.keys() | here.keys() if stored.get(key) != here.get(key))
    return "; ".join(f"{key}: {_short(stored.get(key))} there, {_short(here.get(key))} here" for key in changed)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def csv_text(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A table in CSV with a header, of all keys that any row has; values that are dicts are written as JSON."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def clear(temporary: Path | Iterable[Path]) -> None:
    """Removes temporary files, or what killed processes left half-written in a folder that is complete.

    A process that is just writing what is there already may lose its temporary file by this, and then is content with
    what is there.
    """
    for path in temporary.glob(".*.tmp*") if isinstance(temporary, Path) else temporary:
        path.unlink(missing_ok=True)


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
        """The array of that name, which is one of `headers`; a ValueError names a file that is damaged."""
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

    def __exit__(self, *error: object) -> None:
        self._zip.close()
