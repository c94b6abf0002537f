"""What tiny pipelines are built of: networks and autoencoders from configurations, embeddings, a picture."""

import inspect

import diffusers
import numpy as np
import tiny
import torch
from PIL import Image

IMAGE = Image.fromarray((np.indices((16, 16)).sum(0)[..., None] * [8, 6, 4]).astype(np.uint8))
SMALL = {"height": 16, "width": 16}
TEXT = {"prompt": "a red cat"}
EDIT = {"image": IMAGE, "strength": 0.5}
MASKED = {"image": IMAGE, "mask_image": IMAGE.convert("L"), "strength": 1.0}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


def embeddings(tokens, width, *, masks=False, negative=True):
    """Arguments of a call in the place of prompts."""
    names = ["prompt", "negative_prompt"][: 1 + negative]
    given = {f"{name}_embeds": normal(1, tokens, width, seed=k) for k, name in enumerate(names)}
    return given | ({f"{name}_attention_mask": ones(1, tokens) for name in names} if masks else {})


def network(kind, zeros=0.02, **config):
    """With weights of a size at which a random network says something of its input.

    Parameters that start at zero, as gates and the ends of a ControlNet do, are normal with standard deviation `zeros`.
    """
    made = tiny.seeded(lambda: getattr(diffusers, kind)(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if not torch.isfinite(parameter).all() or not parameter.any():
                parameter.copy_(zeros * torch.randn(parameter.shape, generator=generator))
    return made


def assemble(kind, **parts):
    """A pipeline of the class, of those parts that it has a place for."""
    made = getattr(diffusers, kind)
    places = inspect.signature(made.__init__).parameters
    return made(**{name: value for name, value in parts.items() if name in places})


def part(kind, **config):
    return tiny.seeded(lambda: getattr(diffusers, kind)(**config))


def img2img(kind, base, **more):
    pipe, arguments = base()
    return getattr(diffusers, kind)(**pipe.components), {**arguments, "image": IMAGE, "strength": 0.5, **more}
