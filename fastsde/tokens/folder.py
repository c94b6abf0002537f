"""A trained token model in a folder: configurations, weights in safetensors, a card, and a code book if it has one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastsde.files import read_json, sha256, write_json, write_whole
from fastsde.score.network import load_weights
from fastsde.tokens.model import Critic, TokenModel
from fastsde.tokens.networks import CodeBook, TokenTransformer
from fastsde.tokens.process import LINEAR, SINE, Masking

CARD, GENERATOR, CRITIC, BOOK = "tokens.json", "generator", "critic", "book"
"""The card, whose name tells the folder from one of a score model, and the stems of the files of weights."""
_KINDS = {GENERATOR: TokenTransformer, CRITIC: TokenTransformer, BOOK: CodeBook}
_SCHEDULES = {schedule.formula: schedule for schedule in (LINEAR, SINE)}


@dataclasses.dataclass(frozen=True)
class TokenFolder:
    """What a folder holds.

    Attributes:
        model: the token model.
        critic: its critic; None if there is none.
        book: what decodes its tokens; None if there is none.
        card: what the folder says of itself.
        weights_sha256: of the generator's file.
    """

    model: TokenModel
    critic: Critic | None
    book: CodeBook | None
    card: dict[str, Any]
    weights_sha256: str

    @property
    def classes(self) -> int:
        """Number of labels that the generator takes; 0 for none."""
        return int(self.card["configs"][GENERATOR]["classes"] or 0)

    def images(self, tokens: Tensor) -> Tensor:
        """Images in [-1, 1] with shape (n, 1, h, w) of tokens with shape (n, *event).

        Raises:
            ValueError: if there is no code book.
        """
        if self.book is None:
            raise ValueError("the folder has no code book: its tokens are no images.")
        return torch.cat([self.book.decode(part) for part in tokens.split(500)]).clamp(-1, 1)


def save_tokens(
    folder: Path,
    generator: TokenTransformer,
    event_shape: tuple[int, ...],
    *,
    process: Masking | None = None,
    critic: TokenTransformer | None = None,
    book: CodeBook | None = None,
    card: dict[str, Any] | None = None,
) -> None:
    """Writes a folder that `load_tokens` reads, in half precision, each file atomically.

    Args:
        folder: created if needed.
        generator, critic, book: the networks.
        event_shape: shape of the tokens of one sample.
        process: the masking, with `LINEAR` or `SINE`; `LINEAR` by default.
        card: further facts for the card: data, licence, command.

    Raises:
        ValueError: if weights are not finite in half precision, or the schedule is another.
    """
    schedule = (process or Masking()).schedule.formula
    if schedule not in _SCHEDULES:
        raise ValueError(f"process must have one of the schedules {', '.join(_SCHEDULES)}; got {schedule}.")
    parts: dict[str, Any] = {GENERATOR: generator, CRITIC: critic, BOOK: book}
    found = {name: part for name, part in parts.items() if part is not None}
    contents = {}
    for name, part in found.items():
        weights = {key: value.detach().half().contiguous().cpu() for key, value in part.state_dict().items()}
        if not all(torch.isfinite(value).all() for value in weights.values()):
            raise ValueError(f"the weights of the {name} are not finite in half precision.")
        contents[name] = save(weights)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(folder / f"{name}.safetensors", content)
    facts = {"event_shape": list(event_shape), "schedule": schedule, **(card or {})}
    facts |= {"configs": {name: part.config for name, part in found.items()}}
    write_json(folder / CARD, facts | {"sha256": {name: sha256(content) for name, content in contents.items()}})


def load_tokens(folder: Path, device: torch.device | str = "cpu") -> TokenFolder:
    """Opens a folder that `save_tokens` wrote.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if a file is damaged or is not the one that the card describes.
    """
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"{folder} holds no token model: {CARD} is missing.")
    card = read_json(folder / CARD)
    try:
        configs = card["configs"]
        shape, schedule = tuple(card["event_shape"]), _SCHEDULES[card["schedule"]]
        config = configs[GENERATOR]
        parts: dict[str, Any] = {name: kind(**configs[name]) for name, kind in _KINDS.items() if name in configs}
        hashes = {name: str(card["sha256"][name]) for name in parts}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CARD} does not describe a token model: {error!r}") from error
    for name, part in parts.items():
        load_weights(part, folder / f"{name}.safetensors", folder / CARD, hashes[name])
        part.to(device).eval()
    classes = config["classes"]
    default = None if classes is None else {"class_labels": torch.tensor(classes)}
    model = TokenModel(
        parts[GENERATOR], config["vocabulary"], event_shape=shape, process=Masking(schedule), default_cond=default
    )
    critic = Critic(parts[CRITIC], shape, default) if CRITIC in parts else None
    return TokenFolder(model, critic, parts.get(BOOK), card, hashes[GENERATOR])
