"""fastsde's samplers as nodes of ComfyUI, and as names in the list of its KSampler: `fastsde.kdiffusion` does the work.

Copy or link this folder into `custom_nodes` of ComfyUI, whose Python must have fastsde: see README.md.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy.k_diffusion import sampling

from fastsde import kdiffusion

SAMPLERS = {"fastsde": kdiffusion.sample_exponential_pc, "fastsde_adaptive": kdiffusion.sample_adaptive}
"""By the names that KSampler lists."""

_ETA = ("FLOAT", {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.01, "tooltip": "noise: 0 none, 1 the full SDE"})


class ExponentialPCSampler:
    """One call of the model a step, on the sigmas that come in; or a fitted solver, on its own."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        tip = "file of a solver that fastsde.fit made for this model; empty for none"
        return {"required": {"eta": _ETA}, "optional": {"fitted": ("STRING", {"default": "", "tooltip": tip})}}

    def get_sampler(self, eta: float, fitted: str = "") -> tuple[object]:
        """The sampler with these settings."""
        return (comfy.samplers.KSAMPLER(SAMPLERS["fastsde"], {"eta": eta, "fitted": fitted.strip() or None}),)


class AdaptiveSampler:
    """Chooses its own steps between the first and the last of the sigmas that come in, as many as rtol asks for."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        rtol = ("FLOAT", {"default": 0.05, "min": 0.001, "max": 1.0, "step": 0.001, "tooltip": "smaller: more steps"})
        return {"required": {"rtol": rtol, "eta": _ETA}}

    def get_sampler(self, rtol: float, eta: float) -> tuple[object]:
        """The sampler with these settings."""
        return (comfy.samplers.KSAMPLER(SAMPLERS["fastsde_adaptive"], {"rtol": rtol, "eta": eta}),)


NODE_CLASS_MAPPINGS = {"FastSDEExponentialPC": ExponentialPCSampler, "FastSDEAdaptive": AdaptiveSampler}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FastSDEExponentialPC": "fastsde: Exponential PC",
    "FastSDEAdaptive": "fastsde: steps from a tolerance",
}

for _name, _function in SAMPLERS.items():
    setattr(sampling, f"sample_{_name}", _function)
    # One list or two, by version.
    for _names in (comfy.samplers.KSampler.SAMPLERS, comfy.samplers.SAMPLER_NAMES):
        if _name not in _names:
            _names.append(_name)
