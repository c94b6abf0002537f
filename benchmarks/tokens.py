r"""Masked tokens: a tolerance beside fixed steps on exact laws and on images, and what a critic buys.

Images are Fashion-MNIST as 7 x 7 tokens of a learned book of 64 codes: with few-level pixels at 14 x 14 a call costs
four times as much, and the floor of FID is that of the small images. `FID` is to the decoded tokens of the training
images, with the packaged features, so what the code book loses is not in it. `pairs` is KL(data || samples) of the
tokens of neighbours, pooled over positions, in nats; `entropy` the mean entropy of the tokens of one position. Both
have their value for held-out data, as many as there are samples.

    python benchmarks/tokens.py train --data FOLDER    # code book, generator, critic: about an hour on one core
    python benchmarks/tokens.py images --data FOLDER
    python benchmarks/tokens.py exact
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from common import RUNS, command
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from fastsde import tokens
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images, to_unit_range
from fastsde.training.token_networks import CodeBook, TokenTransformer
from fastsde.training.tokens import train_tokens

FOLDER = RUNS / "tokens"
CODES, SIDE, CLASSES = 64, 7, 10
GENERATOR, CRITIC = {"width": 64, "depth": 4, "heads": 4}, {"width": 48, "depth": 3, "heads": 4}
CONFIG = {"batch_size": 64, "learning_rate": 2e-3, "warmup": 100, "ema_decay": 0.998, "bf16": False}


def train_book(images: Tensor, steps: int) -> CodeBook:
    """The code book: Adam with a rate that falls linearly, codes that start at vectors of images."""
    torch.manual_seed(0)
    book = CodeBook(CODES)
    with torch.no_grad():
        vectors = book.encoder(images[:2000]).movedim(1, -1).flatten(0, -2)
        book.codes.copy_(vectors[torch.randperm(len(vectors))[:CODES]])
    optimizer = torch.optim.Adam(book.parameters(), 2e-3)
    bar = tqdm(range(steps), "code book", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 1.2 * (steps - step) / steps)
        loss = book.loss(images[torch.randint(len(images), (128,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return book.eval()


def network(outputs: int | None = None) -> TokenTransformer:
    """The generator, or with one output the critic, with random weights."""
    torch.manual_seed(1)
    return TokenTransformer(CODES, SIDE**2, classes=CLASSES, outputs=outputs, **(CRITIC if outputs else GENERATOR))


def model_of(generator: TokenTransformer, schedule: tokens.Schedule = tokens.LINEAR) -> tokens.TokenModel:
    """The generator as it was trained."""
    default = {"class_labels": torch.tensor(CLASSES)}
    shape = (SIDE, SIDE)
    process = tokens.Masking(schedule)
    return tokens.TokenModel(generator, CODES, event_shape=shape, process=process, default_cond=default)


def critic_of(critic: TokenTransformer) -> tokens.Critic:
    """The critic as it was trained."""
    return tokens.Critic(critic, event_shape=(SIDE, SIDE))


def encoded(book: CodeBook, images: Tensor) -> Tensor:
    """Tokens of images, with shape (n, 7, 7)."""
    return torch.cat([book.encode(part) for part in images.split(1000)])


def loaded(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """A trained part of these."""
    file = FOLDER / f"{name}.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is missing: python benchmarks/tokens.py train --data FOLDER makes it.")
    module.load_state_dict(load_file(file))
    return module.eval()


@click.group()
def main() -> None:
    """Masked tokens."""


@command("Trains code book, generator and critic; what is there is kept, and a training goes on.", "-", main)
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True), help="Fashion-MNIST.")
@click.option("--book-steps", default=1500)
@click.option("--steps", default=4000)
@click.option("--critic-steps", default=2000)
def train(data: Path, book_steps: int, steps: int, critic_steps: int) -> None:
    """Trains what is missing in runs/tokens."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    images, labels = load_images(data)
    images = to_unit_range(images)
    if not (FOLDER / "book.safetensors").exists():
        save_file(train_book(images, book_steps).state_dict(), FOLDER / "book.safetensors")
    x = encoded(loaded(CodeBook(CODES), "book"), images)

    def fitted(name: str, count: int, net: TokenTransformer, critic: tokens.Critic | None) -> None:
        if (FOLDER / f"{name}.safetensors").exists():
            return
        checkpoint = FOLDER / f"{name}-training.safetensors"
        model = model_of(loaded(network(), "generator") if critic else net)
        config = TrainConfig(steps=count, seed=1 if critic else 0, **CONFIG)
        averaged = train_tokens(model, x, labels, config, checkpoint, critic=critic, resume=checkpoint.exists())
        save_file(averaged.state_dict(), FOLDER / f"{name}.safetensors")

    fitted("generator", steps, network(), None)
    fitted("critic", critic_steps, net := network(1), critic_of(net))


if __name__ == "__main__":
    main()
