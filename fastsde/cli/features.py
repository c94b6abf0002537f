"""`fastsde train-features`."""

from __future__ import annotations

from pathlib import Path

import click

from fastsde.cli.options import PATH
from fastsde.cli.output import data_and_licence, prepare_folder, versions
from fastsde.evaluation.classifier import WEIGHTS, accuracy, load_classifier, save_classifier, train_classifier
from fastsde.files import sha256
from fastsde.training.batches import check_data
from fastsde.training.data import load_images, load_test_images


@click.command("train-features")
@click.option(
    "--data", required=True, type=PATH, help="Yours: a folder of the four IDX files, as torchvision downloads MNIST."
)
@click.option("--out", required=True, type=PATH, help="Folder for weights and card.")
@click.option("--epochs", default=10, type=click.IntRange(1), help="Passes over the training images.")
@click.option("--seed", default=0, type=click.IntRange(0, 1 << 31), help="Weights, order and augmentation.")
@click.option("--classes", default="", help="Class names, comma-separated; numbers by default.")
@click.option("--title", default="", help="Name and licence of the data, for the card: 'Fashion-MNIST; MIT'.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in --out.")
def train_features(data: Path, out: Path, epochs: int, seed: int, classes: str, title: str, resume: bool) -> None:
    """Train a small convolutional classifier on IDX images, for `--features` of stats, evaluate and bench.

    Writes weights in half precision, the precision they are tested and used in, and a card with their accuracy. After
    every pass --out/checkpoint.safetensors is replaced; --resume goes on from it to the same weights.

    \b
    Example:
      fastsde train-features --data data/FashionMNIST --out runs/features
    """
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists() and not resume:
        raise FileExistsError(f"{checkpoint} exists; pass --resume to continue it, or another --out.")
    images, labels = load_images(data)
    test_images, test_labels = load_test_images(data, images, labels)
    names = classes.split(",") if classes else [str(k) for k in range(int(labels.max()) + 1)]
    check_data(images, labels)
    if len(names) != int(labels.max()) + 1:
        raise ValueError(f"--classes names {len(names)} classes; the data have {int(labels.max()) + 1}.")
    prepare_folder(out, needed=10 << 20)
    try:
        network = train_classifier(images, labels, epochs=epochs, seed=seed, checkpoint=checkpoint, resume=resume)
    except KeyboardInterrupt as error:
        raise click.ClickException(f"interrupted; --resume goes on from {checkpoint}, if it is there.") from error
    card = {
        **data_and_licence(title),
        "command": f"fastsde train-features --data FOLDER --out OUT --epochs {epochs} --seed {seed}",
        "parameters": sum(p.numel() for p in network.parameters()),
        "image_shape": list(images.shape[1:]),
        "classes": names,
        "dim": network.head.in_features,
        "versions": versions(),
    }
    save_classifier(out, network, card)
    network, _ = load_classifier(out)
    card["metrics"] = {
        "test_accuracy": round(accuracy(network, test_images, test_labels), 4),
        "train_accuracy": round(accuracy(network, images[:10_000], labels[:10_000]), 4),
        "test_images": len(test_images),
    }
    card["weights_sha256"] = sha256((out / WEIGHTS).read_bytes())
    save_classifier(out, network, card)
    click.echo(f"{out}: {card['metrics']}; use it with --features {out}")
