"""diffusers' models, pipelines and schedulers: `fastsde.from_diffusers`, `fastsde.sample_pipeline` and what is around.

diffusers itself is imported only by what needs it, when it is used.
"""

from typing import Any

from fastsde.diffusers.adapter import from_diffusers
from fastsde.diffusers.latents import decode_latents, encode_images
from fastsde.diffusers.loading import load
from fastsde.diffusers.networks import DiffusersModel
from fastsde.diffusers.sampling import PipelineResult, sample_pipeline
from fastsde.diffusers.schedules import Reading, alphas_cumprod, read_schedule

__all__ = [
    "DiffusersModel",
    "FastSDEScheduler",
    "PipelineResult",
    "Reading",
    "alphas_cumprod",
    "decode_latents",
    "encode_images",
    "from_diffusers",
    "load",
    "read_schedule",
    "sample_pipeline",
]


def __getattr__(name: str) -> Any:
    if name != "FastSDEScheduler":
        raise AttributeError(f"module 'fastsde.diffusers' has no attribute {name!r}")
    try:
        from fastsde.diffusers.scheduler import FastSDEScheduler
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError(f"{name} needs diffusers: pip install 'fastsde[diffusers]'.") from error
    return FastSDEScheduler
