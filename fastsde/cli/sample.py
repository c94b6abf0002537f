"""`fastsde sample`."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.core import ParameterSource
from torch import Tensor

from fastsde.cli import options as option
from fastsde.cli.job import Request, Source, draw, run_job, shard_maker
from fastsde.cli.models import Opened, open_model
from fastsde.cli.options import PATH
from fastsde.cli.output import dump_json, finished, prepare_folder, result_record, tell, versions, write_atomic
from fastsde.cli.pipeline import Call, run_pipeline
from fastsde.cli.solver_options import GRIDS, SOLVER_NAMES, Steps, check_request
from fastsde.cli.tokens import NAMES as TOKEN_SOLVERS
from fastsde.cli.tokens import is_token_model, open_tokens
from fastsde.evaluation.cluster import RayWorkers
from fastsde.evaluation.images import image_grid, to_uint8
from fastsde.evaluation.jobs import MANIFEST, ShardedJob, controller_record, processes, whole_arrays, whole_samples
from fastsde.files import Content
from fastsde.result import SampleResult
from fastsde.steps import DEFAULT_RTOL

_OF_MODELS = ("model", "grid", "label", "shard_size", "rank", "world_size", "ray", "workers")
_OF_PIPELINES = ("kind", "prompts", "negative_prompt", "settings", "fps")
"""Options that go with --model alone, and with --pipeline alone."""


@click.command()
@option.model
@click.option("--pipeline", help="A diffusers pipeline, in its own loop: a folder or a name on the hub.")
@click.option("--class", "kind", metavar="NAME", help="A class of diffusers for the pipeline's parts, not its own.")
@click.option("--prompt", "prompts", multiple=True, help="Of a pipeline; several are for the samples in turn.")
@click.option("--negative-prompt", help="Of a pipeline.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An argument of the pipeline's call: JSON, a text, or @FILE; may be repeated.",
)
@click.option("--fps", default=8.0, type=click.FloatRange(0.1, 1000), help="Frames a second of a pipeline's videos.")
@click.option(
    "-n",
    "--number",
    "n",
    type=click.IntRange(1, 1 << 32),
    show_default="64; of a pipeline one for each prompt",
    help="Number of samples.",
)
@click.option(
    "--solver",
    default="ExponentialPC",
    metavar="NAME",
    type=click.Choice([*SOLVER_NAMES, *(name for name in TOKEN_SOLVERS if name not in SOLVER_NAMES)]),
    help="One that `fastsde info solvers` lists, but for FittedSolver; of a model of tokens, Unmask and others.",
)
@click.option(
    "--rtol",
    type=float,
    show_default=str(DEFAULT_RTOL),
    help="Relative tolerance: smaller is slower, more accurate.",
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
@click.option(
    "--guidance-scale",
    type=float,
    help="Of diffusers' models with classes, and of pipelines; as a rule two calls for one if above 1.",
)
@option.dtype
@click.option(
    "--batch-size",
    type=click.IntRange(1, 1 << 20),
    show_default="64; of a pipeline 8",
    help="Samples evaluated at a time.",
)
@option.device
@option.shard_size
@option.rank
@option.world_size
@option.ray
@option.workers
@click.option("--out", default="samples", type=PATH, help="Folder; what an earlier run wrote there is replaced.")
@option.as_json
@click.pass_context
def sample(ctx: click.Context, pipeline: str | None, **asked: Any) -> None:
    """Draw samples, by default with our own solver along the probability flow, the same steps for all samples.

    Writes grid.png (the first 64 samples), samples.npz (uint8, NHWC, under arr_0; labels under arr_1) and samples.json
    (calls, steps and status of every sample, settings, seed, versions, weight hash, wall time; in_npz says which
    samples the .npz holds, in its order). Ctrl-C keeps what is finished. Ends with status 1 if any sample failed or is
    missing.

    More than --shard-size samples, or several processes, make a job: shards samples-00000.npz and so on (as samples.npz
    with the cost of each sample), a manifest.json with all settings, and at the end grid.png and samples.json (totals).
    Killed at any moment, the same command goes on where it stopped; other settings are refused. Any process that runs
    the same command in the same folder helps. With --rank and --world-size, or under `torchrun` and `accelerate
    launch`, it begins with shards of its own. With --ray the workers of a Ray cluster draw, and this machine writes.

    With --pipeline a pipeline of diffusers runs in its own loop, and --set says arguments of its call. VALUE is JSON
    (numbers, true, lists), else a text. @FILE is an image, a video (.gif, .webp), an array (.npy, .npz, .safetensors:
    a tensor) or a text (.txt); @FOLDER its images in order. Images become 00000.png and so on, videos .webp, sound
    .wav, all else, such as latents and what --set output_type=np asks for, samples.npz; grid.png shows the images or
    first frames, samples.json holds the record. What a decoder fails on is in latents.npz.

    \b
    Examples:
      fastsde sample --model fashion-mnist -n 64 --rtol 0.05 --seed 1 --out samples
      fastsde sample --nfe 12
      fastsde sample --fitted five.json                           # `fastsde fit --nfe 5 --out five.json` wrote it
      fastsde sample --solver ExtrapolatedEM --rtol 0.05          # Algorithm 1 of "Gotta Go Fast", nearly
      fastsde sample --solver PredictorCorrector --steps 200 -o predictor=Ancestral -o corrector.snr=0.01
      fastsde sample --model google/ddpm-cifar10-32 -n 16
      fastsde sample -n 50000 --nfe 12 --out runs/fifty-thousand
      fastsde sample -n 50000 --nfe 12 --ray --workers 2 --out runs/fifty-thousand
      fastsde sample --model my-tokens --solver Unmask -o order=confidence --steps 12
      fastsde sample --pipeline stabilityai/stable-diffusion-2-1 --prompt "a lighthouse in fog" -n 4 --dtype float16
      fastsde sample --pipeline folder --class StableDiffusionImg2ImgPipeline --prompt "in oil" --set image=@in.png
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems end jobs so; keep what is finished
    _check_options(ctx, pipeline)
    names = ("solver", "fitted", "options", "rtol", "atol", "nfe", "steps", "grid")
    steps = Steps(**{name: asked[name] for name in names})
    if pipeline is None:
        shares, needs = option.shares(ctx), ("model", "label", "guidance_scale", "dtype", "seed")
        request = Request(
            steps=steps,
            batch_size=asked["batch_size"] or 64,
            device=str(asked["device"]) if asked["ray"] is None else "cpu",  # of this process, which then draws nothing
            **{name: asked[name] for name in needs},
        )
        source = open_source(request)
        source.labels_of(torch.arange(1))  # refuses a label before the folder is made
        files = {name: asked[name] for name in ("out", "shard_size", "as_json")}
        with option.ray_workers(ctx) as workers:
            if workers is not None:
                request = dataclasses.replace(request, device=workers.device)
                source.record["device"] = workers.device
            _draw(request, source, asked["n"] or 64, shares, workers, **files)
        return
    if processes(None, None, os.environ)[1] > 1:
        raise ValueError("several processes (WORLD_SIZE) share jobs of --model; start --pipeline once.")
    guidance = {name: asked[name] for name in ("negative_prompt", "guidance_scale")}
    call = Call.read({"prompt": asked["prompts"] or None, **guidance}, asked["settings"], asked["n"])
    own = ("kind", "seed", "dtype", "device", "fps", "out", "as_json")
    run_pipeline(pipeline, call, steps, batch_size=asked["batch_size"] or 8, **{name: asked[name] for name in own})


def _draw(
    request: Request,
    source: Source,
    n: int,
    shares: tuple[int, int],
    workers: RayWorkers | None,
    *,
    out: Path,
    shard_size: int,
    as_json: bool,
) -> None:
    """Draws from a model, at once or as a job, and writes the files."""
    prepare_folder(out, needed=3 * n * math.prod(source.image_shape or (1 << 10,)) + (1 << 20))
    if n > shard_size or shares[1] > 1 or workers is not None or (out / MANIFEST).is_file():
        shape = {} if source.image_shape is None else {"image_shape": list(source.image_shape)}
        settings = source.record | {"seed": request.seed, "label": request.label} | shape
        job = ShardedJob.begin(out, n, shard_size, settings)
        make_all = None
        if workers is not None:
            open_maker = partial(shard_maker, open_source, request, job)
            make_all = partial(workers.make_all, open_maker=open_maker, record=source.record)
        run_job(job, source, shares, make_all=make_all, as_json=as_json)
        return
    labels = source.labels_of(torch.arange(n))
    result, failed = finished(partial(source.draw, torch.arange(n), labels, progress=True))
    record = result_record(result) | source.record
    record["label"] = None if labels is None else labels.tolist()
    record["in_npz"] = result.index[whole_samples(result)].tolist()
    if result.report:
        record["report"] = {key: value.tolist() for key, value in result.report.items()}
    files = _write(out, result, labels, record, source)
    tell(result, record, files, as_json=as_json, failed=failed)


def open_source(request: Request) -> Source:
    """Opens what `--model` names."""
    if is_token_model(request.model):
        return open_tokens(request, Steps.solver, partial(_labels, request.label))
    steps = request.steps
    opened = open_model(request.model, torch.device(request.device), request.dtype, request.guidance_scale)
    solver, controller = steps.build(opened.model.sde)
    chosen: dict[str, Any] = {"solver": solver, "controller": controller}
    chosen |= {"rtol": steps.rtol, "atol": steps.atol, "nfe": steps.nfe}
    check_request(opened.model, **chosen)
    record = {"model": request.model, **opened.source, "guidance_scale": request.guidance_scale}
    record |= {"sde": repr(opened.model.sde), "solver": repr(solver), "nfe_budget": steps.nfe, "steps": steps.steps}
    record |= controller_record(controller)
    if solver.adaptive and steps.nfe is None and controller is None:
        low, high = opened.model.data_range
        record["rtol"] = DEFAULT_RTOL if steps.rtol is None else steps.rtol
        record["atol"] = (high - low) / 256 if steps.atol is None else steps.atol
    record |= {"batch_size": request.batch_size, "device": torch.device(request.device).type, "versions": versions()}
    shape = None
    if opened.autoencoder is None and opened.model.event_shape:  # of latents the decoder decides
        channels, *size = opened.model.event_shape
        shape = (*size, channels)
    drawn = partial(draw, opened.model, seed=request.seed, batch_size=request.batch_size, **chosen)
    return Source(drawn, partial(_labels, request.label, opened.classes), partial(_decoded, opened), record, shape)


def _check_options(ctx: click.Context, pipeline: str | None) -> None:
    """Refuses options of models with --pipeline, and the reverse."""
    wrong, mode = (_OF_PIPELINES, "--model") if pipeline is None else (_OF_MODELS, "--pipeline")
    said = [
        max(parameter.opts, key=len)
        for parameter in ctx.command.params
        if parameter.name in wrong and ctx.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    ]
    if "--model" in said:
        raise ValueError("give either --model or --pipeline.")
    if said:
        of_jobs = {"--shard-size", "--rank", "--world-size", "--ray", "--workers"}
        jobs = " Jobs of shards are for --model." if of_jobs & {*said} else ""
        raise ValueError(f"{mode} goes without {', '.join(said)}.{jobs}")


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


def _write(
    out: Path, result: SampleResult, labels: Tensor | None, record: dict[str, Any], source: Source
) -> list[Path]:
    """Writes the files and returns their paths; samples that are missing or lost appear in the record alone.

    If decoding fails, the latents are written first.
    """
    try:
        arrays = whole_arrays(result, source.images, labels)
    except RuntimeError as error:
        whole = result.samples[whole_samples(result)]
        write_atomic(out, {"latents.npz": {"arr_0": whole.float().cpu().numpy()}})
        raise click.ClickException(f"decoding failed ({error}); the latents are in {out / 'latents.npz'}.") from error
    writers: dict[str, Content] = {"samples.npz": arrays, "samples.json": dump_json(record).encode()}
    images = arrays.get("arr_0", np.empty(0))
    if len(images):
        writers["grid.png"] = image_grid(images[:64]).save
    else:
        (out / "grid.png").unlink(missing_ok=True)
    return write_atomic(out, writers)


def _decoded(opened: Opened, samples: Tensor) -> np.ndarray:
    """The samples in 8 bits, decoded if they are latents."""
    if opened.autoencoder is None and opened.pipe is None:  # straight to 8 bits, without a rounding to [0, 1]
        return to_uint8(samples, opened.model.data_range)
    return to_uint8(opened.images(samples), (0.0, 1.0))
