"""A small diffusers pipeline, in its own loop: guided Fashion-MNIST, beside its own scheduler.

Run: python examples/own_pipeline.py [picture.png]

`Garments` is an ordinary diffusers pipeline. It walks the timesteps of its scheduler, and has no line about fastsde.
Rows of ten garments, the first three from the same noise: DDIM with 12 steps; `sample_pipeline` with 12 evaluations;
DDIM with 200 steps; image to image from the row above with strength 0.5 and 8 evaluations.
"""

import sys

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput
from PIL import Image

import fastsde


class Garments(DiffusionPipeline):
    """Class-conditional images with guidance, from noise or from an image."""

    def __init__(self, unet: torch.nn.Module, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        image: torch.Tensor | None = None,
        strength: float = 0.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> ImagePipelineOutput:
        draws = generator if isinstance(generator, list) else [generator] * len(class_labels)
        x = torch.cat([torch.randn(1, 1, 28, 28, generator=g) for g in draws])
        labels = torch.cat([torch.tensor(class_labels), torch.full((len(x),), 10)])  # 10 is "no label"
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        if image is not None:
            timesteps = timesteps[num_inference_steps - int(strength * num_inference_steps) :]
            x = self.scheduler.add_noise(image, x, timesteps[:1])
        for t in self.progress_bar(timesteps):
            given, none = self.unet(torch.cat([x, x]), t, labels).sample.chunk(2)
            x = self.scheduler.step(none + guidance_scale * (given - none), t, x).prev_sample
        return ImagePipelineOutput(images=x.clamp(-1, 1))


packaged = fastsde.pretrained("fashion-mnist")
pipe = Garments(packaged.network, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
pipe.set_progress_bar_config(disable=True)


def noise() -> list[torch.Generator]:
    """The same for every row."""
    return [torch.Generator().manual_seed(k) for k in range(10)]


classes = list(range(10))
few = pipe(classes, num_inference_steps=12, generator=noise()).images
ours = fastsde.sample_pipeline(pipe, class_labels=classes, num_inference_steps=12, generator=noise(), progress=False)
many = pipe(classes, num_inference_steps=200, generator=noise()).images
pictures = {"image": [one[None] for one in many]}
edited = fastsde.sample_pipeline(pipe, class_labels=classes, per_sample=pictures, nfe=16, seed=1, progress=False)

for name, row in (("DDIM, 12 steps", few), ("sample_pipeline, 12 evaluations", ours.images)):
    print(f"{name}: {float((row - many).norm() / many.norm()):.3f} from 200 steps of DDIM, relative")
print(f"joined: {int(ours.result.nfe.sum())} calls in {ours.forwards} forwards")
grid = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in (few, ours.images, many, edited.images)])
pixels = ((grid + 1) * 127.5).round().to(torch.uint8).numpy()
path = sys.argv[1] if len(sys.argv) > 1 else "own_pipeline.png"
Image.fromarray(pixels).resize((pixels.shape[1] * 3, pixels.shape[0] * 3), Image.Resampling.NEAREST).save(path)
print(f"written: {path}")
