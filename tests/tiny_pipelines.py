"""Tiny pipelines of many classes with random weights: what each is built of, and a call that ends in its last state.

Text goes in as embeddings where a pipeline takes them, so that no tokenizer and no encoder is needed.
"""

import diffusers
import numpy as np
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import fastsde
from fastsde.diffusers import FastSDEScheduler, decode_latents

IMAGE = Image.fromarray((np.indices((16, 16)).sum(0)[..., None] * [8, 6, 4]).astype(np.uint8))
SMALL = {"height": 16, "width": 16}
TEXT = {"prompt": "a red cat"}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


def embeddings(tokens, width, *, masks=False, negative=True):
    """Arguments of a call in the place of prompts."""
    names = ["prompt", "negative_prompt"][: 1 + negative]
    given = {f"{name}_embeds": normal(1, tokens, width, seed=k) for k, name in enumerate(names)}
    return given | ({f"{name}_attention_mask": ones(1, tokens) for name in names} if masks else {})


def network(kind, **config):
    """With weights of a size at which a random network says something of its input, and nothing left at zero."""
    made = tiny.seeded(lambda: getattr(diffusers, kind)(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if not torch.isfinite(parameter).all() or not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


def part(kind, **config):
    return tiny.seeded(lambda: getattr(diffusers, kind)(**config))


def vae(**config):
    return part(
        "AutoencoderKL",
        **{
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
        }
        | config,
    )


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


def wan():
    transformer = network(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    autoencoder = part(
        "AutoencoderKLWan",
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(None, None, autoencoder, scheduler, transformer)
    return pipe, embeddings(5, 32) | {"height": 32, "width": 32, "num_frames": 5}


def ltx():
    transformer = network(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = part(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    pipe = diffusers.LTXPipeline(scheduler, autoencoder, None, None, transformer)
    return pipe, embeddings(5, 32, masks=True) | {"height": 32, "width": 32, "num_frames": 9}


def hunyuan_video():
    transformer = network(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    autoencoder = part(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, autoencoder, scheduler, None, None)
    text = embeddings(5, 16, masks=True, negative=False) | {"pooled_prompt_embeds": normal(1, 8)}
    return pipe, text | {"height": 16, "width": 16, "num_frames": 5}


def mochi():
    transformer = network(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    autoencoder = part(
        "AutoencoderKLMochi",
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = diffusers.MochiPipeline(scheduler, autoencoder, None, None, transformer)
    return pipe, embeddings(16, 32, masks=True) | {**SMALL, "num_frames": 7}


def cogvideox():
    transformer = network(
        "CogVideoXTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
    )
    autoencoder = part(
        "AutoencoderKLCogVideoX",
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    pipe = diffusers.CogVideoXPipeline(None, None, autoencoder, transformer, scheduler)
    return pipe, embeddings(16, 32) | {**SMALL, "num_frames": 9}


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


def stable_audio():
    transformer = network(
        "StableAudioDiTModel",
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    scheduler = diffusers.CosineDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    autoencoder = part(
        "AutoencoderOobleck",
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    pipe = diffusers.StableAudioPipeline(autoencoder, None, None, None, transformer, scheduler)
    return pipe, {}  # needs embeddings of its own projection; its scheduler is refused before


def cosmos():
    transformer = network(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    autoencoder = part(
        "AutoencoderKLCosmos",
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )

    class Checker(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def check_text_safety(self, *args):
            return True

        def check_video_safety(self, video):
            return video

    pipe = diffusers.CosmosTextToWorldPipeline(None, None, transformer, autoencoder, scheduler, Checker())
    return pipe, embeddings(5, 32) | {"height": 32, "width": 32, "num_frames": 9}


def ddim():
    # With clipping, DDIM's own loop has no limit that 200 steps come near to; test_diffusers_scheduler.py has a case.
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return diffusers.DDIMPipeline(tiny.unet(), scheduler), {"batch_size": 1, "output_type": "np"}


def img2img(kind, base, **more):
    pipe, arguments = base()
    return getattr(diffusers, kind)(**pipe.components), {**arguments, "image": IMAGE, "strength": 0.5, **more}


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
    "WanPipeline": wan,
    "LTXPipeline": ltx,
    "HunyuanVideoPipeline": hunyuan_video,
    "MochiPipeline": mochi,
    "CogVideoXPipeline": cogvideox,
    "KandinskyV22Pipeline": lambda: kandinsky("KandinskyV22Pipeline"),
    "KandinskyV22Img2ImgPipeline": lambda: kandinsky("KandinskyV22Img2ImgPipeline", image=IMAGE, strength=0.5),
    "IFPipeline": deepfloyd,
    "StableAudioPipeline": stable_audio,
    "CosmosTextToWorldPipeline": cosmos,
}


READ = {
    "StableDiffusionPipeline": {"prompt": "", "guidance_scale": 1.0},
    "StableDiffusionXLPipeline": {"prompt": "", "guidance_scale": 1.0},
    "StableDiffusion3Pipeline": {"prompt": "", "guidance_scale": 1.0, "max_sequence_length": 256},
    "FluxPipeline": {"prompt": "", "guidance_scale": 3.5, "max_sequence_length": 512},
    "PixArtAlphaPipeline": {"prompt": "", "guidance_scale": 1.0, "max_sequence_length": 120},
    "DiTPipeline": {"class_labels": [1000], "guidance_scale": 1.0},
    "DDPMPipeline": {},
    "DDIMPipeline": {},
    "IFPipeline": {"guidance_scale": 1.0},
}
"""What a pipeline is to be asked for to do what `from_diffusers` reads: the empty prompt, or no class, unguided."""
AS_TEXT = ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusion3Img2ImgPipeline",
           "FluxImg2ImgPipeline")  # fmt: skip
"""Pipelines whose network is read as that of the text-to-image pipeline of the same parts."""


def limit_scheduler(scheduler):
    """One whose steps lead to the flow of a pipeline's own, where that adds noise."""
    if isinstance(scheduler, diffusers.DDPMScheduler):
        return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    return scheduler


def last_state(pipe, arguments, steps, seed=0):
    """What the pipeline's own loop ends in, from the noise of a seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    call = {"output_type": "latent", **arguments, "num_inference_steps": steps, "generator": generator}
    with torch.no_grad():
        out = pipe(**call, return_dict=False)[0]
    while isinstance(out, (list, tuple)):
        out = out[0]
    return torch.as_tensor(np.asarray(out)).float()


def read_state(pipe, steps, seed=0):
    """The same from `from_diffusers` and `sample`.

    Raises:
        ValueError, TypeError: where the pipeline is refused.
    """
    flux = isinstance(pipe, diffusers.FluxPipeline)
    model, sde = fastsde.from_diffusers(pipe, **({"event_shape": (4, 8, 8)} if flux else {}))
    noise = torch.randn((1, *model.event_shape), generator=torch.Generator().manual_seed(seed))
    start = noise * model.sde.prior_std if isinstance(sde, fastsde.RectifiedFlow) else noise
    cond = {"encoder_hidden_states": normal(1, 5, 32)} if isinstance(pipe, diffusers.IFPipeline) else None
    x = fastsde.sample(model, sde, x_init=start, nfe=steps, dtype=torch.float32, cond=cond).samples
    if flux:
        x = pipe._pack_latents(x, 1, 4, 8, 8)
    if isinstance(pipe, diffusers.DiTPipeline):
        x = decode_latents(pipe.vae, x)
    return x if hasattr(pipe, "text_encoder") else (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def distance(a, b):
    """|| a - b || / || b ||."""
    return float((a - b).norm() / b.norm())


def drop_in(name, steps, more_steps=None):
    """Distance of the drop-in's last state to the own loop's, and of that with half as many steps.

    Raises:
        ValueError: where the drop-in refuses.
    """
    pipe, arguments = PIPELINES[name]()
    own, ours = pipe.scheduler, FastSDEScheduler.from_config(pipe.scheduler.config)
    if name != "CosmosTextToWorldPipeline":
        pipe.scheduler = limit_scheduler(own)
        half, whole = (last_state(pipe, arguments, n) for n in (steps // 2, steps))
    pipe.scheduler = ours
    return distance(last_state(pipe, arguments, more_steps or steps), whole), distance(half, whole)


def read(name, steps):
    """The same for `from_diffusers`; errors as `read_state`."""
    pipe, arguments = PIPELINES[name]()
    ours = read_state(pipe, min(steps, 100))
    pipe.scheduler = limit_scheduler(pipe.scheduler)
    half, whole = (last_state(pipe, {**arguments, **READ[name]}, n) for n in (steps // 2, steps))
    return distance(ours, whole), distance(half, whole)
