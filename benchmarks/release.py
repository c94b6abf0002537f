r"""Runs the studies of a release one after another, the shortest first, and fills in the documents: a night of 10 hours
on two cores.

Left out: the FID of seeds.py at other than 10 calls (12 hours more), ablations, the thesis's studies, tokens and
autoencoders (--others: 10 hours more), and what needs more than the two data sets: latent.py diffusion and flow (a
trained latent model) and codebases.py (the sources of four libraries).

Needs `pip install -e '.[bench,peers]'` and folders with MNIST and Fashion-MNIST. What is in the books of `peers.py` and
`fitted.py`, and what is in runs/, is not run again: move peers.csv, fitted.csv and runs/ away for numbers that are all
new. A study that fails is named at the end.

    python benchmarks/release.py --images FASHION --mnist MNIST
    python benchmarks/release.py --images FASHION --mnist MNIST --quick    # shows that everything runs; keeps nothing
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click

HERE = Path(__file__).parent
STUDIES = {
    "ode.py flow": 1,
    "hosts.py": 2,
    "pipelines.py cost": 3,
    "ode.py likelihood": 4,
    "overhead.py batching": 4,
    "overhead.py runs": 5,
    "pipelines.py guidance": 5,
    "survival.py ray": 5,
    "posterior.py": 5,
    "live.py queue": 9,
    "live.py server": 10,
    "pipelines.py classes": 12,
    "survival.py sweep": 20,
    "networks.py --data {mnist}": 25,
    "adaptivity.py --images {images}": 25,
    "digits.py": 45,
    "peers.py --images {images}": 60,
    "fitted.py --fids 2000": 120,
    "seeds.py --count 1": 190,
    "figures.py results": 1,
    "figures.py samples": 10,
}
"""And about how many minutes each takes on two cores. A result says how many it took ("minutes")."""
OTHERS = {
    "ablations.py solver": 2,
    "thesis/adversarial.py steps": 2,
    "thesis/algorithm6.py calls": 3,
    "tokens.py exact": 5,
    "thesis/adversarial.py langevin": 5,
    "ablations.py fit": 6,
    "thesis/algorithm6.py rejections": 15,
    "thesis/adversarial.py points": 20,
    "thesis/gans.py divergences": 20,
    "thesis/gans.py bias --data {images}": 20,
    "thesis/gans.py comparisons --data {images}": 20,
    "thesis/gans.py modes --data {images}": 20,
    "latent.py autoencoders --data {images}": 30,
    "thesis/chapter10.py exact": 30,
    "thesis/gans.py masks --data {images}": 40,
    "thesis/adversarial.py inception": 40,
    "thesis/adversarial.py images --data {images}": 60,
    "tokens.py images --data {images}": 80,
    "thesis/chapter10.py network": 180,
}


@click.command(help=" ".join(__doc__.split("\n\nNeeds")[0].split("\n")), context_settings={"show_default": True})
@click.option("--images", required=True, help="Folder with Fashion-MNIST's IDX files.")
@click.option("--mnist", required=True, help="Folder with MNIST's.")
@click.option("--others/--no-others", default=False, help="Whether to run what is left out for time, too.")
@click.option("--quick", is_flag=True, help="Tiny settings; keeps nothing.")
@click.option("--only", default="", help="Studies whose name contains this.")
def main(images: str, mnist: str, others: bool, quick: bool, only: str) -> None:
    """Runs them."""
    failed = []
    for study, minutes in {**STUDIES, **(OTHERS if others or quick else {})}.items():
        script, *arguments = study.format(images=images, mnist=mnist).split()
        arguments += ["--quick"] * quick
        if only in study:
            print(f"\n== {time.strftime('%H:%M')} {study}: about {minutes} minutes", flush=True)
            if subprocess.run([sys.executable, str(HERE / script), *arguments], check=False).returncode:
                failed.append(study)
    if not quick:
        subprocess.run([sys.executable, str(HERE / "tables.py"), "--write"], check=True)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
