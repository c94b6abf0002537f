"""The network of the packaged model: diffusers' UNet2DModel, in a small configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def small_unet(image_size: int, channels: int, num_classes: int | None = None) -> UNet2DModel:
    """A UNet of 2.2 million parameters for small images: three resolutions, attention on the coarsest.

    Args:
        image_size: height and width in pixels, divisible by 4.
        channels: image channels.
        num_classes: labels 0 .. num_classes - 1, and one more for "no label"; None for an unconditional network.

    Raises:
        ValueError: if `image_size` is not divisible by 4.
    """
    from diffusers import UNet2DModel

    if image_size % 4:
        raise ValueError(f"image_size must be divisible by 4 (two halvings); got {image_size}.")
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(32, 64, 112),
        norm_num_groups=8,
        attention_head_dim=28,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
