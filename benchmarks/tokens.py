r"""Masked tokens: a tolerance beside fixed steps on exact laws and on images, and what a critic buys.

Images are Fashion-MNIST as 7 x 7 tokens of a learned book of 64 codes. `FID` is to the decoded tokens of the training
images, with the packaged features, so what the code book loses is not in it. `pairs` is KL(data || samples) of the
tokens of neighbours, pooled over positions, in nats; `entropy` the mean entropy of the tokens of one position. Both
have their value for held-out data, as many as there are samples.

`images` trains code book, generator and critic if runs/tokens is not there: half an hour on one core. Then also

    fastsde sample --model benchmarks/runs/tokens --solver TokenCritic -o scale=10 --nfe 35
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import torch
from common import RUNS, Row, command, described, labels, pixels
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde import tokens
from fastsde.evaluation.features import open_features
from fastsde.evaluation.statistics import Moments, frechet_distance
from fastsde.tokens.networks import CodeBook, TokenTransformer
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images, to_unit_range
from fastsde.training.tokens import train_tokens

CODES, SIDE, CLASSES = 64, 7, 10
SCHEDULES = {"linear": tokens.LINEAR, "sine": tokens.SINE}
TUNING_SEED, SEEDS = 9, (0, 1, 2)
TEMPERATURES, SCALES = (1.0, 4.5, 10.0), (0.0, 1.0, 3.0, 10.0, 30.0)
RTOLS = (0.1, 0.3, 0.5)

main = click.Group(help=__doc__)


def train_book(images: Tensor, steps: int) -> CodeBook:
    """The code book: Adam with a rate that falls linearly, codes that start at vectors of images."""
    torch.manual_seed(0)
    book = CodeBook(CODES)
    with torch.no_grad():
        vectors = book.encoder(images[:2000]).movedim(1, -1).flatten(0, -2)
        book.codes.copy_(vectors[torch.randperm(len(vectors))[:CODES]])
    optimizer = torch.optim.Adam(book.parameters(), 2e-3)
    for step in tqdm(range(steps), "code book", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 1.2 * (steps - step) / steps)
        loss = book.loss(images[torch.randint(len(images), (128,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return book.eval()


def encoded(book: CodeBook, images: Tensor) -> Tensor:
    """Tokens of images, with shape (n, 7, 7)."""
    return torch.cat([book.encode(part) for part in images.split(1000)])


def train(data: Path, folder: Path, book_steps: int, steps: int, critic_steps: int) -> None:
    """Trains code book, generator and critic, and keeps all in a folder."""
    images, labels = load_images(data)
    book = train_book(images := to_unit_range(images), book_steps)
    x, default = encoded(book, images), {"class_labels": torch.tensor(CLASSES)}
    parts = []
    for outputs in (None, 1):
        torch.manual_seed(1)
        parts.append(TokenTransformer(CODES, SIDE**2, classes=CLASSES, outputs=outputs, width=64, depth=4, heads=4))
    generator, judge = parts
    model = tokens.TokenModel(generator, CODES, event_shape=(SIDE, SIDE), default_cond=default)
    with tempfile.TemporaryDirectory() as kept:
        config = TrainConfig(steps, 64, 2e-3, warmup=100, ema_decay=0.998, bf16=False)
        model.network = generator = train_tokens(model, x, labels, config, Path(kept) / "generator")
        # From new weights its loss stays at ln 2 for 1000 steps; what the generator has learned shows what is odd.
        body = {k: v for k, v in generator.state_dict().items() if not k.startswith("head")}
        judge.load_state_dict(body, strict=False)
        config = dataclasses.replace(config, steps=critic_steps, learning_rate=1e-3, seed=1)
        critic = tokens.Critic(judge, (SIDE, SIDE))
        judge = train_tokens(model, x, labels, config, Path(kept) / "critic", critic=critic)
    tokens.save_tokens(folder, generator, (SIDE, SIDE), critic=judge, book=book)


class Judge:
    """What is measured of tokens, beside those of the training images."""

    def __init__(self, book: CodeBook, images: Tensor) -> None:
        self.book, self.features = book, open_features("fashion-mnist")
        tokens_of = encoded(book, images)
        moments = Moments.of(self._features(tokens_of))
        self.mean, self.covariance = moments.mean, moments.covariance
        self.pairs = self._pairs(tokens_of) / self._pairs(tokens_of).sum()

    def _features(self, x: Tensor) -> Tensor:
        return self.features.of(pixels(self.book.decode(part)) for part in x.split(500))[0]

    def _pairs(self, x: Tensor) -> Tensor:
        """How often two tokens are neighbours, to the right or below, with shape (K, K) each."""
        both = ((x[:, :, :-1], x[:, :, 1:]), (x[:, :-1], x[:, 1:]))
        counts = [torch.bincount((CODES * a + b).flatten(), minlength=CODES**2) for a, b in both]
        return torch.stack(counts).double()

    def __call__(self, x: Tensor) -> Row:
        moments = Moments.of(self._features(x))
        counts = self._pairs(x) + 0.5  # so that no pair is impossible
        law = counts / counts.sum()
        places = torch.nn.functional.one_hot(x.flatten(1), CODES).double().mean(0)
        return {
            "fid": frechet_distance(self.mean, self.covariance, moments.mean, moments.covariance),
            "pairs": float((torch.special.xlogy(self.pairs, self.pairs / law)).sum()),
            "entropy": float(torch.special.entr(places).sum(1).mean()),
        }


@command("tokens", main, n=20, folder=RUNS / "quick_tokens", book_steps=2, steps=2, critic_steps=2)
def images(
    data: Path,
    n: int = 400,
    folder: Path = RUNS / "tokens",
    book_steps: int = 1500,
    steps: int = 4000,
    critic_steps: int = 1200,
) -> Row:
    """Solvers on images: FID, pairs, entropy at some 36 calls; tolerances beside fixed steps."""
    if not folder.exists():
        train(data, folder, book_steps, steps, critic_steps)
    opened, rows = tokens.load_tokens(folder), list[Row]()
    judge = Judge(opened.book, to_unit_range(load_images(data)[0][: 50 * n]))
    real = encoded(opened.book, to_unit_range(load_images(data, train=False)[0][: len(SEEDS) * n]))
    for seed in SEEDS:
        row: Row = {"part": "floor", "solver": "held-out data", "schedule": "", "seed": seed, "calls": 0}
        rows.append(row | judge(real[seed * n : (seed + 1) * n]))

    def run(part: str, solver: tokens.TokenSolver, schedule: str, seeds: tuple[int, ...] = SEEDS) -> list[Row]:
        opened.model.process = tokens.Masking(SCHEDULES[schedule])
        name = described_solver(solver)
        for seed in tqdm(seeds, f"{part} {name}", disable=None):
            options = {"solver": solver, "seed": seed, "cond": labels(n), "batch_size": 250}
            result = fastsde.sample(opened.model, n=n, **options)
            row: Row = {"part": part, "solver": name, "schedule": schedule, "seed": seed}
            rows.append(row | {"calls": float(result.nfe.double().mean())} | judge(result.samples))
        return rows[-len(seeds) :]

    def tuned(part: str, solvers: list[tokens.TokenSolver]) -> tokens.TokenSolver:
        return min(solvers, key=lambda solver: run(part, solver, "sine", (TUNING_SEED,))[0]["fid"])

    gits = [tokens.Unmask("confidence", steps=36, choice_temperature=t) for t in TEMPERATURES]
    git = tuned("tuning MaskGIT", gits)
    critics = [tokens.TokenCritic(opened.critic, steps=18, scale=s) for s in SCALES]
    run("solvers", tuned("tuning critic", critics), "sine")
    run("solvers", git, "sine")
    run("solvers", plain := tokens.Unmask("random", steps=36), "linear")
    run("solvers", dataclasses.replace(git, steps=18), "sine")
    for rtol in RTOLS:
        own = run("tolerance", tokens.EntropyBudget(rtol, "random"), "linear")
        steps = round(statistics.mean(row["calls"] for row in own))
        run("fixed", dataclasses.replace(plain, steps=steps), "linear")
    run("solvers", tokens.Unmask("entropy", steps=36), "linear")
    run("solvers", tokens.ReMDM(tokens.Cap(0.04), steps=36), "linear")
    run("solvers", tokens.Unmask("halton", steps=36), "sine")
    run("solvers", tokens.FirstHitting(), "linear")
    return {"n": n, "rows": rows}


def described_solver(solver: tokens.TokenSolver) -> str:
    """The solver as it was called; of a critic what is set beside it."""
    if isinstance(solver, tokens.TokenCritic):
        return f"TokenCritic(steps={solver.steps}, scale={solver.scale:g})"
    if isinstance(solver, tokens.EntropyBudget):
        return f"EntropyBudget(rtol={solver.rtol:g}, order={solver.order})"
    return described(solver).replace("'", "")


def random_table(seed: int) -> Tensor:
    """A law without structure: a weight for each sequence. What is known makes the rest depend on each other more."""
    torch.manual_seed(seed)
    return torch._standard_gamma(torch.full((3,) * 5, 0.4, dtype=torch.float64))


def random_chain(seed: int) -> Tensor:
    """A Markov chain: what is known separates the rest."""
    torch.manual_seed(seed)
    move = torch._standard_gamma(torch.full((4, 3, 3), 0.4, dtype=torch.float64)) + 1e-3
    law = torch.full((3,), 1 / 3, dtype=torch.float64)
    for step in move / move.sum(-1, keepdim=True):
        law = law[..., None] * step
    return law


@command("tokens_exact", main, laws=1, n=1000)
def exact(laws: int = 5, n: int = 20_000) -> list[Row]:
    """A tolerance beside fixed steps on enumerated laws: KL(data || samples) against mean calls."""
    rows = []
    cells: list[tuple[str, Callable[..., tokens.TokenSolver], float]] = []
    cells += [("tolerance", lambda r: tokens.EntropyBudget(r), r) for r in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)]
    cells += [("fixed", lambda k: tokens.Unmask("entropy", steps=k), k) for k in (1, 2, 3, 4, 5)]
    for (kind, make, setting), of in itertools.product(cells, (random_table, random_chain)):
        lost, bounds, calls = [], [], []
        for seed in range(laws):
            model = tokens.ExactTokens(of(seed))
            result = fastsde.sample(model, n=n, batch_size=n, solver=make(setting), seed=seed)
            law = (model.law(result.samples) * n + 0.5) / (n + 0.5 * model.joint.numel())
            # The estimate is too high by half the cells a sample.
            bias = (model.joint.numel() - 1) / (2 * n)
            lost.append(float(torch.special.xlogy(model.joint, model.joint / law).sum()) - bias)
            bounds.append(float(result.report["bound"].mean()) if result.report else float("nan"))
            calls.append(float(result.nfe.double().mean()))
        bound = statistics.mean(bounds)
        rows.append(
            {
                "law": of.__name__.replace("random_", ""),
                "rule": kind,
                "setting": setting,
                "calls": round(statistics.mean(calls), 2),
                "KL": round(statistics.mean(lost), 4),
                "bound": round(bound, 4) if bound == bound else None,
            }
        )
    return rows


if __name__ == "__main__":
    main()
