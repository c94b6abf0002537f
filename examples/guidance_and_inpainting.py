"""The packaged Fashion-MNIST network, with guidance, and with half of each image given.

Run: python examples/guidance_and_inpainting.py [picture.png]

The network is read as any network of diffusers, with a scheduler's configuration. Each row has ten garments, one of
each class: without guidance; with guidance 3; the lower half of the first row drawn again from the upper half, by
`Projection`; the same by `MMPS`.
"""

import sys

import torch
from diffusers import DDPMScheduler
from PIL import Image

import fastsde
from fastsde.score import MMPS, ClassifierFreeGuidance, Clipped, Mask, Projection

packaged = fastsde.pretrained("fashion-mnist")
model = fastsde.from_diffusers(packaged.network, DDPMScheduler(clip_sample=False))  # 1000 betas, epsilon

labels = {"class_labels": torch.arange(10)}
plain = fastsde.sample(model, n=10, rtol=0.05, cond=labels)
guided = ClassifierFreeGuidance(model, scale=3.0, negative={"class_labels": torch.tensor(10)})  # 10 is "no label"
strong = fastsde.sample(guided, n=10, rtol=0.05, cond=labels)

upper = torch.zeros(1, 28, 28)
upper[:, :14] = 1
known = {**labels, "measurement": plain.samples * upper}  # each sample has its own
projected = fastsde.sample(Projection(model, Mask(upper)), n=10, rtol=0.05, seed=1, cond=known)
bounded = Clipped(MMPS(model, Mask(upper), noise_std=0.05))  # in pure noise MMPS can leave the range of data for good
posterior = fastsde.sample(bounded, n=10, rtol=0.05, seed=1, cond=known)

rows = {"plain": plain, "guided": strong, "Projection": projected, "MMPS": posterior}
for name, result in rows.items():
    print(f"{name:10} {result.nfe.double().mean():5.1f} calls, {result.counts()}")
grid = torch.cat([torch.cat(list(r.samples[:, 0]), dim=1) for r in rows.values()])
pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
path = sys.argv[1] if len(sys.argv) > 1 else "guidance_and_inpainting.png"
Image.fromarray(pixels).resize((pixels.shape[1] * 3, pixels.shape[0] * 3), Image.Resampling.NEAREST).save(path)
print(f"written: {path}")
