r"""Masked tokens: a tolerance beside fixed steps on exact laws and on images, and what a critic buys.

Images are Fashion-MNIST as 7 x 7 tokens of a learned book of 64 codes: with few-level pixels at 14 x 14 a call costs
four times as much, and the floor of FID is that of the small images. `FID` is to the decoded tokens of the training
images, with the packaged features, so what the code book loses is not in it. `pairs` is KL(data || samples) of the
tokens of neighbours, pooled over positions, in nats; `entropy` the mean entropy of the tokens of one position. Both
have their value for held-out data, as many as there are samples.

    python benchmarks/tokens.py train --data FOLDER    # code book, generator, critic: half an hour on one core
    fastsde sample --model benchmarks/runs/tokens/model --solver TokenCritic -o scale=10 --nfe 35
    python benchmarks/tokens.py images --data FOLDER
    python benchmarks/tokens.py exact
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import RESULTS, RUNS, Book, Row, command, described, pixels
from safetensors.torch import load_file, save_file
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

FOLDER, QUICK = RUNS / "tokens", RUNS / "quick_tokens"
CODES, SIDE, CLASSES = 64, 7, 10
SIZE = {"width": 64, "depth": 4, "heads": 4}

main = click.Group(help=__doc__)


def train_book(images: Tensor, steps: int) -> CodeBook:
    """The code book: Adam with a rate that falls linearly, codes that start at vectors of images."""
    torch.manual_seed(0)
    book = CodeBook(CODES)
    with torch.no_grad():
        vectors = book.encoder(images[:2000]).movedim(1, -1).flatten(0, -2)
        book.codes.copy_(vectors[torch.randperm(len(vectors))[:CODES]])
    optimizer = torch.optim.Adam(book.parameters(), 2e-3)
    bar = tqdm(range(steps), "code book", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 1.2 * (steps - step) / steps)
        loss = book.loss(images[torch.randint(len(images), (128,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return book.eval()


def network(outputs: int | None = None) -> TokenTransformer:
    """The generator, or with one output the critic, with random weights."""
    torch.manual_seed(1)
    return TokenTransformer(CODES, SIDE**2, classes=CLASSES, outputs=outputs, **SIZE)


def model_of(generator: TokenTransformer, schedule: tokens.Schedule = tokens.LINEAR) -> tokens.TokenModel:
    """The generator as it was trained."""
    default = {"class_labels": torch.tensor(CLASSES)}
    shape = (SIDE, SIDE)
    process = tokens.Masking(schedule)
    return tokens.TokenModel(generator, CODES, event_shape=shape, process=process, default_cond=default)


def critic_of(critic: TokenTransformer) -> tokens.Critic:
    """The critic as it was trained."""
    return tokens.Critic(critic, event_shape=(SIDE, SIDE))


def encoded(book: CodeBook, images: Tensor) -> Tensor:
    """Tokens of images, with shape (n, 7, 7)."""
    return torch.cat([book.encode(part) for part in images.split(1000)])


def loaded(module: torch.nn.Module, file: Path) -> torch.nn.Module:
    """A trained part of these."""
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is missing: python benchmarks/tokens.py train --data FOLDER makes it.")
    module.load_state_dict(load_file(file))
    return module.eval()


@command(None, main, book_steps=2, steps=2, critic_steps=2, folder=QUICK)
def train(
    data: Path, book_steps: int = 1500, steps: int = 4000, critic_steps: int = 1200, folder: Path = FOLDER
) -> None:
    """Trains code book, generator and critic; what is there is kept, and a training goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_images(data)
    images = to_unit_range(images)
    files = {name: folder / f"{name}.safetensors" for name in ("book", "generator", "critic")}
    if not files["book"].exists():
        save_file(train_book(images, book_steps).state_dict(), files["book"])
    x = encoded(loaded(CodeBook(CODES), files["book"]), images)

    def fitted(name: str, count: int, net: TokenTransformer, critic: tokens.Critic | None) -> None:
        if files[name].exists():
            return
        checkpoint = folder / f"{name}-training.safetensors"
        model = model_of(loaded(network(), files["generator"]) if critic else net)
        if critic is not None:
            # From new weights its loss stays at ln 2 for 1000 steps; what the generator has learned shows what is odd.
            body = {k: v for k, v in model.network.state_dict().items() if not k.startswith("head")}
            net.load_state_dict(body, strict=False)
        rate = 1e-3 if critic else 2e-3
        config = TrainConfig(count, 64, rate, warmup=100, ema_decay=0.998, seed=1 if critic else 0, bf16=False)
        averaged = train_tokens(model, x, labels, config, checkpoint, critic=critic, resume=checkpoint.exists())
        save_file(averaged.state_dict(), files[name])

    fitted("generator", steps, network(), None)
    fitted("critic", critic_steps, net := network(1), critic_of(net))
    parts = {"critic": loaded(network(1), files["critic"]), "book": loaded(CodeBook(CODES), files["book"])}
    tokens.save_tokens(folder / "model", loaded(network(), files["generator"]), (SIDE, SIDE), **parts)


KEYS = ("part", "solver", "schedule", "seed")
VALUES = ("calls", "most", "fid", "pairs", "entropy", "histogram")
SCHEDULES = {"linear": tokens.LINEAR, "sine": tokens.SINE}
TUNING_SEED, SEEDS = 9, (0, 1, 2)
TEMPERATURES, SCALES = (1.0, 4.5, 10.0), (0.0, 1.0, 3.0, 10.0, 30.0)
RTOLS = (0.1, 0.3, 0.5)


class Judge:
    """What is measured of tokens, beside those of the training images."""

    def __init__(self, book: CodeBook, images: Tensor) -> None:
        self.book, self.features = book, open_features("fashion-mnist")
        tokens_of = encoded(book, images)
        features = self._features(tokens_of)
        self.mean, self.covariance = (moments := Moments.of(features)).mean, moments.covariance
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


@command("tokens", main, n=100, folder=QUICK, book=QUICK / "tokens.csv")
def images(data: Path, n: int = 400, folder: Path = FOLDER, book: Path = RESULTS / "tokens.csv") -> Row:
    """Solvers on images: FID, pairs, entropy at some 36 calls; tolerances beside fixed steps."""
    rows, codes = Book(book, KEYS, VALUES), loaded(CodeBook(CODES), folder / "book.safetensors")
    judge = Judge(codes, to_unit_range(load_images(data)[0][:20_000]))
    real = encoded(codes, to_unit_range(load_images(data, train=False)[0]))
    generator = loaded(network(), folder / "generator.safetensors")
    critic = critic_of(loaded(network(1), folder / "critic.safetensors"))

    def held_out(*key: Any) -> Row:
        return {"calls": 0, "most": 0, "histogram": ""} | judge(real[key[-1] * n : (key[-1] + 1) * n])

    def run(part: str, solver: tokens.TokenSolver, schedule: str, seeds: tuple[int, ...] = SEEDS) -> list[Row]:
        def measured(_: str, __: str, schedule: str, seed: int) -> Row:
            options = {"solver": solver, "seed": seed, "cond": {"class_labels": torch.arange(n) % CLASSES}}
            result = fastsde.sample(model_of(generator, SCHEDULES[schedule]), n=n, batch_size=250, **options)
            counts = torch.bincount(result.nfe).tolist()
            said = " ".join(f"{k}:{count}" for k, count in enumerate(counts) if count)
            row = {"calls": float(result.nfe.double().mean()), "most": int(result.nfe.max())}
            return row | judge(result.samples) | {"histogram": said}

        name = described_solver(solver)
        return [rows.need(measured, part, name, schedule, seed) for seed in tqdm(seeds, f"{part} {name}", disable=None)]

    def tuned(part: str, solvers: list[tokens.TokenSolver]) -> tokens.TokenSolver:
        return min(solvers, key=lambda solver: float(run(part, solver, "sine", (TUNING_SEED,))[0]["fid"]))

    for seed in SEEDS:
        rows.need(held_out, "floor", "held-out data", "", seed)
    gits = [tokens.Unmask("confidence", steps=36, choice_temperature=t) for t in TEMPERATURES]
    git = tuned("tuning MaskGIT", gits)
    run("solvers", tuned("tuning critic", [tokens.TokenCritic(critic, steps=18, scale=s) for s in SCALES]), "sine")
    run("solvers", git, "sine")
    run("solvers", plain := tokens.Unmask("random", steps=36), "linear")
    run("solvers", dataclasses.replace(git, steps=18), "sine")
    for rtol in RTOLS:
        own = run("tolerance", tokens.EntropyBudget(rtol, "random"), "linear")
        steps = round(statistics.mean(float(row["calls"]) for row in own))
        run("fixed", dataclasses.replace(plain, steps=steps), "linear")
    run("solvers", tokens.Unmask("entropy", steps=36), "linear")
    run("solvers", tokens.ReMDM(tokens.Cap(0.04), steps=36), "linear")
    run("solvers", tokens.Unmask("halton", steps=36), "sine")
    run("solvers", tokens.FirstHitting(), "linear")
    return {"n": n, "rows": list(rows.rows.values())}


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


@command("tokens_exact", main)
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
