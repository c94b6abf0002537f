"""Regularised latent optimisation on Fashion-MNIST: each term alone and all, beside the same calls spent on sampling.

The generator is a latent model: its score network with a few calls, and its decoder. Densities are those of
pictures averaged to 7 x 7; the likelihood is the logit of a critic of them, fitted to tell data from the generator's
samples. Samples are judged by the Frechet distance in the features of the packaged classifier and by the sliced
Wasserstein distance of whole pictures, which no term sees. "calls" are those of the score network for each image: a
step of the flow is a forward pass, its repetition in the backward pass, and that pass, counted as two. The bank's calls
are shared out over the images.
"""

from __future__ import annotations

import time

import click
import torch
from common import Row, command, fid, table
from torch import Tensor, nn
from tqdm import tqdm

import fastsde
from fastsde.evaluation.statistics import sliced_wasserstein
from fastsde.latent import LatentFlow, sampler_map
from fastsde.training.data import load_images, to_unit_range

TERMS = {
    "log p(x)": (1.0, 0.0, 0.0),
    "log p(y | x)": (0.0, 1.0, 0.0),
    "- log q(x)": (0.0, 0.0, 1.0),
    "log p(x) - log q(x)": (1.0, 0.0, 1.0),
    "all": (1.0, 1.0, 1.0),
}


def pooled(x: Tensor) -> Tensor:
    """Averages over squares of 4 x 4 pixels, with shape (B, 49)."""
    return nn.functional.avg_pool2d(x, 4).flatten(1)


def critic(real: Tensor, fake: Tensor, steps: int) -> nn.Module:
    """A network whose value is the logit of a picture being real; fitted to pooled pictures."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(49, 64), nn.SiLU(), nn.Linear(64, 1))
    rule = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-4)
    real, fake = pooled(real), pooled(fake)
    for _ in range(steps):
        softplus = nn.functional.softplus
        loss = softplus(-network(real)).mean() + softplus(network(fake)).mean()
        rule.zero_grad()
        loss.backward()
        rule.step()
    return network.requires_grad_(False)


@command(__doc__, "latent_flow", samples=140, bank=64, calls=3, steps=(1,), seeds=1)
@click.option("--data", type=click.Path(exists=True), required=True, help="Folder of Fashion-MNIST.")
@click.option("--model", "name", default="fashion-mnist-latent", help="A packaged latent model, or a folder of one.")
@click.option("--samples", "-n", default=1000, help="Images of a row.")
@click.option("--bank", default=256, help="Particles.")
@click.option("--calls", default=4, help="Of the generator's solver.")
@click.option("--steps", type=int, multiple=True, default=(5, 10, 15), help="Of the flow.")
@click.option("--step-size", default=0.3)
@click.option("--seeds", default=2)
def main(
    data: str, name: str, samples: int, bank: int, calls: int, steps: tuple[int, ...], step_size: float, seeds: int
) -> list[Row]:
    """Prints the table."""
    model = fastsde.pretrained(name)
    images = load_images(data)[0]
    real, held = to_unit_range(images[:1000]), to_unit_range(images[1000 : 1000 + samples])
    few = sampler_map(model, nfe=calls)

    def generator(z: Tensor) -> Tensor:
        return model.decode(few(z), batch_size=len(z))

    def judged(x: Tensor) -> tuple[float, float]:
        return fid(x), sliced_wasserstein(x.flatten(1), held.flatten(1))

    rows: list[Row] = []

    def note(what: str, flow_steps: int | None, spent: float, drawn: list[Tensor], seconds: float) -> None:
        distances = torch.tensor([judged(x) for x in drawn])
        row: Row = {"what": what, "steps": flow_steps, "calls": spent, "seconds": seconds}
        for k, name in enumerate(("fid", "sliced")):
            row[name] = float(distances[:, k].mean())
            row[f"{name}_sd"] = float(distances[:, k].std()) if len(drawn) > 1 else None
        rows.append(row)

    fitted = fastsde.fit(model, nfe=calls, progress=False)
    bound = (1 + 4 * max(steps)) * calls
    for nfe in (calls, 2 * calls, 4 * calls, bound):
        began = time.perf_counter()
        drawn = [model.decode(fastsde.sample(model, n=samples, nfe=nfe, seed=s).samples) for s in range(seeds)]
        note(f"{nfe} calls", None, nfe, drawn, time.perf_counter() - began)
    drawn = [model.decode(fastsde.sample(model, n=samples, solver=fitted, seed=s).samples) for s in range(seeds)]
    note(f"fitted, {calls} calls", None, calls, drawn, 0.0)

    start = model.decode(fastsde.sample(model, n=1000, nfe=calls, seed=100).samples)
    judge = critic(real, start, steps=300)
    bar = tqdm(total=len(TERMS) * len(steps), desc="terms", disable=None)
    for what, weights in TERMS.items():
        for k in steps:
            began, drawn = time.perf_counter(), []
            flow = LatentFlow(
                generator,
                real,
                model.event_shape or (),
                features=pooled,
                log_likelihood=lambda x: judge(pooled(x))[:, 0],
                weights=weights,
                step_size=step_size,
                steps=k,
                bank=bank,
            )
            spent = 0.0
            for seed in range(seeds):
                r = flow.sample(samples, seed=seed)
                drawn.append(r.samples)
                forward = r.forward.double().mean() + r.bank_forward / samples
                backward = r.backward.double().mean() + r.bank_backward / samples
                spent = calls * float(forward + 3 * backward)
            note(what, k, spent, drawn, time.perf_counter() - began)
            bar.update()
    table(rows)
    return rows


if __name__ == "__main__":
    main()
