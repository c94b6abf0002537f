r"""What sampling costs beside the network: time of `sample` over the bare forwards it made, and the cost of noise.

1. Every forward's number of rows is recorded in one run; then `sample` and a replay (as many bare forwards, at the same
   batch sizes) are timed in turn, for minutes. Pass mark: median ratio 1.05.
2. One increment of noise beside one forward, both for the full batch: fresh noise against the one forward of an
   Euler-Maruyama step (pass mark 2 %), the Brownian path against the two forwards of a step of Algorithm 6 (8 %).

Run it on a quiet machine. Beside a ratio is the 95 % interval of its median; the spread of noise is the range over
repetitions.
"""

from __future__ import annotations

import statistics

import click
import torch
from common import described, in_turn, packaged_model, recorded, replay, save, table, timed

import fastsde
from fastsde.noise import BrownianPath, FreshNoise, Noise


def whole_runs(label: str, model: fastsde.ScoreModel, n: int, seconds: float, **options: object) -> dict[str, object]:
    """`sample` over its bare forwards, in turn."""
    device = str(options["device"])
    cond = {"class_labels": torch.arange(n) % 10}
    counting, rows = recorded(model)
    r = fastsde.sample(counting, n=n, batch_size=n, cond=cond, **options)
    times = in_turn(
        lambda: timed(lambda: fastsde.sample(model, n=n, batch_size=n, cond=cond, **options)),
        lambda: replay(model, rows, device),
        seconds,
    )
    return {"run": label, "nfe": float(r.nfe.double().mean()), "forwards": len(rows)} | times


def increments(
    label: str, noise: Noise, model: fastsde.ScoreModel, n: int, repeats: int, forwards: int, device: str
) -> dict[str, object]:
    """One increment over the bare forwards of the step it serves, alternating."""
    index = torch.arange(n, device=device)
    # Every row at its own time, as in an adaptive run.
    t = torch.linspace(0.2, 0.9, n, dtype=torch.float64, device=device)
    carry = noise.start(index, t)

    def draw() -> None:
        noise.increment(index, index, t, t - 0.01, carry)

    draw()
    replay(model, [n], device)
    pairs = [(timed(draw), replay(model, [n], device)) for _ in range(repeats)]
    shares = [100 * one / (forwards * forward) for one, forward in pairs]
    return {
        "noise": label,
        "forwards_per_step": forwards,
        "noise_ms": 1e3 * statistics.median(one for one, _ in pairs),
        "forward_ms": 1e3 * statistics.median(forward for _, forward in pairs),
        "percent_of_step": statistics.median(shares),
        "percent_of_step_range": [min(shares), max(shares)],
        "percent_of_forward": statistics.median(shares) * forwards,
    }


def verdict(value: float, mark: float) -> str:
    """The pass mark and whether it was met."""
    return f"{mark:g} {'ok' if value <= mark else 'MISSED'}"


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--batch", default=64, help="Samples, all in one batch.")
@click.option("--rtol", default=0.05, help="Tolerance of Algorithm 6.")
@click.option("--steps", default=50, help="Steps of Euler-Maruyama.")
@click.option("--minutes", default=3.0, help="How long each whole run is repeated.")
@click.option("--noise-repeats", default=20, help="Timed pairs of one increment and one forward.")
@click.option("--untrained", is_flag=True, help="Random weights in place of the packaged model.")
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--keep/--discard", default=True, help="Whether to write results/overhead.json, or overhead_cuda.json.")
def main(
    batch: int,
    rtol: float,
    steps: int,
    minutes: float,
    noise_repeats: int,
    untrained: bool,
    threads: int,
    device: str,
    keep: bool,
) -> None:
    """Prints both tables and writes them."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    model = packaged_model(untrained=untrained, device=device)
    model.network.eval()
    sde, event = model.sde, model.event_shape
    noises = [
        ("fresh, per Euler-Maruyama step", FreshNoise(0, event, torch.float32), 1, 2.0),
        (
            "Brownian path, per step of Algorithm 6",
            BrownianPath(0, event, torch.float32, t_min=sde.t_min, t_max=sde.t_max),
            2,
            8.0,
        ),
    ]
    noise_rows = [
        increments(label, noise, model, batch, noise_repeats, k, device) | {"mark": mark}
        for label, noise, k, mark in noises
    ]
    fixed = fastsde.EulerMaruyama(steps=steps)
    runs = [
        whole_runs(label, model, batch, 60 * minutes, device=device, **options)
        for label, options in (
            *(
                (f"{described(solver)}, rtol {rtol:g}", {"rtol": rtol, "solver": solver})
                for solver in (fastsde.ExtrapolatedEM(), fastsde.ExponentialPC(), fastsde.ExponentialPC(eta=1.0))
            ),
            (described(fixed), {"solver": fixed}),
        )
    ]
    table(
        ("run", "NFE", "forwards", "pairs", "sample, s", "bare, s", "ratio", "95 %", "pass mark"),
        [
            (
                r["run"],
                f"{r['nfe']:.1f}",
                r["forwards"],
                r["pairs"],
                f"{r['ours_seconds']:.2f}",
                f"{r['theirs_seconds']:.2f}",
                f"{r['ratio']:.3f}",
                "{:.3f} .. {:.3f}".format(*r["ratio_interval"]),
                verdict(r["ratio"], 1.05),
            )
            for r in runs
        ],
    )
    print()
    table(
        ("noise", "noise, ms", "forward, ms", "% of step's forwards", "spread", "pass mark", "% of one forward"),
        [
            (
                r["noise"],
                f"{r['noise_ms']:.2f}",
                f"{r['forward_ms']:.1f}",
                f"{r['percent_of_step']:.2f}",
                "{:.2f} .. {:.2f}".format(*r["percent_of_step_range"]),
                verdict(r["percent_of_step"], r["mark"]),
                f"{r['percent_of_forward']:.2f}",
            )
            for r in noise_rows
        ],
    )
    if keep:
        save("overhead" if device == "cpu" else f"overhead_{device}", settings, {"runs": runs, "noise": noise_rows})


if __name__ == "__main__":
    main()
