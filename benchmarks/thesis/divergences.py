"""Table 6.1's question: which divergence ranks sets of samples as FID does?

Images of the packaged network at 4 to 20 calls, in the features of the packaged classifier, beside those of training
images. For each pair of f and kind a critic is fitted to halves and measured on the others (`fit_critic`), for three
seeds of halves, critic and batches. The rank correlation is Spearman's, of the means over seeds with FID.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import click
import torch
from common import Row, command, table
from scipy.stats import spearmanr
from tqdm import tqdm

import fastsde
from fastsde.evaluation.divergence import FUNCTIONS, KINDS, fit_critic
from fastsde.evaluation.features import open_features
from fastsde.evaluation.images import to_uint8
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import frechet


@command(__doc__, "divergences", samples=140, calls=(4, 20), seeds=1, steps=5)
@click.option("--samples", "-n", default=1000, help="Images for each number of calls.")
@click.option("--calls", type=int, multiple=True, default=(4, 5, 6, 8, 12, 20))
@click.option("--seeds", default=3, help="Of halves, critics and batches.")
@click.option("--steps", default=300, help="Of a critic.")
def main(samples: int, calls: tuple[int, ...], seeds: int, steps: int) -> list[Row]:
    """Prints the table."""
    model, network = fastsde.pretrained("fashion-mnist"), open_features("fashion-mnist")
    reference = packaged_reference("fashion-mnist")
    assert reference.feats is not None
    labels = torch.arange(samples) % 10
    sets, fid = [], []
    for nfe in tqdm(calls, "calls", disable=None):
        r = fastsde.sample(model, n=samples, nfe=nfe, seed=1, cond={"class_labels": labels})
        images = torch.as_tensor(to_uint8(r.samples, model.data_range)).permute(0, 3, 1, 2)
        sets.append(network.of(images.split(500))[0])
        fid.append(frechet(sets[-1], reference.mean, reference.covariance).value)
    rows: list[Row] = [{"f": "FID", "kind": "", **{f"{k} calls": v for k, v in zip(calls, fid, strict=True)}}]
    for f in FUNCTIONS:
        for kind in KINDS:
            found = [
                torch.tensor([fit_critic(reference.feats, x, f, kind, steps=steps, seed=s).value for s in range(seeds)])
                for x in sets
            ]
            row: Row = {"f": f, "kind": kind}
            row |= {f"{k} calls": float(v.mean()) for k, v in zip(calls, found, strict=True)}
            row["sd over seeds"] = max(float(v.std()) for v in found) if seeds > 1 else None
            row["rank correlation"] = float(spearmanr(fid, [float(v.mean()) for v in found]).statistic)
            rows.append(row)
    table(rows)
    return rows


if __name__ == "__main__":
    main()
