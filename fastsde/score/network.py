"""A network as it comes: what is inside of its wrappers, its mode, what it returns, and what its failures mean."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastsde.files import sha256


@contextlib.contextmanager
def explained(role: str, rows: int, dtype: torch.dtype, time: torch.dtype) -> Iterator[None]:
    """Adds to a failure of the network inside of it what such a failure means as a rule."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        hint = _hint_at(error, rows, dtype, time)
        if hint is None:
            raise
        raise type(error)(f"{role} failed: {error}. {hint}") from error


def _hint_at(error: Exception, rows: int, dtype: torch.dtype, time: torch.dtype) -> str | None:
    """What a failure of the network as a rule means; None if its own message must do."""
    text = str(error)
    if type(error) is IndexError:
        return "Labels in cond, or the times that timestep= returns, are out of the network's range."
    if type(error) is not RuntimeError:
        return None
    if "must match the size" in text or "Sizes of tensors must match" in text:
        return f"It was called on {rows} rows. {_PER_SAMPLE}"
    if "dtype" in text or "scalar type" in text:
        return (
            f"x came in {dtype} and the time in {time}. What timestep= returns in another dtype stays so: for whole "
            "levels, timestep=lambda t: (1000 * t - 1).round().long(); for bfloat16, t.to(torch.bfloat16)."
        )
    return None


_PER_SAMPLE = (
    "Give tensors with one row for each sample in cond=, with leading axis n, and not inside the function: the rows of "
    "the batch change."
)


def module_of(network: object) -> nn.Module | None:
    """The module that a callable is, or whose method it is, compiled or with arguments filled in; else None."""
    while not isinstance(network, nn.Module):
        inside = getattr(network, "_torchdynamo_orig_callable", None) or getattr(network, "__self__", None)
        inside = network.func if isinstance(network, functools.partial) else inside
        if inside is None or inside is network:
            return None
        network = inside
    return network


def modules_behind(network: object) -> list[nn.Module]:
    """The module that a callable is, or those whose names stand in a function and in the functions that it names."""
    whole = module_of(network)
    if whole is not None:
        return [whole]
    found, seen, waiting = dict[nn.Module, None](), set[int](), [network]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, nn.Module):
            found[value] = None
        elif callable(value) and inspect.isfunction(function := inspect.unwrap(value)) and id(function) not in seen:
            seen.add(id(function))
            waiting += _named_in(function)
    return list(found)


def _named_in(function: Any) -> list[object]:
    """What a function reads by its name: globals, names of the functions around it, and defaults."""
    codes, names = [function.__code__], list[str]()
    while codes:
        code = codes.pop()
        names += [one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"]
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    found: list[object] = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not set yet
            found.append(cell.cell_contents)
    return [*found, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


_USERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_USERS_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluation_mode(network: object) -> Iterator[None]:
    """Switches dropout and batch statistics off for the time of sampling; each submodule gets its own mode back.

    Threads may share a network: its modules go back to training when the last of them is done.
    """
    behind = modules_behind(network)
    with _USERS_LOCK:
        inside = dict.fromkeys(module for one in behind for module in one.modules())
        used = [module for module in inside if module.training or module in _USERS]
        for module in used:
            _USERS[module] = _USERS.get(module, 0) + 1
        if any(module.training for module in used):
            for one in behind:
                one.eval()
    try:
        yield
    finally:
        with _USERS_LOCK:
            for module in used:
                _USERS[module] -= 1
                if not _USERS[module]:
                    del _USERS[module]
                    module.training = True


def unwrap(network: object) -> Any:
    """The network inside torch.compile, data parallelism, sharding or averaging: for whatever is read from it.

    What is called stays the outer object.
    """
    while True:
        inside = getattr(network, "_orig_mod", None)  # torch.compile
        if inside is None and isinstance(network, nn.Module) and type(network).__name__ in _WRAPPERS:
            inside = getattr(network, "module", None)
        if inside is None:
            return network
        network = inside


_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel", "DeepSpeedEngine")
"""Modules that call the one in their `module`."""


def watched(x: Tensor) -> Tensor:
    """A tensor whose gradient can be taken under `enable_grad`: x itself where gradients are recorded, so that one goes
    on to what x was made of; else a copy that knows nothing of it."""
    return x if torch.is_grad_enabled() and x.requires_grad else x.detach().requires_grad_()


def tensor_of(out: object) -> object:
    """The tensor in what a network returned: it, its `.sample`, or the first of a tuple (diffusers' conventions)."""
    return out[0] if isinstance(out, tuple) and out else out if isinstance(out, Tensor) else getattr(out, "sample", out)


def check_output(out: object, x_t: Tensor, role: str) -> Tensor:
    """What a network returned, if it is a floating-point tensor with the shape and the device of the state `x_t`.

    Else it is refused, with a TypeError or ValueError.
    """
    if not isinstance(out, Tensor) or not out.is_floating_point():
        kind = f"a tensor of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{role} must return a floating-point tensor; it returned {kind}.")
    if out.shape != x_t.shape:
        raise ValueError(
            f"{role} was given x with shape {tuple(x_t.shape)} and must return the same shape; "
            f"it returned {tuple(out.shape)}." + (f" {_PER_SAMPLE}" if out.shape[1:] == x_t.shape[1:] else "")
        )
    if out.device != x_t.device:
        raise ValueError(f"{role} was given x on {x_t.device} and returned a tensor on {out.device}.")
    return out


@torch.no_grad()
def check_weights(network: nn.Module) -> None:
    """Refuses, with a ValueError naming the first, weights that hold NaN or infinity; offloaded ones are not read."""
    for name, p in network.named_parameters():
        wide = p.float() if p.is_floating_point() and torch.finfo(p.dtype).bits == 8 else p  # 8 bits have no arithmetic
        if not p.is_meta and not torch.isfinite(wide).all():
            raise ValueError(f"the network's weights are not finite: {name} holds NaN or infinity.")


def load_weights(network: nn.Module, path: Path, config: Path, stated: str | None = None) -> None:
    """Fills a network with the weights of a safetensors file, in float32; `stated` is the hash that the file must have.

    A file that is missing, damaged or of another network than that of the file `config` is refused, with a
    FileNotFoundError or ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    if stated is not None and stated != sha256(path.read_bytes()):
        raise ValueError(f"{path} is not the file that the card describes.")
    try:
        network.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {config}: {error}") from error
    check_weights(network)


_HASHES: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def weights_hash(network: object) -> str | None:
    """SHA-256 over names and values of a network's weights, in hexadecimal; None for a function that names no module.

    Wrappers and methods are looked through. It is kept until a weight changes, or their sum: gigabytes take seconds.
    """
    network = unwrap(network)
    whole = module_of(network)
    if whole is not None:
        return _hash_of(unwrap(whole))
    hashes = sorted({_hash_of(unwrap(module)) for module in modules_behind(network) if module.state_dict()})
    return hashes[0] if len(hashes) == 1 else sha256(" ".join(hashes).encode()) if hashes else None


def _hash_of(network: nn.Module) -> str:
    """The same of one module."""
    state = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    if any(value.is_inference() for value in state.values()):  # whose changes nobody counts
        return tensors_hash(state)
    # What is done to a parameter's data does not count as a version.
    sums = (float(value.sum(dtype=torch.float64)) for value in state.values() if not value.is_complex())
    seen = (*((name, value.data_ptr(), value._version) for name, value in state.items()), *sums)
    if network not in _HASHES or _HASHES[network][0] != seen:
        _HASHES[network] = seen, tensors_hash(state)
    return _HASHES[network][1]


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
