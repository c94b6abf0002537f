"""`fastsde sample`."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from fastsde.arguments import DEFAULT_RTOL
from fastsde.cli.job import run_job
from fastsde.cli.models import Opened, open_model, own_device
from fastsde.cli.output import PATH, dump_json, prepare_folder, versions, write_atomic
from fastsde.cli.solver_options import GRIDS, SOLVER_NAMES, build_controller, build_solver, check_request
from fastsde.control import Controller
from fastsde.evaluation.images import image_grid, to_uint8
from fastsde.evaluation.jobs import MANIFEST, ShardedJob, controller_record, processes
from fastsde.result import Interrupted, SampleResult, SamplingError, Status
from fastsde.sde.base import SDE
from fastsde.solvers import FittedSolver, Solver


@click.command(short_help="Draw samples: a PNG grid, an .npz and a JSON record.")
@click.option(
    "--model",
    default="fashion-mnist",
    help="A packaged model, a folder written by `fastsde train`, or a diffusers model: a folder or a name on the hub.",
)
@click.option("-n", "--number", "n", default=64, type=click.IntRange(1, 1 << 32), help="Number of samples.")
@click.option(
    "--solver",
    "solver_name",
    default="ExponentialPC",
    metavar="NAME",
    type=click.Choice(list(SOLVER_NAMES)),
    help="One of those that `fastsde info solvers` lists.",
)
@click.option(
    "--rtol", type=float, show_default=str(DEFAULT_RTOL), help="Relative tolerance: smaller is slower and closer."
)
@click.option("--atol", type=float, show_default="one 8-bit level", help="Absolute tolerance, in units of the data.")
@click.option("--nfe", type=click.IntRange(1), help="Network calls that no sample exceeds, rather than tolerances.")
@click.option("--fitted", type=PATH, help="A solver that `fastsde fit` wrote, in place of --solver and steps.")
@click.option("--steps", type=click.IntRange(1), help="Steps of a grid, for every sample the same.")
@click.option("--grid", type=click.Choice(list(GRIDS)), show_default="the solver's own", help="How steps are spaced.")
@click.option(
    "--option", "-o", "options", multiple=True, metavar="KEY=VALUE", help="An argument of the solver; may be repeated."
)
@click.option("--seed", default=0, help="Sample i depends on (seed, i) alone.")
@click.option(
    "--label", default="cycle", help='A class number, "cycle" for all in turn, or "none" for the model\'s own mix.'
)
@click.option("--guidance-scale", type=float, help="Of diffusers' models with classes; two calls for one if above 1.")
@click.option(
    "--dtype", default="float32", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the network alone."
)
@click.option("--batch-size", default=64, type=click.IntRange(1, 1 << 20), help="Rows evaluated at a time.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps.")
@click.option(
    "--shard-size", default=512, type=click.IntRange(1, 1 << 32), help="More samples than that make a job of shards."
)
@click.option("--rank", type=int, help="Of a job's processes, which this is; from RANK by default.")
@click.option("--world-size", type=int, help="How many processes share a job; from WORLD_SIZE by default.")
@click.option("--out", default="samples", type=PATH, help="Folder; its three files are replaced.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON record instead of the summary.")
def sample(
    model: str,
    n: int,
    solver_name: str,
    rtol: float | None,
    atol: float | None,
    nfe: int | None,
    fitted: Path | None,
    steps: int | None,
    grid: str | None,
    options: tuple[str, ...],
    seed: int,
    label: str,
    guidance_scale: float | None,
    dtype: str,
    batch_size: int,
    device: str,
    shard_size: int,
    rank: int | None,
    world_size: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Draw samples, by default with our own solver along the probability flow, a step size per sample.

    Writes grid.png (the first 64 samples), samples.npz (uint8, NHWC, under arr_0; labels under arr_1) and samples.json
    (calls, steps and status of every sample, settings, seed, versions, weight hash, wall time; in_npz says which
    samples the .npz holds, in its order). Ctrl-C keeps what is finished. Ends with status 1 if any sample failed or is
    missing.

    More than --shard-size samples, or several processes, make a job: shards samples-00000.npz and so on (as samples.npz
    with the cost of each sample), a manifest.json with all settings, and at the end grid.png and samples.json (totals).
    Killed at any moment, the same command goes on where it stopped; other settings are refused. Processes share a job
    by --rank and --world-size, or under `torchrun` and `accelerate launch`; none waits for another.

    \b
    Examples:
      fastsde sample --model fashion-mnist -n 64 --rtol 0.05 --seed 1 --out samples
      fastsde sample --nfe 12
      fastsde sample --fitted five.json                           # `fastsde fit --nfe 5 --out five.json` wrote it
      fastsde sample --solver ExtrapolatedEM --rtol 0.05          # Algorithm 1 of "Gotta Go Fast", nearly
      fastsde sample --solver PredictorCorrector --steps 200 -o predictor=Ancestral -o corrector.snr=0.01
      fastsde sample --model google/ddpm-cifar10-32 -n 16
      fastsde sample -n 50000 --nfe 12 --out runs/fifty-thousand
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems end jobs so; keep what is finished
    failed = False
    try:
        opened = open_model(model, own_device(device, os.environ), getattr(torch, dtype), guidance_scale)
        sde = opened.model.sde
        said = {"--rtol": rtol, "--atol": atol, "--nfe": nfe, "--steps": steps, "--grid": grid, "-o": options}
        solver, controller = _solver(sde, solver_name, fitted, said)
        adaptive = solver.adaptive and nfe is None and controller is None
        labels_of = partial(_labels, label, opened.classes)
        labels_of(torch.arange(1))  # refuses a label before the folder is made
        prepare_folder(out, needed=3 * n * math.prod(opened.model.event_shape or ()) + (1 << 20))
        chosen: dict[str, Any] = {"rtol": rtol, "atol": atol, "nfe": nfe, "solver": solver, "controller": controller}
        draw: Callable[..., SampleResult] = partial(opened.sample, seed=seed, batch_size=batch_size, **chosen)
        settings = {
            "model": model,
            **opened.source,
            "guidance_scale": guidance_scale,
            "sde": repr(sde),
            "solver": repr(solver),
            "nfe_budget": nfe,
            "steps": steps,
            **controller_record(controller),
            **(_tolerances(rtol, atol, opened.model.data_range) if adaptive else {}),
            "batch_size": batch_size,
            "device": torch.device(device).type,
            "versions": versions(),
        }
        shares = processes(rank, world_size, os.environ)
        if n > shard_size or shares[1] > 1 or (out / MANIFEST).is_file():
            check_request(opened.model, solver, controller, rtol, atol, nfe)
            settings |= {"seed": seed, "label": label}
            if opened.pipe is None and opened.model.event_shape:  # of latents the decoder decides
                channels, *size = opened.model.event_shape
                settings["image_shape"] = [*size, channels]
            job = ShardedJob.begin(out, n, shard_size, settings)
            run_job(job, draw, labels_of, partial(_decoded, opened), shares, as_json=as_json)
            return
        labels = labels_of(torch.arange(n))
        result = draw(torch.arange(n), labels, progress=True)
    except SamplingError as error:
        click.echo(f"Error: {error}", err=True)
        result, failed = error.result, True
    except Interrupted as interruption:
        result = interruption.result
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    record = _record(result, labels) | settings
    if not (result.status != Status.PENDING).any():
        raise click.ClickException("interrupted before the first sample was finished; nothing was written.")
    files = _write(out, result, labels, record, opened)
    click.echo(dump_json(record) if as_json else _summary(result, files), nl=not as_json)
    if failed or not result.success.all():
        raise SystemExit(1)


def _solver(sde: SDE, name: str, fitted: Path | None, said: dict[str, Any]) -> tuple[Solver, Controller | None]:
    """The solver and the grid that the options ask for, by their names; None for the solver's own choice.

    Raises:
        ValueError: if they do not go together.
    """
    if fitted is None:
        solver = build_solver(name, said["-o"])
        tolerances = (said["--rtol"], said["--atol"]) != (None, None)
        budget = said["--nfe"] is not None
        return solver, build_controller(sde, solver, said["--steps"], said["--grid"], rtol=tolerances, budget=budget)
    if others := [key for key, value in said.items() if value not in (None, ())]:
        raise ValueError(f"--fitted says solver and steps itself; it goes without {', '.join(others)}.")
    return FittedSolver.load(fitted), None


def _tolerances(rtol: float | None, atol: float | None, data_range: tuple[float, float]) -> dict[str, float]:
    """The tolerances as used, defaults included."""
    low, high = data_range
    return {"rtol": DEFAULT_RTOL if rtol is None else rtol, "atol": (high - low) / 256 if atol is None else atol}


def _labels(label: str, classes: int, index: Tensor) -> Tensor | None:
    """Class of each sample of these numbers, with shape (n,), or None for the model's own mix."""
    if label == "none" or (label == "cycle" and not classes):
        return None
    if label == "cycle":
        return index % classes
    if not label.isdecimal() or int(label) >= classes:
        allowed = f"0 .. {classes - 1}, " if classes else ""
        raise ValueError(f'--label must be {allowed}"cycle" or "none" for this model; got {label!r}.')
    return torch.full_like(index, int(label))


def _whole(result: SampleResult) -> Tensor:
    """Which samples are there: neither missing nor lost, with shape (n,)."""
    return torch.isfinite(result.samples.flatten(1)).all(1)


def _record(result: SampleResult, labels: Tensor | None) -> dict[str, Any]:
    nfe = result.nfe[result.status != Status.PENDING].double()
    return {
        "n": len(result.nfe),
        "finished": int((result.status != Status.PENDING).sum()),
        "status_counts": result.counts(),
        "outside_data_range": None if result.outside is None else int(result.outside.sum()),
        "mean_nfe": float(nfe.mean()) if len(nfe) else None,
        "seconds": round(result.seconds, 3),
        "seed": result.seed,
        "index": result.index.tolist(),
        "label": None if labels is None else labels.tolist(),
        "in_npz": result.index[_whole(result)].tolist(),
        "nfe": result.nfe.tolist(),
        "accepted": result.accepted.tolist(),
        "rejected": result.rejected.tolist(),
        "status": [Status(s).name for s in result.status.tolist()],
    }


def _write(
    out: Path, result: SampleResult, labels: Tensor | None, record: dict[str, Any], opened: Opened
) -> list[Path]:
    """Writes the files and returns their paths; samples that are missing or lost appear in the record alone."""
    whole = _whole(result)
    images = _images(out, result.samples[whole], opened)
    arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels[whole.cpu()].numpy()})
    writers: dict[str, Callable[[Path], object]] = {
        "samples.npz": lambda path: np.savez_compressed(path, **arrays),  # type: ignore[arg-type]
        "samples.json": lambda path: path.write_text(dump_json(record)),
    }
    if len(images):
        writers["grid.png"] = lambda path: image_grid(images[:64]).save(path)
    else:
        (out / "grid.png").unlink(missing_ok=True)
    return write_atomic(out, writers)


def _decoded(opened: Opened, samples: Tensor) -> np.ndarray:
    """The samples in 8 bits, decoded if they are latents."""
    if opened.pipe is None:
        return to_uint8(samples, opened.model.data_range)
    return to_uint8(opened.images(samples), (0.0, 1.0))


def _images(out: Path, samples: Tensor, opened: Opened) -> np.ndarray:
    """The samples in 8 bits, decoded if they are latents; if that fails, the latents are written first."""
    try:
        return _decoded(opened, samples)
    except RuntimeError as error:
        write_atomic(out, {"latents.npz": lambda path: np.savez(path, arr_0=samples.float().cpu().numpy())})
        raise click.ClickException(f"decoding failed ({error}); the latents are in {out / 'latents.npz'}.") from error


def _summary(result: SampleResult, files: list[Path]) -> str:
    ended = result.status != Status.PENDING
    nfe, steps = result.nfe[ended].double(), int((result.accepted + result.rejected).sum())
    lines = [f"{int(result.success.sum())} of {len(result.nfe)} samples in {result.seconds:.1f} s"]
    if len(nfe):
        lines.append(
            f"network calls per sample: mean {nfe.mean():.1f}, least {int(nfe.min())}, most {int(nfe.max())}; "
            f"{int(result.rejected.sum()) / max(steps, 1):.1%} of the steps rejected"
        )
    if not result.success.all():
        lines.append(f"not all succeeded: {result.counts()}; see samples.json")
    return "\n".join([*lines, *(f"  {path}" for path in files)])
