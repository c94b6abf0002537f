"""Tiny pipelines that make pictures: a function of each class gives (pipe, arguments of its call)."""

import diffusers
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_parts import IMAGE, SMALL, TEXT, embeddings, img2img, network, normal, ones, part, vae


def sd_scheduler():
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",  # others start at lower times than they say noise is, far lower with few steps
    )


def of_sd(kind, **more):
    parts = {**tiny.stable_diffusion(sd_scheduler()).components, "requires_safety_checker": False, **more}
    return getattr(diffusers, kind)(**parts)


def controlnet():
    net = network(
        "ControlNetModel",
        in_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
    )
    return of_sd("StableDiffusionControlNetPipeline", controlnet=net), {**TEXT, "image": IMAGE}


def flux2():
    transformer = network(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
    )
    autoencoder = part(
        "AutoencoderKLFlux2",
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.Flux2Pipeline(scheduler, autoencoder, None, None, transformer)
    return pipe, embeddings(5, 16, negative=False) | SMALL


def qwen(kind="QwenImagePipeline", **more):
    transformer = network(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = part(
        "AutoencoderKLQwenImage",
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    pipe = getattr(diffusers, kind)(scheduler, autoencoder, None, None, transformer)
    return pipe, {
        "prompt_embeds": normal(1, 5, 16),
        "prompt_embeds_mask": ones(1, 5),
        "negative_prompt_embeds": normal(1, 5, 16, seed=1),
        "negative_prompt_embeds_mask": ones(1, 5),
        **SMALL,
        **more,
    }


def chroma():
    transformer = network(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.ChromaPipeline(scheduler, vae(), None, None, transformer)
    return pipe, {k: v.float() for k, v in embeddings(5, 32, masks=True).items()} | SMALL


def lumina2():
    transformer = network(
        "Lumina2Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe = diffusers.Lumina2Pipeline(transformer, scheduler, vae(), None, None)
    return pipe, embeddings(5, 8, masks=True) | {"height": 32, "width": 32}


def aura_flow():
    transformer = network(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = diffusers.AuraFlowPipeline(None, None, vae(), transformer, scheduler)
    return pipe, embeddings(5, 32, masks=True) | SMALL


def z_image():
    transformer = network(
        "ZImageTransformer2DModel",
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for name in ("x_pad_token", "cap_pad_token"):  # made without values
            getattr(transformer, name).fill_(1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ZImagePipeline(scheduler, vae(), None, None, transformer)
    rows = {"prompt_embeds": [normal(5, 16)], "negative_prompt_embeds": [normal(5, 16, seed=1)]}
    return pipe, rows | SMALL


def sana():
    transformer = network(
        "SanaTransformer2DModel",
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.SanaPipeline(None, None, None, transformer, scheduler)
    arguments = {"height": 256, "width": 256, "use_resolution_binning": False, "negative_prompt": None}
    return pipe, embeddings(5, 8, masks=True) | arguments


def cogview4():
    transformer = network(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = diffusers.CogView4Pipeline(None, None, vae(), transformer, scheduler)
    return pipe, embeddings(5, 32) | SMALL


def kandinsky(kind, **more):
    unet = network(
        "UNet2DConditionModel",
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    )
    movq = part(
        "VQModel",
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    pipe = getattr(diffusers, kind)(unet, scheduler, movq)
    image = {"image_embeds": normal(1, 16), "negative_image_embeds": normal(1, 16, seed=1)}
    return pipe, image | {"height": 16, "width": 16} | more


def deepfloyd():
    unet = network(
        "UNet2DConditionModel",
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
        variance_type="learned_range",
    )
    pipe = diffusers.IFPipeline(None, None, unet, scheduler, None, None, None, requires_safety_checker=False)
    # Guided, a random network under thresholding is chaotic.
    return pipe, embeddings(5, 32) | SMALL | {"output_type": "pt", "guidance_scale": 1.0}


def ddim():
    # With clipping, DDIM's own loop has no limit that 200 steps come near to; test_diffusers_scheduler.py has a case.
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return diffusers.DDIMPipeline(tiny.unet(), scheduler), {"batch_size": 1, "output_type": "np"}


def flux(**scheduler):
    pipe = tiny.flux_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler or {"shift": 3.0, "use_dynamic_shifting": True})
    return pipe, {**TEXT, **SMALL, "max_sequence_length": 16}


PIPELINES = {
    "StableDiffusionPipeline": lambda: (of_sd("StableDiffusionPipeline"), TEXT),
    "StableDiffusionImg2ImgPipeline": lambda: (
        of_sd("StableDiffusionImg2ImgPipeline"),
        {**TEXT, "image": IMAGE, "strength": 0.5},
    ),
    "StableDiffusionInpaintPipeline": lambda: (
        of_sd("StableDiffusionInpaintPipeline"),
        {**TEXT, **SMALL, "image": IMAGE, "mask_image": IMAGE.convert("L"), "strength": 1.0},
    ),
    "StableDiffusionControlNetPipeline": controlnet,
    "StableDiffusionXLPipeline": lambda: (tiny.sdxl(), TEXT),
    "StableDiffusion3Pipeline": lambda: (tiny.stable_diffusion_3(), {**TEXT, "max_sequence_length": 16}),
    "StableDiffusion3Img2ImgPipeline": lambda: img2img(
        "StableDiffusion3Img2ImgPipeline",
        lambda: (tiny.stable_diffusion_3(), {**TEXT, **SMALL, "max_sequence_length": 16}),
    ),
    "FluxPipeline": flux,
    "FluxImg2ImgPipeline": lambda: img2img("FluxImg2ImgPipeline", lambda: flux(shift=1.0)),
    "Flux2Pipeline": flux2,
    "QwenImagePipeline": qwen,
    "QwenImageImg2ImgPipeline": lambda: qwen("QwenImageImg2ImgPipeline", image=IMAGE, strength=0.5),
    "ChromaPipeline": chroma,
    "Lumina2Pipeline": lumina2,
    "AuraFlowPipeline": aura_flow,
    "ZImagePipeline": z_image,
    "SanaPipeline": sana,
    "CogView4Pipeline": cogview4,
    "PixArtAlphaPipeline": lambda: (
        tiny.pixart_pipeline(),
        {**TEXT, "max_sequence_length": 16, "clean_caption": False, "use_resolution_binning": False},
    ),
    "DiTPipeline": lambda: (tiny.dit_pipeline(), {"class_labels": [1], "output_type": "np"}),
    "DDPMPipeline": lambda: (
        diffusers.DDPMPipeline(tiny.unet(), diffusers.DDPMScheduler(clip_sample=False)),
        {"batch_size": 1, "output_type": "np"},
    ),
    "DDIMPipeline": ddim,
    "KandinskyV22Pipeline": lambda: kandinsky("KandinskyV22Pipeline"),
    "KandinskyV22Img2ImgPipeline": lambda: kandinsky("KandinskyV22Img2ImgPipeline", image=IMAGE, strength=0.5),
    "IFPipeline": deepfloyd,
}
