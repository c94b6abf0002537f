"""`FastSDEPipeline`: a pipeline whose loop is our engine, for code written for diffusers' pipelines."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from fastsde.diffusers.conditions import Prompt
from fastsde.diffusers.loading import load
from fastsde.diffusers.sampling import sample_pipeline
from fastsde.files import read_json
from fastsde.job import EngineState
from fastsde.result import Interrupted

_SETTINGS = "fastsde.json"


def _edits(value: Tensor) -> int:
    """How often a tensor was changed in place; those of inference mode do not count it."""
    return 0 if value.is_inference() else value._version


def _arguments() -> set[str]:
    """What `sample_pipeline` takes by name."""
    parameters = inspect.signature(sample_pipeline).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


class FastSDEPipeline:
    r"""A diffusers pipeline that samples adaptively: its call with `rtol` or `nfe` in place of `num_inference_steps`.

        pipe = FastSDEPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=torch.float16)
        images = pipe.to("cuda")("a lighthouse in fog", rtol=0.05, generator=torch.manual_seed(0)).images

    It holds the pipeline it was made from, `.pipe`, and leaves everything but the loop to it: text encoders, the
    autoencoder, devices, offloading, adapters; attributes that are not its own are those of `.pipe`.

    Args:
        pipe: the pipeline.
        settings: defaults of the call, such as `rtol=0.02`; saved with the pipeline.

    Raises:
        TypeError: for settings that `sample_pipeline` does not have, or cannot be saved.
    """

    def __init__(self, pipe: Any, **settings: Any) -> None:
        unknown = [key for key in settings if key not in _arguments()]
        if unknown:
            raise TypeError(f"sample_pipeline takes no {', '.join(unknown)}.")
        json.dumps(settings)
        self.pipe, self.settings = pipe, settings

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # while copying or unpickling, before __init__
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.pipe).__name__}, {self.settings})"

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> FastSDEPipeline:
        """Loads the pipeline at a folder or a name on the hub, as `fastsde.diffusers.load` does.

        Args:
            source: the folder or the name; settings that were saved with it are taken up.
            options: settings (see the class), and options of `load` and diffusers' `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: as `load`, or if the saved settings are damaged; TypeError if there is only
                a network.
        """
        own = {key: options.pop(key) for key in _arguments() & options.keys()}
        file = Path(source) / _SETTINGS
        kept = read_json(file) if file.is_file() else {}
        if unknown := [key for key in kept if key not in _arguments()]:
            raise ValueError(f"{file} has settings that sample_pipeline does not take: {', '.join(unknown)}.")
        pipe, _ = load(source, **options)
        if not hasattr(pipe, "components"):
            raise TypeError(f"{source} holds a network, not a pipeline; give it to from_diffusers.")
        return cls(pipe, **{**kept, **own})

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Saves the pipeline as diffusers does, loadable without fastsde, and the settings beside it."""
        self.pipe.save_pretrained(str(folder), **options)
        (Path(folder) / _SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")

    def to(self, *args: Any, **kwargs: Any) -> FastSDEPipeline:
        """Moves the pipeline, in place."""
        self.pipe.to(*args, **kwargs)
        return self

    def __call__(
        self,
        prompt: Prompt | None = None,
        *,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **arguments: Any,
    ) -> Any:
        """Draws images.

        Args:
            prompt: as for `sample_pipeline`, like all further arguments.
            callback_on_step_end: `callback(pipe, i, t, kwargs)` after every turn of the engine, with t of shape (B,),
                one time for each sample in flight, and in kwargs their states "latents", and their "index". It may set
                `pipe._interrupt = True` to stop; it may not change the states, which are not one batch at one time.
            callback_on_step_end_tensor_inputs: names of what kwargs holds: "latents", "index", "nfe".
            return_dict: False for a tuple.

        Returns:
            diffusers' `ImagePipelineOutput`, with the `SampleResult` under `.result`.

        Raises:
            ValueError, TypeError, SamplingError: as `sample_pipeline`.
        """
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents", "index", "nfe"}
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs may name latents, index, nfe; got {sorted(unknown)}.")
        arguments = {**self.settings, **arguments}
        if callback_on_step_end is not None:
            if "callback" in arguments:
                raise ValueError("give either callback= or callback_on_step_end=, not both.")
            arguments["callback"] = self._bridge(callback_on_step_end, callback_on_step_end_tensor_inputs)
        bar = getattr(self.pipe, "_progress_bar_config", {})
        try:
            r = sample_pipeline(self.pipe, prompt, **{"progress": not bar.get("disable", False), **arguments})
        except Interrupted as stopped:
            if not getattr(self.pipe, "_interrupt", False):
                raise
            r = stopped.result  # the callback asked for it
        if not return_dict:
            return (r.images,)
        output = ImagePipelineOutput(images=r.images)
        output.result = r.result
        return output

    def _bridge(self, callback: Callable[..., Any], names: Sequence[str]) -> Callable[[EngineState], None]:
        self.pipe._interrupt = False

        def on_turn(state: EngineState) -> None:
            tensors = {"latents": state.x, "index": state.index, "nfe": state.nfe}
            given = {name: tensors[name] for name in names}
            before = {name: _edits(value) for name, value in given.items()}
            answer = callback(self.pipe, state.turn - 1, state.t, dict(given))
            changed = {k for k, v in (answer or {}).items() if v is not tensors.get(k)}
            changed |= {name for name, value in given.items() if _edits(value) != before[name]}
            if changed:
                raise ValueError(
                    f"callback_on_step_end changed {', '.join(sorted(changed))}: samples here are at times of their "
                    "own, and their states cannot be replaced. Guidance belongs into a score model: wrap=."
                )
            if getattr(self.pipe, "_interrupt", False):
                raise KeyboardInterrupt

        return on_turn
