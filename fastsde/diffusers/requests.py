"""What a pipeline is asked for, split into the arguments of its call for each sample."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsde.checks import check_count

_TEXT = ("prompt", "negative_prompt")
_EACH = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "num_audios_per_prompt")
"""Names under which pipelines take a number of samples for each prompt."""
_SCALES = ("guidance_scale", "true_cfg_scale")
"""Numbers of which a list has one for each sample; other lists of numbers are for several networks or pictures."""
_PICTURES = ("image", "mask", "video", "frames", "audio")


class Request:
    """The samples asked for: how many, and what the pipeline is called with for each.

    Args:
        pipe: the pipeline.
        given: arguments of its call, for all samples.
        per_sample: arguments with one value for each sample.
        n: number of samples; repeats of one prompt.
        index: sample numbers, which may say how many there are.

    Raises:
        TypeError: for an argument that the pipeline does not take.
        ValueError: for lists that disagree, naming them.
    """

    def __init__(
        self,
        pipe: Any,
        given: dict[str, Any],
        per_sample: Mapping[str, Sequence[Any]],
        n: int | None,
        index: Sequence[int] | Tensor | None,
    ) -> None:
        self.takes = inspect.signature(type(pipe).__call__).parameters
        name = type(pipe).__name__
        # Also where a pipeline takes anything, as some do for what is out of use.
        if unknown := [key for key in (*given, *per_sample) if key not in self.takes]:
            known = ", ".join(key for key, p in self.takes.items() if key != "self" and p.kind is not p.VAR_KEYWORD)
            raise TypeError(f"{name} takes no {', '.join(unknown)}; its call takes {known}.")
        for key, values in per_sample.items():
            if not isinstance(values, (list, tuple, Tensor, np.ndarray)) or len(values) == 0:
                raise ValueError(f"per_sample[{key!r}] must be a list with one value for each sample; got {values!r}.")
        twice = sorted(given.keys() & per_sample.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)} is given both for all samples and in per_sample=.")
        given = dict(given)
        self.generator = given.pop("generator", None)
        each = 1
        for key in _EACH:
            each *= check_count(key, 1 if (k := given.pop(key, None)) is None else k, 1)
        empty = [key for key, v in given.items() if isinstance(v, (list, tuple)) and not v and key.startswith(_TEXT)]
        if empty:
            raise ValueError(f"{', '.join(empty)} must be a string or a list of them; got an empty list.")
        rows = {key: len(v) for key, v in given.items() if _by_prompt(key, v)}
        counts = sorted({k for k in rows.values() if k > 1})
        # Some embeddings have another axis first, such as the layers of a text encoder; then most say 1.
        prompts = 1 if not counts or 2 * list(rows.values()).count(1) > len(rows) else counts[0]
        if prompts > 1 and len(counts) > 1:
            shown = ", ".join(f"{key} has {k}" for key, k in rows.items())
            raise ValueError(f"how many prompts? {shown}. What has another axis first may be given in per_sample=.")
        self.by_prompt = [key for key, k in rows.items() if prompts > 1 or k == 1]
        said: dict[str, int] = {key: len(v) for key, v in per_sample.items()}
        if n is not None:
            said["n"] = check_count("n", n, 1)
        if index is not None:
            said["index"] = len(index)
        if isinstance(self.generator, Sequence):
            said["generator"] = len(self.generator)
        if isinstance(given.get("latents"), Tensor) and len(given["latents"]) > 1:
            said["latents"] = len(given["latents"])
        if prompts * each > 1 or not said:
            said["prompts times samples of each"] = prompts * each
        if len(set(said.values())) > 1:
            raise ValueError(f"the number of samples disagrees: {', '.join(f'{k} says {v}' for k, v in said.items())}.")
        self.n = next(iter(said.values()))
        self._check_lists(given, self.n)
        each = self.n // prompts
        one = {key: 1 for key in (*_EACH, "batch_size") if key in self.takes}  # unconditional pipelines take the last
        self.arguments = [
            {key: _fresh(self._of_prompt(key, v, k // each, k)) for key, v in given.items()}
            | {key: _fresh(v[k]) for key, v in per_sample.items()}
            | one
            for k in range(self.n)
        ]

    def _check_lists(self, given: dict[str, Any], n: int) -> None:
        """Refuses pictures of which it is not known whether they are one for each sample or several for all."""
        for key, value in given.items():
            many = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 3)
            unclear = any(word in key for word in _PICTURES) and "embeds" not in key
            unclear = unclear or (isinstance(self.takes[key].default, Real) and key not in _SCALES)
            if n > 1 and many and len(value) == n and unclear:
                raise ValueError(
                    f"{key} has {n} entries for {n} samples: one for each, or all of them for each? For one each give "
                    f"per_sample={{{key!r}: [a, b]}}, for all of them per_sample={{{key!r}: [[a, b], [a, b]]}}."
                )
            if key in _SCALES and isinstance(value, (list, tuple)) and len(value) != n:
                raise ValueError(f"{key} must be a number, or one for each of {n} samples; got {value!r}.")

    def _of_prompt(self, key: str, value: Any, row: int, sample: int) -> Any:
        """The argument for one sample."""
        if key == "latents" and isinstance(value, Tensor) and len(value) > 1 and len(value) == self.n:
            return value[sample : sample + 1]
        if isinstance(value, (list, tuple)) and len(value) == self.n > 1 and key in _SCALES:
            return value[sample]
        if key not in self.by_prompt:
            return value
        row = row if len(value) > 1 else 0
        if isinstance(value, Tensor) or not isinstance(value[row], str):
            return value[row : row + 1]
        return value[row] if key != "class_labels" else value[row : row + 1]


def _by_prompt(key: str, value: Any) -> bool:
    """Whether an argument has one entry for each prompt."""
    if key.startswith("ip_adapter"):
        return False
    if key.startswith(_TEXT) and isinstance(value, (list, tuple)) and value:
        return all(isinstance(v, (str, Tensor)) or v is None for v in value)
    if key == "class_labels":
        return isinstance(value, (list, tuple, Tensor)) and (not isinstance(value, Tensor) or value.ndim > 0)
    return isinstance(value, Tensor) and value.ndim > 1 and ("embeds" in key or key.endswith("attention_mask"))


def _fresh(value: Any) -> Any:
    """The value with dicts and lists of its own: pipelines write into those that they are given."""
    if isinstance(value, dict):
        return {key: _fresh(part) for key, part in value.items()}
    return [_fresh(part) for part in value] if type(value) is list else value


def streams(generator: Any, seed: int | None, n: int, index: Sequence[int] | Tensor | None) -> tuple[int, list[Any]]:
    """The seed of the noise, and for each sample the generator that its pipeline draws from, or None."""
    if seed is not None:
        if generator is not None:
            raise ValueError("give either seed= or generator=, not both.")
        return check_count("seed", seed, 0), [None] * n
    if isinstance(generator, int) and not isinstance(generator, bool):
        return check_count("generator", generator, 0), [None] * n
    if generator is None:
        return int(torch.randint(1 << 62, (1,))), [None] * n
    if isinstance(generator, torch.Generator):
        if n == 1 and index is None:
            return 0, [generator]
        return int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device)), [None] * n
    each = generator if isinstance(generator, Sequence) else ()
    if not each or not all(isinstance(g, torch.Generator) for g in each):
        raise TypeError(
            f"generator must be a torch.Generator or a list of them, one for each sample; got {generator!r}."
        )
    if index is not None:
        raise ValueError("a list of generators says all noise; leave index= out.")
    return 0, list(each)


def number_of(generator: torch.Generator) -> int:
    """A number in [0, 2^32) that a generator's state decides, which stays as it is."""
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return int(torch.randint(1 << 32, (1,), generator=copy, device=generator.device))


def own_generator(seed: int, number: int) -> torch.Generator:
    """The generator of one sample: a function of (seed, number).

    torch's generator of the CPU takes 32 bits of a seed. An odd multiple, both of it and the offset drawn from the
    seed, gives all numbers of a seed different ones.
    """
    words = torch.randint(1 << 32, (2,), generator=torch.Generator().manual_seed(seed % (1 << 32))).tolist()
    factor, offset = (words[0] + (seed >> 32)) | 1, words[1]
    return torch.Generator().manual_seed((factor * number + offset) % (1 << 32))
