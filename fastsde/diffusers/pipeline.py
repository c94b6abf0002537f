"""`FastSDEPipeline`: a pipeline whose steps are our engine's, for code written for diffusers' pipelines."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from fastsde.diffusers.loading import load
from fastsde.diffusers.sampling import sample_pipeline
from fastsde.files import read_json

_SETTINGS = "fastsde.json"
_STEPS = {"rtol", "atol", "nfe", "controller", "num_inference_steps"}
"""Arguments that say how many steps are taken."""


def _arguments() -> set[str]:
    """What `sample_pipeline` takes by name."""
    parameters = inspect.signature(sample_pipeline).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


class FastSDEPipeline:
    r"""A diffusers pipeline that samples adaptively: its call, with `rtol` or `nfe` too.

        pipe = FastSDEPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=torch.float16)
        images = pipe.to("cuda")("a lighthouse in fog", rtol=0.05, generator=torch.manual_seed(0)).images

    It holds the pipeline it was made from, `.pipe`; attributes that are not its own are those of `.pipe`.

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

    def __call__(self, prompt: Any = None, *, return_dict: bool = True, **arguments: Any) -> Any:
        """Draws samples: what the pipeline's own call returns, of all samples together.

        Args:
            prompt: as for `sample_pipeline`, like all further arguments.
            return_dict: False for a tuple.

        Returns:
            An output of the pipeline's class, with the `PipelineResult` under `.result`; or a tuple of its fields.

        Raises:
            ValueError, TypeError, SamplingError, Interrupted: as `sample_pipeline`.
        """
        bar = getattr(self.pipe, "_progress_bar_config", {})
        settings = {"progress": not bar.get("disable", False), **self.settings}
        if arguments.keys() & _STEPS:  # what this call says of steps is in the place of what was said before
            settings = {key: value for key, value in settings.items() if key not in _STEPS}
        r = sample_pipeline(self.pipe, prompt, **{**settings, **arguments})
        first = next((out for out in r.outputs if out is not None), None)
        if first is None:
            raise RuntimeError(f"no sample came to its end: {r.result.counts()}.")
        fields = {name: r.gather(name) for name, value in vars(first).items() if value is not None}
        if not return_dict:
            return tuple(fields.values())
        output = type(first)(**{**dict.fromkeys(vars(first)), **fields})
        output.result = r
        return output
