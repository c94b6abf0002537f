r"""Runs the studies of a release one after another, and fills in the documents.

Needs `pip install -e '.[bench,peers]'` and folders with MNIST and Fashion-MNIST. What is in the books of `peers.py` and
`fitted.py`, and what is in runs/, is not run again: move peers.csv, fitted.csv and runs/ away for numbers that are all
new. A study that fails is named at the end.

    python benchmarks/release.py --images FASHION --mnist MNIST            # a day on two cores
    python benchmarks/release.py --images FASHION --mnist MNIST --quick    # shows that everything runs; keeps nothing
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent
STUDIES = (
    "networks.py --data {mnist}",
    "digits.py",
    "peers.py --images {images}",
    "fitted.py --images {images} --fids 2000",
    "seeds.py",
    "adaptivity.py",
    "overhead.py runs",
    "overhead.py batching",
    "live.py queue",
    "live.py server",
    "survival.py sweep",
    "survival.py ray",
    "posterior.py exact",
    "posterior.py network",
    "pipelines.py classes",
    "pipelines.py cost",
    "pipelines.py guidance",
    "hosts.py",
    "ode.py flow",
    "ode.py likelihood",
    "figures.py results",
    "figures.py samples",
)
OTHERS = (
    "ablations.py solver",
    "ablations.py fit",
    "thesis/algorithm6.py calls",
    "thesis/algorithm6.py stability",
    "thesis/algorithm6.py rejections",
    "thesis/chapter10.py exact",
    "thesis/chapter10.py network",
    "thesis/chapter10.py ddim",
    "thesis/adversarial.py steps",
    "thesis/adversarial.py points",
    "thesis/adversarial.py langevin",
    "thesis/adversarial.py images --data {images}",
    "thesis/adversarial.py inception",
    "thesis/gans.py divergences",
    "thesis/gans.py bias --data {images}",
    "thesis/gans.py masks --data {images}",
    "thesis/gans.py comparisons --data {images}",
    "thesis/gans.py modes --data {images}",
    "latent.py autoencoders --data {images}",
    "tokens.py train --data {images}",
    "tokens.py images --data {images}",
    "tokens.py exact",
)


@click.command(help=__doc__.split("\n\n")[0], context_settings={"show_default": True})
@click.option("--images", required=True, help="Folder with Fashion-MNIST's IDX files.")
@click.option("--mnist", required=True, help="Folder with MNIST's.")
@click.option("--others/--no-others", default=False, help="Whether to run ablations and the thesis's studies too.")
@click.option("--quick", is_flag=True, help="Tiny settings; keeps nothing.")
@click.option("--only", default="", help="Studies whose name contains this.")
def main(images: str, mnist: str, others: bool, quick: bool, only: str) -> None:
    """Runs them."""
    failed = []
    for study in (*STUDIES, *(OTHERS if others or quick else ())):
        script, *arguments = study.format(images=images, mnist=mnist).split()
        arguments += ["--quick"] * quick
        if only in study:
            print(f"\n== {study}", flush=True)
            if subprocess.run([sys.executable, str(HERE / script), *arguments], check=False).returncode:
                failed.append(study)
    if not quick:
        subprocess.run([sys.executable, str(HERE / "tables.py"), "--write"], check=True)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
