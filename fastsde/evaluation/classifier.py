"""The small classifier whose features measure small images: the network, its training, its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from fastsde.files import read_json, sha256, write_json, write_whole
from fastsde.training.batches import data_hash
from fastsde.training.checkpoint import History, load_checkpoint, save_checkpoint
from fastsde.training.data import to_unit_range

WEIGHTS, CARD = "classifier.safetensors", "card.json"


class Classifier(nn.Module):
    """Seven 3x3 convolutions with batch normalisation, two halvings, a mean over pixels, one linear layer.

    Args:
        channels: image channels.
        classes: number of classes.
        width: channels at full resolution; they double at each halving.
        dim: number of features.
    """

    def __init__(self, channels: int, classes: int, width: int = 24, dim: int = 64) -> None:
        super().__init__()

        def block(inside: int, out: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inside, out, 3, padding=1, bias=False, dtype=torch.float32)
            return [convolution, nn.BatchNorm2d(out, dtype=torch.float32), nn.ReLU()]

        self.body = nn.Sequential(
            *block(channels, width),
            *block(width, width),
            nn.MaxPool2d(2),
            *block(width, 2 * width),
            *block(2 * width, 2 * width),
            nn.MaxPool2d(2),
            *block(2 * width, 4 * width),
            *block(4 * width, 4 * width),
            *block(4 * width, dim),
        )
        self.head = nn.Linear(dim, classes, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features with shape (B, dim), non-negative, and logits with shape (B, classes), of x in [-1, 1]."""
        features = self.body(x).mean((2, 3))
        return features, self.head(features)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 0.05,
    weight_decay: float = 5e-4,
    smoothing: float = 0.1,
    seed: int = 0,
    bf16: bool = True,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Classifier:
    """Trains a `Classifier` by cross entropy, on images mirrored and shifted by up to two pixels at random.

    Stochastic gradient descent with Nesterov momentum 0.9 under one cosine from `learning_rate` to 0.

    Args:
        images: uint8 with shape (N, C, H, W), H and W divisible by 4.
        labels: int64 with shape (N,), from 0 on.
        epochs, batch_size: passes over the data, and images a step.
        learning_rate, weight_decay: at the start, and of all weights.
        smoothing: share of the target spread over all classes.
        seed: determines weights, order and augmentation.
        bf16: bfloat16 under autocast.
        checkpoint: a .safetensors file, replaced after every epoch.
        resume: continue from `checkpoint`, to the same numbers.

    Raises:
        ValueError: if the images' size is not divisible by 4, there are fewer than a batch, or the checkpoint is of
            other settings.
        FileNotFoundError: if there is nothing to resume.
    """
    if images.shape[-1] % 4 or images.shape[-2] % 4:
        raise ValueError(f"images must have sides divisible by 4 (two halvings); they are {tuple(images.shape[-2:])}.")
    if len(images) < batch_size:
        raise ValueError(f"{len(images)} images are fewer than a batch of {batch_size}.")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Classifier(images.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.SGD(
        network.parameters(), learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    per_epoch = len(images) // batch_size
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    settings |= {"weight_decay": weight_decay, "smoothing": smoothing, "seed": seed, "bf16": bf16}
    settings |= {"data": data_hash(images, labels), "steps": steps}
    modules: dict[str, nn.Module] = {"network": network}
    optimizers: dict[str, torch.optim.Optimizer] = {"sgd": optimizer}
    history: History = {"loss": []}
    if resume and checkpoint is not None:
        history = load_checkpoint(checkpoint, modules, optimizers, settings, ["loss"])
    first = len(history["loss"])
    bar = tqdm(total=steps, desc="train", unit="step", initial=first, disable=None)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        # What is left over is no batch; another order leaves others out in the next pass.
        for step, rows in enumerate(order.split(batch_size)[:per_epoch], epoch * per_epoch):
            flip = torch.rand(batch_size, generator=generator, dtype=torch.float32) < 0.5
            start = torch.randint(0, 5, (2, batch_size), generator=generator)
            optimizer.zero_grad(set_to_none=True)
            if step >= first:
                x = _augment(to_unit_range(images[rows]), flip, start)
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    _, logits = network(x)
                    loss = functional.cross_entropy(logits.float(), labels[rows], label_smoothing=smoothing)
                loss.backward()
                history["loss"].append(float(loss.detach()))
                bar.update()
                bar.set_postfix(loss=f"{history['loss'][-1]:.3f}")
            optimizer.step()  # of a step done before the checkpoint there is no gradient, and this does nothing
            schedule.step()
        if checkpoint is not None and len(history["loss"]) > first:
            save_checkpoint(checkpoint, modules, optimizers, settings, history)
    bar.close()
    return network.eval()


def _augment(x: Tensor, flip: Tensor, start: Tensor) -> Tensor:
    """Each image mirrored or not, and moved by -2 .. 2 pixels along both axes, black moving in.

    `flip` has shape (n,), and `start`, 2 more than the move up and to the left, has shape (2, n).
    """
    n, _, height, width = x.shape
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    x = functional.pad(x, (2, 2, 2, 2), value=-1.0)
    top, left = start
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return x[torch.arange(n)[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None], rows, columns]


@torch.no_grad()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images with shape (N, C, H, W) whose label has the largest logit."""
    found = torch.cat([network(to_unit_range(part))[1].argmax(1) for part in images.split(500)])
    return int((found == labels).sum()) / len(images)


def save_classifier(folder: Path, network: Classifier, card: dict[str, Any]) -> None:
    """Writes weights in half precision and card, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in network.state_dict().items()}
    write_whole(folder / WEIGHTS, save(weights, {"format": "pt"}))
    write_json(folder / CARD, card)


def load_classifier(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """The network, in evaluation mode and single precision, and the card of a folder that `save_classifier` wrote.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged or they do not fit.
    """
    for file in (WEIGHTS, CARD):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no feature network: {file} is missing.")
    try:
        card = read_json(folder / CARD)
        network = Classifier(card["image_shape"][0], len(card["classes"]))
        weights = load_file(folder / WEIGHTS)
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        digest = sha256((folder / WEIGHTS).read_bytes())
        if card.get("weights_sha256", digest) != digest:
            raise ValueError(f"{WEIGHTS} is not the file that {CARD} describes")
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no whole feature network: {error}") from error
    return network.eval().requires_grad_(False), card
