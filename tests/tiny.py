"""Tiny randomly initialised diffusers networks and pipelines of every family, built from configurations."""

import string

import diffusers
import torch
import transformers

SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
"""What a network and its ControlNet share."""


def seeded(build):
    """The same weights in every run."""
    torch.manual_seed(0)
    return build().eval()


def unet(channels=3, size=8, **config):
    return seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            **config,
        )
    )


def text_unet(**config):
    defaults = {"cross_attention_dim": 16, "in_channels": 4, "out_channels": 4}
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **defaults | config,
        )
    )


def sdxl_unet():
    # Six time ids of 4 numbers, beside 16 of the pooled text.
    return text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        cross_attention_dim=32,
    )


def dit(**config):
    return seeded(
        lambda: diffusers.DiTTransformer2DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 2,
                "sample_size": 8,
                "num_embeds_ada_norm": 10,
            }
            | config
        )
    )


def pixart(**config):
    return seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=24,
            sample_size=8,
            caption_channels=32,
            **config,
        )
    )


def sd3():
    return seeded(lambda: diffusers.SD3Transformer2DModel(**SD3))


def vae(**config):
    defaults = {"latent_channels": 4}
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **defaults | config,
        )
    )


def clip_tokenizer():
    letters = list(string.ascii_lowercase)
    tokens = [*letters, *(f"{k}</w>" for k in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={k: i for i, k in enumerate(tokens)}, merges=[], model_max_length=7)


def clip_text(projection=False, width=16):
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return seeded(lambda: kind(config))


def t5_tokenizer():
    letters = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return transformers.T5TokenizerFast(vocab=[(k, -float(i)) for i, k in enumerate(letters)], extra_ids=0)


def t5_text():
    config = transformers.T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return seeded(lambda: transformers.T5EncoderModel(config))


def stable_diffusion(scheduler=None):
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=text_unet(),
        scheduler=scheduler or diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl():
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True),
        tokenizer_2=clip_tokenizer(),
        unet=sdxl_unet(),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def stable_diffusion_3():
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(),
        tokenizer_3=t5_tokenizer(),
        transformer=sd3(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux_pipeline():
    return diffusers.FluxPipeline(
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(),
        transformer=seeded(lambda: diffusers.FluxTransformer2DModel(**FLUX)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def pixart_pipeline():
    return diffusers.PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=vae(),
        transformer=pixart(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def dit_pipeline():
    # The null class of DiTPipeline is number 1000, whatever the network.
    return diffusers.DiTPipeline(dit(num_embeds_ada_norm=1000), vae(), diffusers.DDIMScheduler(clip_sample=False))


def ddpm():
    return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())


PIPELINES = {
    "ddpm": ddpm,
    "dit": dit_pipeline,
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "sd3": stable_diffusion_3,
    "flux": flux_pipeline,
    "pixart": pixart_pipeline,
}
