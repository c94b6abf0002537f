r"""Critics on Fashion-MNIST: Table 6.1, Figure 6.2, masks of MaskedGAN, comparisons of critics, modes.

`divergences`: Table 6.1's question: which divergence ranks sets of samples as FID does? Images of the packaged network
at 4 to 20 calls, in the features of the packaged classifier, beside those of training images. For each pair of f and
kind a critic is fitted to halves and measured on the others (`fit_critic`), for three seeds of halves, critic and
batches. The rank correlation is Spearman's, of the means over seeds with FID.

The others are of small networks on images of 14 x 14 pixels. A GAN has two convolutions each in generator (44,000
parameters) and critic (9,000, spectral norm), batches of 32, Adam with a rate of 2e-4 and betas (0.5, 0.999), and the
critic moves first.

`bias`: batch estimates of the divergence that the critic is trained for, over the estimate whose means are of 3200
values (the thesis has 320), while it is trained; the mean of 100 batches of 32. For least squares the known bias gives
a second ratio.

`masks`: hinge GANs on few images, with masks on what the critic sees, in both turns or with another spatial share in
the generator's. The critic is twice as wide and has no spectral norm, so that it can learn 60 images by heart. "gap" is
its mean on training images less that on others, over the spread of the latter. The Frechet distance is between 1000
images and 5000 of the test split, both enlarged, in the packaged features. The Gini coefficient is that of the critic's
attention on training images. All are at the end; "best" is the least distance of three times.

`comparisons`: adversarial score matching with the six comparisons of `gan_losses` beside plain training: a perceptron
on VP that predicts x_0, the same critic, least squares and the published betas and weight. Distances as for `masks`, of
1000 samples with 10 calls.

`modes`: Table 8.4 with the trainings of `comparisons`, plain and with the plain comparison. Three images, drawn apart,
are the channels of one; the packaged classifier reads each channel of a sample, and the three classes are a mode. Modes
reached of 1000, and the Kullback-Leibler divergence of their shares to uniform ones; of stacked test images besides.
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
from common import RUNS, Book, Row, command, labels, pixels, trained

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
    keys, ratios = ("f", "kind", "seed", "step"), ("ratio", "ratio, known bias")
    book = Book(RUNS / f"gan_bias_{steps}_{every}_{batches}.csv", keys, ratios)
    for f, kind, seed in tqdm(list(itertools.product(LOSSES, KINDS, range(seeds))), disable=None):
        if (f, kind, str(seed), str(steps // every * every)) in book.rows:
            continue
        chosen = torch.Generator().manual_seed(100 + seed)
        for step, maker, judge in play(images, LOSSES[f](KINDS[kind]), steps, seed, every=every):
            with torch.no_grad():
                drawn = torch.randint(len(images), (batches * BATCH,), generator=chosen).split(500)
                z = torch.randn(batches * BATCH, LATENT, generator=chosen).split(500)
                x, y = torch.cat([judge(images[k]) for k in drawn]), torch.cat([judge(maker(part)) for part in z])
            pairs = list(zip(x.split(BATCH), y.split(BATCH), strict=True))

            def mean(estimator: str, f: str = f, kind: str = kind, pairs: list[tuple[Tensor, Tensor]] = pairs) -> float:
                return statistics.fmean(float(relativistic(a, b, f, kind, estimator)) for a, b in pairs)

            row: Row = {ratios[0]: mean("batch") / float(relativistic(x, y, f, kind)), ratios[1]: None}
            if f == "least squares":
                row[ratios[1]] = mean("batch") / mean("unbiased")
            book.need(lambda *_, row=row: row, f, kind, seed, step)
    for f, kind in itertools.product(LOSSES, KINDS):
        found = [row for row in book.rows.values() if (row["f"], row["kind"]) == (f, kind)]
        late = [row for row in found if int(row["step"]) > steps // 2]
        row = {"f": f, "kind": kind}
        for half, part in (("first", [r for r in found if r not in late]), ("second", late)):
            if part:
                row[f"{half} half"] = statistics.fmean(float(r["ratio"]) for r in part)
                row[f"{half} half, range"] = [g(float(r["ratio"]) for r in part) for g in (min, max)]
                if f == "least squares":
                    row[f"{half} half, known bias"] = statistics.fmean(float(r["ratio, known bias"]) for r in part)
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
    values, others = ("fid", "best fid", "gini", "gap"), small(data, train=False)[-1000:]
    book = Book(RUNS / f"gan_masks_{steps}.csv", ("n", "masks", "generator's share", "seed"), values)

    def run(n: int, name: str, share: float | None, seed: int) -> Row:
        images, found, last = everything[:n], list[float](), Row()
        other, every = share and dataclasses.replace(BOTH, space=share), max(1, steps // 3)
        options = {"masking": MASKS[name], "generator_masking": other, "wide": True}
        for _, maker, judge in play(images, hinge(), steps, seed, every=every, **options):
            with torch.no_grad():
                z = torch.randn(1000, LATENT, generator=torch.Generator().manual_seed(7))
                fake = torch.cat([maker(part) for part in z.split(500)])
                seen, unseen = judge(images[:1000]), judge(others)
            found.append(ruler(fake))
            last = {"gini": float(attention_gini(judge, images[:200]).mean())}
            last["gap"] = float((seen.mean() - unseen.mean()) / unseen.std())
        return {"fid": found[-1], "best fid": min(found)} | last

    jobs = [(*job, seed) for seed in range(seeds) for job in shares][: few or None]
    found = [book.need(run, *job) for job in tqdm(jobs, disable=None)]
    return [
        {"n": n, "masks": name, "generator's share": share, "seed": seed} | {key: float(row[key]) for key in values}
        for (n, name, share, seed), row in zip(jobs, found, strict=True)
    ]


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
    book = Book(RUNS / f"comparisons_{steps}_{samples}.csv", ("training", "seed"), ("fid",))

    def run(kind: str, seed: int) -> Row:
        model = matched(images, kind, steps, seed)
        return {"fid": ruler(fastsde.sample(model, n=samples, nfe=10, seed=1, batch_size=samples).samples)}

    kinds = (*ALONE, *COMPARISONS)
    rows: list[Row] = [
        {"training": kind} | {f"seed {seed}": float(book.need(run, kind, seed)["fid"]) for seed in range(seeds)}
        for kind in tqdm(kinds, disable=None)
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
    book = Book(RUNS / f"modes_{steps}_{samples}.csv", ("training", "seed"), ("modes", "KL"))

    def counted(x: Tensor) -> Row:
        logits = [network(part)[1] for part in enlarged(x.flatten(0, 1)[:, None]).split(600)]
        digits = torch.cat([part.argmax(1) for part in logits if part is not None]).view(-1, 3)
        counts = (digits @ torch.tensor([100, 10, 1])).bincount(minlength=1000).double()
        share = counts / counts.sum()
        return {"modes": int((counts > 0).sum()), "KL": float(torch.special.xlogy(share, 1000 * share).sum())}

    def run(kind: str, seed: int) -> Row:
        model = matched(images, kind, steps, seed)
        return counted(fastsde.sample(model, n=samples, nfe=10, seed=1, batch_size=1300).samples)

    for seed, kind in tqdm(list(itertools.product(range(seeds), (*ALONE, "plain"))), disable=None):
        book.need(run, kind, seed)
    real = counted(stacked(small(data, train=False), 1)[:samples])
    rows: list[Row] = [{"training": "test images", "seed": None} | real]
    for (kind, seed), row in book.rows.items():
        rows.append({"training": kind, "seed": int(seed), "modes": int(row["modes"]), "KL": float(row["KL"])})
    return rows


if __name__ == "__main__":
    main()
