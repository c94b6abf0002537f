"""`fastsde stats` and `fastsde evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from fastsde.cli import options as option
from fastsde.cli.options import PATH
from fastsde.cli.output import check_writable, dump_json, versions
from fastsde.evaluation.features import open_features, packaged_features
from fastsde.evaluation.images import open_images
from fastsde.evaluation.measure import measure
from fastsde.evaluation.reference import Reference, packaged_reference
from fastsde.evaluation.statistics import fewest
from fastsde.files import write_whole


def reference_of(reference: str | None, features: str) -> Reference:
    """The file of that name, or the packaged statistics of packaged features."""
    if reference is not None:
        return packaged_reference(reference) if reference in packaged_features() else Reference.load(Path(reference))
    if features not in packaged_features():
        raise ValueError(f"--reference is needed for the features {features!r}: a file that `fastsde stats` wrote.")
    return packaged_reference(features)


@click.command()
@click.option(
    "--data",
    required=True,
    type=PATH,
    help="Yours: a folder of pictures, an .npz with arr_0, a folder of IDX files (as torchvision downloads MNIST), a "
    "data set of Hugging Face, or a job of `sample`.",
)
@click.option("--split", default="train", type=click.Choice(["train", "test"]), help="Of IDX files and data sets.")
@option.features
@option.weights
@click.option("--keep", default=10_000, type=click.IntRange(0), help="Features kept for KID, precision and recall.")
@click.option("--half", is_flag=True, help="Keep those in half precision.")
@click.option("--out", required=True, type=PATH, help="The .npz to write.")
@option.device
def stats(
    data: Path, split: str, features: str, weights: Path | None, keep: int, half: bool, out: Path, device: torch.device
) -> None:
    """Measure mean and covariance of the features of a data set.

    The file has mu and sigma, as pytorch-fid and clean-fid read them, some features, and a record of network, image
    size and source, which `evaluate` and `bench` compare with theirs.

    \b
    Example:
      fastsde stats --data data/FashionMNIST --out reference.npz
    """
    check_writable(out)
    network = open_features(features, weights, device=str(device))
    images = open_images(data, split=split)
    reference = Reference.build(images, network, keep=keep, progress=True)
    reference.record["versions"] = versions()
    reference.save(out, half=half)
    kept = 0 if reference.feats is None else len(reference.feats)
    click.echo(f"{out}: {reference.record['n']} images, {len(reference.mean)} features, {kept} of them kept")


@click.command()
@click.argument("samples", type=PATH)
@click.option("--reference", help="A file of `fastsde stats`, pytorch-fid, clean-fid or ADM; or a packaged name.")
@option.features
@option.weights
@option.bootstrap
@click.option("--out", type=PATH, help="Also write the figures to this JSON file.")
@option.as_json
@option.device
def evaluate(
    samples: Path,
    reference: str | None,
    features: str,
    weights: Path | None,
    bootstrap: int,
    out: Path | None,
    as_json: bool,
    device: torch.device,
) -> None:
    """Measure SAMPLES, a folder or .npz of images or what `fastsde sample` wrote, against a reference.

    \b
    Examples:
      fastsde evaluate samples
      fastsde evaluate pictures --features inception --weights inception.pth --reference reference.npz
    """
    check_writable(out)
    network = open_features(features, weights, device=str(device))
    images = open_images(samples)
    wanted = reference_of(reference, features)
    wanted.check(network, images.shape)
    least = fewest(len(wanted.mean))
    if images.n < least:
        raise ValueError(f"{images.n} images are too few for {len(wanted.mean)} features: at least {least} are needed.")
    figures = measure(*network.of(images, progress=True), wanted, draws=bootstrap)
    record = {
        "n": images.n,
        **({"not_successful": images.unsuccessful} if images.unsuccessful else {}),
        **figures,
        "features": network.describe(),
        "reference": wanted.record or f"{reference}, which does not say what it is of",
        "versions": versions(),
    }
    if out is not None:
        write_whole(out, dump_json(record).encode())
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    click.echo(f"{images.n} images, features {network.name}")
    if images.unsuccessful:
        click.echo(f"of these {images.unsuccessful} did not reach the end of sampling; they are measured as they are")
    click.echo(
        f"FID {figures['fid']:.3f} +- {figures['fid_error']:.3f}; {figures['fid_infinite']:.3f} for n to infinity"
    )
    if "kid" in figures:
        spread = figures["kid_error"]
        click.echo(f"KID x 1000  {1000 * figures['kid']:.3f}" + ("" if spread is None else f" +- {1000 * spread:.3f}"))
        if "divergence" in figures:
            click.echo(f"divergence by a critic {figures['divergence']:.3f} +- {figures['divergence_error']:.3f}")
        click.echo("  ".join(f"{key} {figures[key]:.3f}" for key in ("precision", "recall", "density", "coverage")))
    if "inception_score" in figures:
        spread = figures["inception_score_spread"]
        click.echo(f"inception score {figures['inception_score']:.3f} +- {spread:.3f} (over splits)")
