"""`fastsde diagnose`."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor

from fastsde.checkpoints import PackagedModel
from fastsde.cli import options as option
from fastsde.cli.models import open_model
from fastsde.cli.options import PATH
from fastsde.cli.output import check_writable, dump_json
from fastsde.diagnosis import Diagnosis
from fastsde.diagnosis import diagnose as run
from fastsde.diffusers.latents import autoencoder
from fastsde.evaluation.images import open_images
from fastsde.score.base import ScoreModel

_IMAGES = 16


@click.command()
@option.model
@click.option(
    "--data", type=PATH, help="16 images or more that the model was trained on: a folder, an .npz, IDX files."
)
@option.seed
@option.device
@option.plot
@option.as_json
def diagnose(model: str, data: Path | None, seed: int, device: torch.device, plot: Path | None, as_json: bool) -> None:
    """Say whether a network is read as it was trained: what it predicts, its sign, its time, the range of the data.

    The denoised prediction of a network that is read rightly is at least as good as the best linear one, at each level
    of noise: "error / linear" is at most 1, and up to 1.5 passes, since networks have errors of their own. If that
    fails, the usual other readings are tried and the one that fits is named. Without --data the model is tried on
    samples of its own, which tells fewer readings apart. Ends with status 1 if the reading does not fit.

    \b
    Examples:
      fastsde diagnose
      fastsde diagnose --model google/ddpm-cifar10-32 --data pictures --plot diagnosis.png
    """
    check_writable(plot, "--plot")
    opened = open_model(model, device, torch.float32)
    if opened.pipe is not None and data is not None and autoencoder(opened.pipe) is not None:
        raise click.UsageError("--data is for models of pixels; this one has latents.")
    images = None if data is None else _images(data, opened.model)
    found = run(opened.model, data=images, seed=seed, progress=True)
    if plot is not None:
        found.plot(plot)
    click.echo(dump_json(_record(found)) if as_json else str(found))
    if not found.fits:
        raise SystemExit(1)


def _images(source: Path, model: ScoreModel) -> Tensor:
    """The first images of a set as the model knows them: in its range or its latents, with shape (16, *event)."""
    opened = open_images(source)
    images = opened.read(0, min(_IMAGES, opened.n))
    if isinstance(model, PackagedModel) and model.autoencoder is not None:
        return model.encode(images)
    low, high = model.data_range
    return low + images.float() / 255 * (high - low)


def _record(found: Diagnosis) -> dict[str, object]:
    return {
        "fits": found.fits,
        "advice": found.advice,
        "given": str(found.given),
        "best": None if found.best is None else str(found.best),
        "calls": found.calls,
        "from_data": found.from_data,
        "level": found.level.tolist(),
        "error": found.error.tolist(),
        "magnitude": found.magnitude.tolist(),
        "best_error": None if found.best_error is None else found.best_error.tolist(),
    }
