r"""Our engine in the place of a pipeline's own loop: wall time at the same network, batch and number of calls.

Four pipelines with random weights, each run by itself and by `sample_pipeline` with the same number of network calls,
in turn: Stable Diffusion's (text, guidance, DPM-Solver++ 2M), DiT's (classes, guidance, DDIM), an unconditional one
(DDIM), and that at the size of a published model. The forwards of both are counted and must agree. Pass mark: median
ratio 1.0, with its 95 % interval beside it. Run it on a quiet machine. The last columns are the ratio of the forwards
alone and what each loop spends beside them (its own, then ours), decoding included; on a GPU, where forwards run beside
the host, there are none, and Stable Diffusion's pipeline joins at its own width, in half precision.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import click
import diffusers
import torch
from common import in_turn, keep_memory, save, table, timed

import fastsde

Loops: TypeAlias = tuple[Any, Callable[[], object], Callable[[], object]]
"""A pipeline, its own loop, and ours."""


def text_to_image(batch: int, calls: int, device: str) -> Loops:
    """Stable Diffusion's pipeline at a tenth of its width, 32 x 32 latents, guided; prompts as embeddings."""
    network = diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64, 128), cross_attention_dim=64, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=16,
    )  # fmt: skip
    return _prompted(network, batch, calls, device)


def stable_diffusion(batch: int, calls: int, device: str) -> Loops:
    """The same at the published width, 64 x 64 latents, in half precision: for a GPU."""
    with torch.device(device):
        network = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return _prompted(network.half(), batch, calls, device)


def _prompted(network: Any, batch: int, calls: int, device: str) -> Loops:
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **_four("Encoder"))
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.to(network.dtype), text_encoder=None, tokenizer=None, unet=network, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    prompts = torch.randn(batch, 77, network.config.cross_attention_dim, device=device, dtype=network.dtype)
    embeds = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), prompts)
    shared = {**embeds, "guidance_scale": 7.5, "output_type": "latent"}
    return (
        pipe,
        lambda: pipe(num_inference_steps=calls, **shared),
        lambda: fastsde.sample_pipeline(pipe, nfe=2 * calls, progress=False, batch_size=batch, **shared),
    )


def class_to_image(batch: int, calls: int, device: str) -> Loops:
    """DiT's pipeline with half the depth of DiT-S/2, 32 x 32 latents, guided, and a small decoder."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=6, sample_size=32
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **_four("Encoder"))
    pipe = diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler(clip_sample=False))
    labels = list(range(batch))
    return (
        pipe,
        lambda: pipe(class_labels=labels, num_inference_steps=calls, output_type="np"),
        lambda: fastsde.sample_pipeline(
            pipe, class_labels=labels, guidance_scale=4.0, nfe=2 * calls, output_type="np", progress=False
        ),
    )


def unconditional(batch: int, calls: int, device: str) -> Loops:
    """An unconditional pixel pipeline, 32 x 32, predictions clipped."""
    network = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return _pixels(network, batch, calls, device)


def full_size(batch: int, calls: int, device: str) -> Loops:
    """As `unconditional`, with the architecture of the published CIFAR-10 model (google/ddpm-cifar10-32)."""
    network = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), downsample_padding=0, flip_sin_to_cos=False,
        freq_shift=1, norm_eps=1e-6, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None,
    )  # fmt: skip
    return _pixels(network, batch, calls, device)


def _pixels(network: Any, batch: int, calls: int, device: str) -> Loops:
    pipe = diffusers.DDIMPipeline(network, diffusers.DDIMScheduler())
    return (
        pipe,
        lambda: pipe(batch_size=batch, num_inference_steps=calls, output_type="np"),
        lambda: fastsde.sample_pipeline(pipe, n=batch, nfe=calls, output_type="np", progress=False),
    )


def _four(kind: str) -> dict[str, Any]:
    return {"down_block_types": (f"Down{kind}Block2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def measure(build: Callable[..., Loops], batch: int, calls: int, seconds: float, device: str) -> dict[str, object]:
    """Both loops in turn, after one run of each that counts its forwards."""
    torch.manual_seed(0)
    pipe, theirs, ours = build(batch, calls, device)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    network = pipe.components.get("unet") or pipe.components["transformer"]
    network.eval()
    counts: list[list[int]] = []
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    with watched(network) as seen:

        def run(which: int) -> float:
            seen.clear()
            seconds = timed((theirs, ours)[which])
            times[which].append((seconds, sum(forward for _, forward in seen)))
            return seconds

        for which in (0, 1):
            run(which)
            counts.append([rows for rows, _ in seen])
            times[which].clear()  # the first run of each only warms it up
        if counts[0] != counts[1]:
            raise RuntimeError(f"the two loops made forwards of {counts} rows; they must agree.")
        result = in_turn(lambda: run(1), lambda: run(0), seconds)
    calls = len(counts[0])
    beside = {
        "forwards_ratio": statistics.median(b / a for (_, a), (_, b) in zip(*times, strict=True)),
        "outside_ms_per_forward": [1e3 * statistics.median(a - b for a, b in each) / calls for each in times],
    }
    return {
        "pipeline": build.__name__.replace("_", " "),
        "scheduler": type(pipe.scheduler).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "batch": batch,
        "forwards": calls,
        **(beside if device == "cpu" else {}),
        **result,
    }


@contextlib.contextmanager
def watched(network: torch.nn.Module) -> Iterator[list[tuple[int, float]]]:
    """Rows and seconds of every forward, seen from its class: a network with a hook would be called in another way."""
    kind, forward = type(network), type(network).forward
    seen: list[tuple[int, float]] = []

    @functools.wraps(forward)
    def clocked(self: torch.nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = forward(self, x, *args, **kwargs)
        seen.append((len(x), time.perf_counter() - start))
        return out

    kind.forward = clocked  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        kind.forward = forward  # type: ignore[method-assign]


BUILDS = (text_to_image, class_to_image, unconditional, full_size)


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--batch", default=4, help="Images at a time.")
@click.option("--calls", default=20, help="Evaluations of each image.")
@click.option("--minutes", default=2.0, help="How long each pipeline is repeated.")
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--only", multiple=True, help="Only these pipelines, by the names of the functions that build them.")
@click.option("--keep/--discard", default=True, help="Whether to write results/diffusers_overhead.json, or _cuda.json.")
def main(batch: int, calls: int, minutes: float, threads: int, device: str, only: tuple[str, ...], keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    keep_memory()
    builds = BUILDS if device == "cpu" else (*BUILDS, stable_diffusion)
    builds = tuple(build for build in builds if not only or build.__name__ in only)
    results = [measure(build, batch, calls, 60 * minutes, device) for build in builds]
    table(
        (
            "pipeline",
            "parameters",
            "pairs",
            "its loop, s",
            "ours, s",
            "ratio",
            "95 %",
            "pass mark",
            "forwards",
            "outside, ms a forward",
        ),
        [
            (
                r["pipeline"],
                f"{r['parameters'] / 1e6:.1f} M",
                r["pairs"],
                f"{r['theirs_seconds']:.2f}",
                f"{r['ours_seconds']:.2f}",
                f"{r['ratio']:.3f}",
                "{:.3f} .. {:.3f}".format(*r["ratio_interval"]),
                "1.0 ok" if r["ratio"] <= 1.0 else "1.0 MISSED",
                f"{r['forwards_ratio']:.3f}" if device == "cpu" else "-",
                "{:.2f} / {:.2f}".format(*r["outside_ms_per_forward"]) if device == "cpu" else "-",
            )
            for r in results
        ],
    )
    if keep and not only:
        save("diffusers_overhead" if device == "cpu" else f"diffusers_overhead_{device}", settings, results)


if __name__ == "__main__":
    main()
