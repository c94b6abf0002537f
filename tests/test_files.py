"""Files: whole or not there, and errors that name them, whatever is inside."""

import errno
import io
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsde.files import ArrayFile, json_hash, read_json, write_whole


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_the_path_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_whole(path, b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.json") as caught:
        write_whole(path, b"after")
    assert caught.value.errno == errno.ENOSPC
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.json", b"before")]


def test_the_hash_of_settings_does_not_depend_on_their_order():
    assert json_hash({"a": 1, "b": [1, 2]}) == json_hash({"b": [1, 2], "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": 2}) != json_hash({"a": "2"})


def npz(path, members, **more):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {**members, **more}.items():
            file.writestr(name, content)
    return path


def npy(array, shape=None):
    """The bytes of an array, under a header that may promise another shape."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + array.tobytes()


IMAGES = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)


@pytest.mark.parametrize("shape", [(10**12, 2, 2), (10**30,), (4, 2, 2), (2, 2, 2), (-3, -4), (1 << 62, 1 << 62)])
def test_a_header_that_promises_another_shape_is_found_before_memory_is_asked_for(shape, tmp_path):
    path = npz(tmp_path / "x.npz", {"arr_0.npy": npy(IMAGES, shape)})
    with pytest.raises(ValueError, match=r"x\.npz is damaged"), ArrayFile(path) as file:
        file.read("arr_0")


def test_what_numpy_writes_is_read_and_objects_are_not(tmp_path):
    arrays = {"a": IMAGES, "b": np.asfortranarray(np.eye(3)), "c": np.array("text"), "d": np.zeros((0, 4))}
    np.savez_compressed(tmp_path / "x.npz", **arrays, e=np.array([{}], dtype=object))
    with ArrayFile(tmp_path / "x.npz") as file:
        for name, array in arrays.items():
            assert file.headers[name] == (array.shape, array.dtype)
            assert np.array_equal(file.read(name), array)
        with pytest.raises(ValueError, match=r"x\.npz is damaged, or no \.npz file of plain arrays: Object arrays"):
            file.read("e")


@given(st.binary(max_size=12), st.integers(0, 700), st.integers(0, 300))
def test_any_damage_is_an_error_that_names_the_file_or_none(tmp_path_factory, noise, at, cut):
    path = tmp_path_factory.mktemp("x") / "x.npz"
    np.savez_compressed(path, arr_0=IMAGES, index=np.arange(3))
    content = bytearray(path.read_bytes())
    content[at : at + len(noise)] = noise
    path.write_bytes(content[: len(content) - cut])
    try:
        with ArrayFile(path) as file:
            found = [file.read(name) for name in file.headers]
    except ValueError as error:
        message = str(error)
    else:  # a name, a date or a comment of the archive
        assert all(np.array_equal(array, IMAGES) or np.array_equal(array, np.arange(3)) for array in found)
        message = str(path)
    assert str(path) in message


def test_a_missing_file_stays_one(tmp_path):
    for read in (ArrayFile, read_json):
        with pytest.raises(FileNotFoundError, match="nothing"):
            read(tmp_path / "nothing")
