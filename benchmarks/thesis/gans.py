r"""Critics on Fashion-MNIST: Table 6.1, Figure 6.2, masks of MaskedGAN, comparisons of critics, modes.

docs/measured/training.md has the settings.

`divergences`: which divergence ranks sets of samples as FID does? Images of the packaged network at 4 to 20 calls, in
the features of the packaged classifier. For each pair of f and kind a critic is fitted to halves and measured on the
others (`fit_critic`), for three seeds. The rank correlation is Spearman's, of the means over seeds with FID.

The others are of small networks on images of 14 x 14 pixels; their Frechet distance is between 1000 images and 5000 of
the test split, both enlarged, in the packaged features.

`bias`: batch estimates of the divergence that a critic is trained for, over the estimate whose means are of 3200
values (the thesis has 320); the mean of 100 batches of 32. For least squares the known bias gives a second ratio.
`masks`: hinge GANs on few images, with masks on what the critic sees, in both turns or with another spatial share in
the generator's. "gap" is the critic's mean on training images less that on others, over the spread of the latter; the
Gini coefficient is that of its attention on training images.
`comparisons`: adversarial score matching with the six comparisons of `gan_losses` beside plain training: a perceptron
on VP that predicts x_0, the same critic, least squares and the published betas and weight.
`modes`: Table 8.4 with trainings of `comparisons`. Three images, drawn apart, are the channels of one; the packaged
classifier reads each channel, and the three classes are a mode of 1000.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, command, labels, pixels, trained

import fastsde
from fastsde.evaluation.divergence import FUNCTIONS, fit_critic, relativistic
from fastsde.evaluation.divergence import KINDS as ALL_KINDS
from fastsde.evaluation.features import open_features
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import frechet
from fastsde.training.adversarial import Adversary
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images, to_unit_range
from fastsde.training.gan_losses import (
    GANLoss,
    all_pairs,
    average,
    centred,
    hinge,
    lsgan,
    one_way,
    paired,
    plain,
    sgan,
)
from fastsde.training.masking import Masking, attention_gini
from fastsde.training.networks import MLP

LATENT, BATCH = 32, 32
LOSSES = {"least squares": lsgan, "log": sgan, "hinge": hinge}
KINDS = {"average": average, "centred": centred}
COMPARISONS = {"plain": plain, "paired": paired, "all pairs": all_pairs, "one way": one_way} | KINDS
ALONE = ("no critic", "no critic, no momentum")
BOTH = Masking(bands=16)
MASKS = {
    "none": None,
    "cutout": dataclasses.replace(BOTH, spectrum=0.0, shape="square"),
    "patches, not shifted": dataclasses.replace(BOTH, spectrum=0.0, shape="fixed patches"),
    "patches": dataclasses.replace(BOTH, spectrum=0.0),
    "bands, uniform": dataclasses.replace(BOTH, space=0.0, balanced=False),
    "bands": dataclasses.replace(BOTH, space=0.0),
    "patches and bands": BOTH,
}

main = click.Group(help=__doc__)


@command("divergences", main, samples=140, calls=(4, 20), seeds=1, steps=5)
def divergences(
    samples: int = 1000, calls: tuple[int, ...] = (4, 5, 6, 8, 12, 20), seeds: int = 3, steps: int = 300
) -> list[Row]:
    """Which divergence ranks sets of samples as FID does?"""
    model, network = fastsde.pretrained("fashion-mnist"), open_features("fashion-mnist")
    reference = packaged_reference("fashion-mnist")
    sets, fid = [], []
    for nfe in tqdm(calls, "calls", disable=None):
        r = fastsde.sample(model, n=samples, nfe=nfe, seed=1, cond=labels(samples))
        sets.append(network.of(pixels(r.samples).split(500))[0])
        fid.append(frechet(sets[-1], reference.mean, reference.covariance).value)
    rows: list[Row] = [{"f": "FID", "kind": "", **{f"{k} calls": v for k, v in zip(calls, fid, strict=True)}}]
    for f, kind in itertools.product(FUNCTIONS, ALL_KINDS):
        found = [
            torch.tensor([fit_critic(reference.feats, x, f, kind, steps=steps, seed=s).value for s in range(seeds)])
            for x in sets
        ]
        row: Row = {"f": f, "kind": kind}
        row |= {f"{k} calls": float(v.mean()) for k, v in zip(calls, found, strict=True)}
        row["sd over seeds"] = max(float(v.std()) for v in found) if seeds > 1 else None
        row["rank correlation"] = float(spearmanr(fid, [float(v.mean()) for v in found]).statistic)
        rows.append(row)
    return rows


def generator_network() -> nn.Sequential:
    """From (B, LATENT) to (B, 1, 14, 14)."""
    return nn.Sequential(
        nn.Linear(LATENT, 24 * 49),
        nn.Unflatten(1, (24, 7, 7)),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 4, 2, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 1, 3, padding=1),
        nn.Tanh(),
    )


def critic_network(width: int = 16, channels: int = 1, *, bounded: bool = True) -> nn.Sequential:
    """From (B, channels, 14, 14) to (B,); bounded by spectral norm."""
    layers = (nn.Conv2d(channels, width, 4, 2, 1), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.Linear(2 * width * 9, 1))
    first, second, last = map(spectral_norm, layers) if bounded else layers
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), nn.Flatten(), last, nn.Flatten(0))


def small(data: Path, *, train: bool) -> Tensor:
    """Images with shape (n, 1, 14, 14), each pixel the mean of four."""
    return avg_pool2d(to_unit_range(load_images(data, train=train)[0]), 2)


def enlarged(x: Tensor) -> Tensor:
    """8-bit images with shape (n, 1, 28, 28), of (n, 1, 14, 14)."""
    whole = x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return whole.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Ruler:
    """The Frechet distance to 5000 images of the test split, all enlarged to 28 x 28, in the packaged features."""

    def __init__(self, data: Path) -> None:
        self.network = open_features("fashion-mnist")
        held_out = self.features(small(data, train=False)[:5000])
        self.mean, self.covariance = held_out.mean(0), held_out.T.cov()

    def features(self, x: Tensor) -> Tensor:
        """With shape (n, d)."""
        return torch.cat([self.network(part)[0] for part in enlarged(x).split(500)]).double()

    def __call__(self, x: Tensor) -> float:
        return frechet(self.features(x), self.mean, self.covariance, draws=2).value


class Flat(nn.Module):
    """A perceptron on images, of denoised samples in (-1, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.network = MLP(196 * channels, width=384, depth=3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """From (B, channels, 14, 14) and (B,) to (B, channels, 14, 14)."""
        return self.network(x.flatten(1), t).reshape(x.shape).tanh()


def play(
    images: Tensor,
    loss: GANLoss,
    steps: int,
    seed: int,
    *,
    wide: bool = False,
    masking: Masking | None = None,
    generator_masking: Masking | None = None,
    every: int,
) -> Iterator[tuple[int, nn.Module, nn.Module]]:
    """Trains a generator and a critic, the critic first, and gives both after every so many steps.

    A wide critic has no spectral norm.
    """
    torch.manual_seed(seed)
    maker, judge = generator_network(), critic_network(32, bounded=False) if wide else critic_network()
    rules = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (judge, maker)]
    draws = torch.Generator().manual_seed(seed)

    def values(x: Tensor, real: Tensor, mask: Masking | None) -> Tensor:
        found: Tensor = judge(x if mask is None else mask(x, real, draws))
        return found

    for step in range(1, steps + 1):
        for turn, (network, rule, mask) in enumerate(
            zip((judge, maker), rules, (masking, generator_masking or masking), strict=True)
        ):
            real = images[torch.randint(len(images), (BATCH,), generator=draws)]
            fake = maker(torch.randn(BATCH, LATENT, generator=draws))
            of_fake = values(fake if turn else fake.detach(), real, mask)
            unused = turn and loss.compare is plain
            of_real = torch.zeros(BATCH) if unused else values(real, real, mask)
            value = loss.generator(of_real, of_fake) if turn else loss.discriminator(of_real, of_fake)
            network.zero_grad()
            value.backward()
            rule.step()
        if step % every == 0:
            for network in (maker, judge):
                network.eval()
            yield step, maker, judge
            for network in (maker, judge):
                network.train()


@command("gan_bias", main, steps=2, seeds=1, every=2)
def bias(data: Path, steps: int = 1000, every: int = 100, seeds: int = 2, batches: int = 100) -> list[Row]:
    """How biased are batch estimates of relativistic divergences?"""
    images, rows = small(data, train=True), list[Row]()
    ratios: dict[tuple[str, str], list[tuple[int, float, float | None]]] = {}
    for f, kind, seed in tqdm(list(itertools.product(LOSSES, KINDS, range(seeds))), disable=None):
        chosen = torch.Generator().manual_seed(100 + seed)
        for step, maker, judge in play(images, LOSSES[f](KINDS[kind]), steps, seed, every=every):
            with torch.no_grad():
                drawn = torch.randint(len(images), (batches * BATCH,), generator=chosen).split(500)
                z = torch.randn(batches * BATCH, LATENT, generator=chosen).split(500)
                x, y = torch.cat([judge(images[k]) for k in drawn]), torch.cat([judge(maker(part)) for part in z])
            pairs = list(zip(x.split(BATCH), y.split(BATCH), strict=True))

            def mean(estimator: str, f: str = f, kind: str = kind, pairs: list[tuple[Tensor, Tensor]] = pairs) -> float:
                return statistics.fmean(float(relativistic(a, b, f, kind, estimator)) for a, b in pairs)

            known = mean("batch") / mean("unbiased") if f == "least squares" else None
            ratio = mean("batch") / float(relativistic(x, y, f, kind))
            ratios.setdefault((f, kind), []).append((step, ratio, known))
    for (f, kind), found in ratios.items():
        row: Row = {"f": f, "kind": kind}
        for half, late in (("first half", False), ("second half", True)):
            if part := [one for one in found if (one[0] > steps // 2) == late]:
                _, each, known = zip(*part, strict=True)
                row |= {half: statistics.fmean(each), f"{half}, range": [min(each), max(each)]}
                row |= {f"{half}, known bias": statistics.fmean(known)} if f == "least squares" else {}
        rows.append(row)
    return rows


@command("gan_masks", main, steps=2, sizes=[600], seeds=1, few=1)
def masks(
    data: Path, steps: int = 800, seeds: int = 3, sizes: tuple[int, ...] = (60, 600, 6000), few: int = 0
) -> list[Row]:
    """Do masks help with few images?"""
    ruler, everything = Ruler(data), small(data, train=True)
    shares: list[tuple[int, str, float | None]] = [(n, name, None) for n in sizes for name in MASKS]
    shares += [(sizes[0], "patches and bands", share) for share in (0.05, 0.45, 0.15, 0.35)]
    others = small(data, train=False)[-1000:]

    def run(n: int, name: str, share: float | None, seed: int) -> Row:
        images, other = everything[:n], share and dataclasses.replace(BOTH, space=share)
        options = {"masking": MASKS[name], "generator_masking": other, "wide": True}
        [(_, maker, judge)] = play(images, hinge(), steps, seed, every=steps, **options)
        with torch.no_grad():
            z = torch.randn(1000, LATENT, generator=torch.Generator().manual_seed(7))
            fake = torch.cat([maker(part) for part in z.split(500)])
            seen, unseen = judge(images[:1000]), judge(others)
            gap = float((seen.mean() - unseen.mean()) / unseen.std())
        row: Row = {"n": n, "masks": name, "generator's share": share, "seed": seed, "fid": ruler(fake)}
        return row | {"gini": float(attention_gini(judge, images[:200]).mean()), "gap": gap}

    jobs = [(*job, seed) for seed in range(seeds) for job in shares][: few or None]
    return [run(*job) for job in tqdm(jobs, disable=None)]


def matched(images: Tensor, kind: str, steps: int, seed: int) -> fastsde.ScoreModel:
    """A perceptron on VP, trained alone or with the critic of a comparison."""
    torch.manual_seed(seed)
    shape, adversary = tuple(images.shape[1:]), None
    model = fastsde.ScoreModel(Flat(shape[0]), fastsde.VPSDE(), "sample", event_shape=shape)
    if kind in COMPARISONS:
        critic = critic_network(channels=shape[0])
        adversary = Adversary(critic, lsgan(COMPARISONS[kind]), learning_rate=4e-4)
    betas = (0.9, 0.999) if kind == "no critic" else (0.0, 0.9)
    # The adversarial loss has half of the sum over elements where the plain one has the mean.
    clip = images[0].numel() / 2 if adversary else 1.0
    config = TrainConfig(
        steps, 64, 1e-3, ema_decay=0.99, betas=betas, seed=seed, bf16=False, grad_clip=clip, warmup=100
    )
    return trained(model, images, config, adversary)


@command("comparisons", main, steps=2, seeds=1, samples=140)
def comparisons(data: Path, steps: int = 600, seeds: int = 3, samples: int = 1000) -> Row:
    """Which comparison does adversarial score matching want?"""
    images, ruler = small(data, train=True), Ruler(data)

    def run(kind: str, seed: int) -> float:
        model = matched(images, kind, steps, seed)
        return ruler(fastsde.sample(model, n=samples, nfe=10, seed=1, batch_size=samples).samples)

    rows: list[Row] = [
        {"training": kind} | {f"seed {seed}": run(kind, seed) for seed in range(seeds)}
        for kind in tqdm((*ALONE, *COMPARISONS), disable=None)
    ]
    return {"real_images": ruler(images[:samples]), "rows": rows}


def stacked(images: Tensor, seed: int) -> Tensor:
    """As many images of three channels, each channel an image, in another order each."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.cat([images[torch.randperm(len(images), generator=drawn)] for _ in range(3)], 1)


@command("modes", main, steps=2, seeds=1, samples=200)
def modes(data: Path, steps: int = 1500, seeds: int = 3, samples: int = 5200) -> list[Row]:
    """Does an adversary lose modes?"""
    images, network = stacked(small(data, train=True), 0), open_features("fashion-mnist")

    def counted(x: Tensor) -> Row:
        logits = [network(part)[1] for part in enlarged(x.flatten(0, 1)[:, None]).split(600)]
        digits = torch.cat([part.argmax(1) for part in logits if part is not None]).view(-1, 3)
        counts = (digits @ torch.tensor([100, 10, 1])).bincount(minlength=1000).double()
        share = counts / counts.sum()
        return {"modes": int((counts > 0).sum()), "KL": float(torch.special.xlogy(share, 1000 * share).sum())}

    real = counted(stacked(small(data, train=False), 1)[:samples])
    rows: list[Row] = [{"training": "test images", "seed": None} | real]
    for seed, kind in tqdm(list(itertools.product(range(seeds), (*ALONE, "plain"))), disable=None):
        model = matched(images, kind, steps, seed)
        x = fastsde.sample(model, n=samples, nfe=10, seed=1, batch_size=1300).samples
        rows.append({"training": kind, "seed": seed} | counted(x))
    return rows


if __name__ == "__main__":
    main()
