"""Tiny pipelines that make pictures: a function of each class gives (pipe, arguments of its call)."""

import diffusers
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from tiny import vae
from tiny_parts import EDIT, IMAGE, MASKED, SMALL, TEXT, assemble, embeddings, img2img, network, normal, ones, part


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
    return assemble(kind, **parts)


def of_sdxl(kind, **more):
    return assemble(kind, **{**tiny.sdxl().components, "add_watermarker": False, **more})


def of_sd3(kind, **more):
    return assemble(kind, **{**tiny.stable_diffusion_3().components, **more})


def sd3_transformer(channels):
    return network("SD3Transformer2DModel", **tiny.SD3 | {"in_channels": channels, "out_channels": channels})


def sd3_controlnet():
    return network("SD3ControlNetModel", **tiny.SD3 | {"num_layers": 1})


def control_unet(**config):
    """A ControlNet beside `tiny.text_unet`."""
    defaults = {"cross_attention_dim": 16}
    return network(
        "ControlNetModel",
        zeros=0.3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
        **defaults | config,
    )


def sdxl_control(kind, **arguments):
    net = control_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        cross_attention_dim=32,
    )
    return of_sdxl(kind, controlnet=net), {**TEXT, **arguments}


def ip_adapter():
    """An adapter of one picture embedding, two tokens of it."""
    pipe = of_sd("StableDiffusionPipeline")
    unet = pipe.unet
    projection = tiny.seeded(lambda: ImageProjection(16, cross_attention_dim=16, num_image_text_embeds=2))
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.config.encoder_hid_dim_type = "ip_image_proj"

    def processor(name):
        width = 16 if name.startswith("mid_block") else 8
        crossed = name.endswith("attn2.processor")
        return IPAdapterAttnProcessor2_0(width, 16, num_tokens=(2,)) if crossed else AttnProcessor2_0()

    torch.manual_seed(0)
    unet.set_attn_processor({name: processor(name) for name in unet.attn_processors})
    # Without and with the picture, for guidance.
    return pipe, {**TEXT, "ip_adapter_image_embeds": [torch.stack([torch.zeros(1, 16), normal(1, 16)])]}


def flux2(kind="Flux2Pipeline", **more):
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
        guidance_embeds=kind == "Flux2Pipeline",
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
    pipe = getattr(diffusers, kind)(scheduler, autoencoder, None, None, transformer)
    guided = kind not in ("Flux2Pipeline", "Flux2KleinKVPipeline")  # by itself, or distilled
    return pipe, embeddings(5, 16, negative=guided) | SMALL | more


QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_vae(width, levels):
    return part(
        "AutoencoderKLQwenImage",
        base_dim=width,
        z_dim=4,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def qwen(kind="QwenImagePipeline", **more):
    transformer, autoencoder = network("QwenImageTransformer2DModel", **QWEN | {"num_layers": 2}), qwen_vae(8, 2)
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


def chroma(kind="ChromaPipeline", **more):
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
    pipe = getattr(diffusers, kind)(scheduler, vae(shift_factor=0.1), None, None, transformer)
    return pipe, {k: v.float() for k, v in embeddings(5, 32, masks=True).items()} | SMALL | more


def lumina2():
    transformer = network(
        "Lumina2Transformer2DModel",
        sample_size=8,
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
    pipe = diffusers.Lumina2Pipeline(transformer, scheduler, vae(shift_factor=0.1), None, None)
    return pipe, embeddings(5, 8, masks=True) | {"height": 32, "width": 32}


def aura_flow():
    transformer = network(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = diffusers.AuraFlowPipeline(None, None, vae(), transformer, scheduler)
    return pipe, embeddings(5, 32, masks=True) | SMALL


def z_image(kind="ZImagePipeline", **more):
    transformer = network(
        "ZImageTransformer2DModel",
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
    pipe = getattr(diffusers, kind)(scheduler, vae(shift_factor=0.1), None, None, transformer)
    rows = {"prompt_embeds": [normal(5, 16)], "negative_prompt_embeds": [normal(5, 16, seed=1)]}
    return pipe, rows | SMALL | more


SANA = {
    "in_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 8,
    "sample_size": 8,
    "num_layers": 1,
}


def sana_transformer(**config):
    return network("SanaTransformer2DModel", out_channels=4, **SANA | config)


def sana_vae():
    return part(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def sana(kind="SanaPipeline", **parts):
    transformer = sana_transformer()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    given = {"tokenizer": None, "text_encoder": None, "vae": sana_vae()}
    given |= {"transformer": transformer, "scheduler": scheduler}
    pipe = assemble(kind, **given | parts)
    arguments = {"height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None}
    return pipe, embeddings(5, 8, masks=True) | arguments


def cogview4(kind="CogView4Pipeline", channels=4, **more):
    transformer = network(
        "CogView4Transformer2DModel",
        in_channels=channels,
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
    pipe = getattr(diffusers, kind)(None, None, vae(), transformer, scheduler)
    return pipe, embeddings(5, 32) | SMALL | more


def kandinsky(kind, config=None, **more):
    unet = network(
        "UNet2DConditionModel",
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
        **{"in_channels": 4} | (config or {}),
    )
    movq = part(
        "VQModel",
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
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


def deepfloyd(kind="IFPipeline", config=None, **more):
    unet = network(
        "UNet2DConditionModel",
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        out_channels=6,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        **{"in_channels": 3} | (config or {}),
    )
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
        variance_type="learned_range",
    )
    names = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    pipe = assemble(
        kind,
        **dict.fromkeys(names),
        unet=unet,
        scheduler=scheduler,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        requires_safety_checker=False,
    )
    # Guided, a random network under thresholding is chaotic.
    sizes = {} if "image" in more else SMALL  # the picture's, but for a larger one
    return pipe, embeddings(5, 32) | sizes | {"output_type": "pt", "guidance_scale": 1.0} | more


def ddim():
    # With clipping, DDIM's own loop has no limit that 200 steps come near to; test_diffusers_scheduler.py has a case.
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return diffusers.DDIMPipeline(tiny.unet(), scheduler), {"batch_size": 1, "output_type": "np"}


def flux(**scheduler):
    pipe = tiny.flux_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler or {"shift": 3.0, "use_dynamic_shifting": True})
    return pipe, {**TEXT, **SMALL, "max_sequence_length": 16}


def of_flux(kind, parts=None, **arguments):
    """Another class of Flux, with text as embeddings."""
    pipe = tiny.flux_pipeline()
    text = {"prompt_embeds": normal(1, 5, 32), "pooled_prompt_embeds": normal(1, 16)}
    given = {**pipe.components, "text_encoder": None, "text_encoder_2": None, **(parts or {})}
    return assemble(kind, **given), text | SMALL | arguments


def flux_transformer(tokens):
    """With `tokens` channels in a token: the packed state's 16 and what is laid beside them."""
    config = tiny.FLUX | {"in_channels": tokens, "out_channels": 16}
    return {"transformer": network("FluxTransformer2DModel", **config)}


def flux_controlnet():
    return {"controlnet": network("FluxControlNetModel", **tiny.FLUX | {"axes_dims_rope": [4, 4, 8]})}


def pixart_sigma(kind="PixArtSigmaPipeline"):
    transformer = tiny.pixart()
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = getattr(diffusers, kind)(None, None, vae(), transformer, scheduler)
    arguments = {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, embeddings(5, 32, masks=True) | arguments | SMALL


def hunyuan_dit(kind="HunyuanDiTPipeline", **more):
    transformer = network(
        "HunyuanDiT2DModel",
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        hidden_size=16,
        text_len=5,
        text_len_t5=5,
    )
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.03, prediction_type="v_prediction"
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = assemble(
        kind,
        **parts,
        vae=vae(),
        transformer=transformer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )
    texts = embeddings(5, 16, masks=True)
    # Sizes are set to the closest that the network was trained at, unless they are told.
    return pipe, texts | {f"{k}_2": v for k, v in texts.items()} | SMALL | {"use_resolution_binning": False}


def kandinsky3(kind="Kandinsky3Pipeline", **more):
    unet = network(
        "Kandinsky3UNet",
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        block_out_channels=(8, 16),
        cross_attention_dim=4,
        encoder_hid_dim=16,
    )
    movq = part(
        "VQModel",
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_num_groups=4,
    )
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    pipe = assemble(kind, tokenizer=None, text_encoder=None, unet=unet, scheduler=scheduler, movq=movq)
    masks = {"attention_mask": ones(1, 5), "negative_attention_mask": ones(1, 5)}
    return pipe, embeddings(5, 16) | masks | more


def kandinsky5_transformer(conditioned):
    return network(
        "Kandinsky5Transformer3DModel",
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
        visual_cond=conditioned,
    )


def kandinsky5_texts():
    return {
        f"{name}prompt_{what}": value
        for k, name in enumerate(["", "negative_"])
        for what, value in {
            "embeds_qwen": normal(1, 5, 16, seed=k),
            "embeds_clip": normal(1, 16, seed=k),
            "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        }.items()
    }


def kandinsky5():
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = assemble(
        "Kandinsky5T2IPipeline", **parts, transformer=kandinsky5_transformer(False), vae=vae(), scheduler=scheduler
    )
    pipe.resolutions = [(64, 64)]
    return pipe, kandinsky5_texts() | {"height": 64, "width": 64}


def sana_sprint():
    pipe, arguments = sana()
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    pipe = diffusers.SanaSprintPipeline(None, None, pipe.vae, transformer, diffusers.SCMScheduler())
    given = {k: v for k, v in arguments.items() if "negative" not in k}
    return pipe, given | {"intermediate_timesteps": None}


def bria():
    transformer = network(
        "BriaTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[0, 4, 4],
    )
    pipe = diffusers.BriaPipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae(shift_factor=0.1), None, None)
    return pipe, embeddings(5, 32) | SMALL


def hidream():
    transformer = network(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=32,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    parts = {f"{kind}{k}": None for kind in ("text_encoder", "tokenizer") for k in ("", "_2", "_3", "_4")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts |= {"scheduler": scheduler, "vae": vae(shift_factor=0.1), "transformer": transformer}
    pipe = assemble("HiDreamImagePipeline", **parts)
    pipe.default_sample_size = 8  # sizes are set to its area
    texts = {
        f"{name}{kind}": normal(*shape, seed=k)
        for k, name in enumerate(["", "negative_"])
        for kind, shape in {
            "prompt_embeds_t5": (1, 5, 16),
            "prompt_embeds_llama3": (2, 1, 5, 16),
            "pooled_prompt_embeds": (1, 32),
        }.items()
    }
    return pipe, texts | SMALL


def lumina():
    transformer = network(
        "LuminaNextDiT2DModel",
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=8,
    )
    pipe = diffusers.LuminaPipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae(), None, None)
    return pipe, embeddings(5, 8, masks=True) | SMALL


def ovis():
    transformer = network(
        "OvisImageTransformer2DModel",
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.OvisImagePipeline(scheduler, vae(shift_factor=0.1), None, None, transformer)
    return pipe, embeddings(5, 32) | SMALL | {"negative_prompt": None}


def prx():
    transformer = network(
        "PRXTransformer2DModel",
        in_channels=4,
        context_in_dim=8,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    pipe = diffusers.PRXPipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, vae(shift_factor=0.1)
    )
    masks = {f"{name}_attention_mask": ones(1, 5).bool() for name in ("prompt", "negative_prompt")}
    return pipe, embeddings(5, 8) | masks | SMALL | {"use_resolution_binning": False}


def glm_image():
    transformer = network(
        "GlmImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=16,
    )
    autoencoder = vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = diffusers.GlmImagePipeline(None, None, None, None, autoencoder, transformer, scheduler)
    # The tokens of the language model that plans the picture, one for each 2 x 2 of the state.
    return pipe, embeddings(5, 32) | {"prior_token_ids": torch.arange(16)[None], "height": 16, "width": 16}


def cogview3():
    transformer = network(
        "CogView3PlusTransformer2DModel",
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=4.0, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    pipe = diffusers.CogView3PlusPipeline(None, None, vae(), transformer, scheduler)
    return pipe, embeddings(5, 32) | SMALL


def hunyuan_image():
    transformer = network(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    autoencoder = part(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=32,
        scaling_factor=0.5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = assemble(
        "HunyuanImagePipeline",
        **{name: None for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "ocr_guider")},
        scheduler=scheduler,
        vae=autoencoder,
        transformer=transformer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    texts = {
        f"{name}_embeds{k}": normal(1, 5, 16, seed=seed)
        for seed, (name, k) in enumerate((n, k) for n in ("prompt", "negative_prompt") for k in ("", "_2"))
    }
    masks = {f"{name}_embeds_mask{k}": ones(1, 5) for name in ("prompt", "negative_prompt") for k in ("", "_2")}
    return pipe, texts | masks | {"height": 32, "width": 32}


def latent_upscale():
    unet = network(
        "UNet2DConditionModel",
        act_fn="gelu",
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],
        time_cond_proj_dim=2 * 64 + 16,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=16,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        in_channels=8,
        mid_block_type=None,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    )
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="sample")
    pipe = of_sd("StableDiffusionLatentUpscalePipeline", unet=unet, scheduler=scheduler)
    # The pooled text is width 16; 64 more come from the level at which the picture is noised.
    return pipe, {**TEXT, "image": IMAGE}


class Pooling(torch.nn.Module):
    """An encoder that costs nothing: the means of square patches, repeated to `channels`."""

    def __init__(self, size, channels):
        super().__init__()
        self.size, self.channels = size, channels

    def forward(self, x, **_):
        x = torch.nn.functional.avg_pool3d(x, (1, self.size, self.size))
        return x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1, -1)


def qwen_edit(kind, **more):
    pipe, arguments = qwen()
    # Pictures are set to an area of 1024 x 1024 before they are encoded.
    autoencoder = qwen_vae(2, 7)
    autoencoder.encoder = Pooling(64, 8)
    pipe = assemble(kind, **{**pipe.components, "vae": autoencoder, "processor": None})
    return pipe, {**arguments, "image": IMAGE, "height": 256, "width": 256, **more}


def krea2():
    transformer = network(
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    pipe, arguments = qwen()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipe = assemble("Krea2Pipeline", **{**pipe.components, "transformer": transformer, "scheduler": scheduler})
    texts = {"prompt_embeds": normal(1, 5, 2, 16), "negative_prompt_embeds": normal(1, 5, 2, 16, seed=1)}
    masks = {f"{name}_mask": ones(1, 5).bool() for name in texts}
    return pipe, arguments | texts | masks


def nucleus():
    transformer = network("NucleusMoEImageTransformer2DModel", moe_enabled=False, capacity_factors=[8.0], **QWEN)
    pipe, arguments = qwen()
    given = {**pipe.components, "transformer": transformer, "processor": None}
    return assemble("NucleusMoEImagePipeline", **given), arguments


def qwen_controlnet():
    net = network("QwenImageControlNetModel", zeros=0.1, **QWEN)
    pipe, arguments = qwen()
    pipe = assemble("QwenImageControlNetPipeline", **pipe.components, controlnet=net)
    return pipe, {**arguments, "control_image": IMAGE}


def sana_controlnet():
    net = network("SanaControlNetModel", zeros=0.3, **SANA)
    pipe, arguments = sana("SanaControlNetPipeline", controlnet=net, transformer=sana_transformer(num_layers=2))
    return pipe, arguments | {"control_image": IMAGE}


def adapter():
    """A T2I adapter: features of a picture, computed once, added in the UNet."""
    net = network("T2IAdapter", in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2)
    return of_sd("StableDiffusionAdapterPipeline", adapter=net), {**TEXT, "image": IMAGE}


def ernie():
    transformer = network(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    autoencoder = flux2()[0].vae
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ErnieImagePipeline(transformer, autoencoder, None, None, scheduler)
    rows = {"prompt_embeds": [normal(5, 16)], "negative_prompt_embeds": [normal(5, 16, seed=1)]}
    return pipe, rows | {"height": 16, "width": 16}


PIPELINES = {
    "StableDiffusionPipeline": lambda: (of_sd("StableDiffusionPipeline"), TEXT),
    "StableDiffusionImg2ImgPipeline": lambda: (of_sd("StableDiffusionImg2ImgPipeline"), {**TEXT, **EDIT}),
    "StableDiffusionInpaintPipeline": lambda: (of_sd("StableDiffusionInpaintPipeline"), {**TEXT, **SMALL, **MASKED}),
    "StableDiffusionPipeline, IP-Adapter": ip_adapter,
    "StableDiffusionControlNetPipeline": lambda: (
        of_sd("StableDiffusionControlNetPipeline", controlnet=control_unet()),
        {**TEXT, "image": IMAGE},
    ),
    "StableDiffusionControlNetImg2ImgPipeline": lambda: (
        of_sd("StableDiffusionControlNetImg2ImgPipeline", controlnet=control_unet()),
        {**TEXT, **EDIT, "control_image": IMAGE},
    ),
    "StableDiffusionControlNetInpaintPipeline": lambda: (
        of_sd("StableDiffusionControlNetInpaintPipeline", controlnet=control_unet()),
        {**TEXT, **MASKED, **SMALL, "control_image": IMAGE},
    ),
    "StableDiffusionPAGPipeline": lambda: (of_sd("StableDiffusionPAGPipeline"), TEXT),
    "StableDiffusionPAGImg2ImgPipeline": lambda: (of_sd("StableDiffusionPAGImg2ImgPipeline"), {**TEXT, **EDIT}),
    "StableDiffusionInstructPix2PixPipeline": lambda: (
        of_sd("StableDiffusionInstructPix2PixPipeline", unet=tiny.text_unet(in_channels=8)),
        {**TEXT, "image": IMAGE},
    ),
    "StableDiffusionUpscalePipeline": lambda: (
        of_sd(
            "StableDiffusionUpscalePipeline",
            unet=tiny.text_unet(in_channels=7, num_class_embeds=1000),
            low_res_scheduler=diffusers.DDPMScheduler(),
        ),
        {**TEXT, "image": IMAGE},
    ),
    "LatentConsistencyModelPipeline": lambda: (
        of_sd(
            "LatentConsistencyModelPipeline",
            unet=tiny.text_unet(time_cond_proj_dim=8),
            scheduler=diffusers.LCMScheduler(),
        ),
        TEXT,
    ),
    "StableDiffusionXLPipeline": lambda: (tiny.sdxl(), TEXT),
    "StableDiffusionXLImg2ImgPipeline": lambda: (of_sdxl("StableDiffusionXLImg2ImgPipeline"), {**TEXT, **EDIT}),
    "StableDiffusionXLInpaintPipeline": lambda: (
        of_sdxl("StableDiffusionXLInpaintPipeline"),
        {**TEXT, **MASKED, **SMALL},
    ),
    "StableDiffusionXLControlNetPipeline": lambda: sdxl_control("StableDiffusionXLControlNetPipeline", image=IMAGE),
    "StableDiffusionXLControlNetImg2ImgPipeline": lambda: sdxl_control(
        "StableDiffusionXLControlNetImg2ImgPipeline", **EDIT, control_image=IMAGE
    ),
    "StableDiffusionXLControlNetInpaintPipeline": lambda: sdxl_control(
        "StableDiffusionXLControlNetInpaintPipeline", **MASKED, **SMALL, control_image=IMAGE
    ),
    "StableDiffusionXLPAGPipeline": lambda: (of_sdxl("StableDiffusionXLPAGPipeline"), TEXT),
    "StableDiffusion3Pipeline": lambda: (tiny.stable_diffusion_3(), {**TEXT, "max_sequence_length": 16}),
    "StableDiffusion3Img2ImgPipeline": lambda: img2img(
        "StableDiffusion3Img2ImgPipeline",
        lambda: (tiny.stable_diffusion_3(), {**TEXT, **SMALL, "max_sequence_length": 16}),
    ),
    "StableDiffusion3InpaintPipeline": lambda: (
        of_sd3(
            "StableDiffusion3InpaintPipeline",
            transformer=sd3_transformer(16),
            vae=vae(shift_factor=0.06, latent_channels=16),
        ),
        {**TEXT, **SMALL, **MASKED, "max_sequence_length": 16},
    ),
    "StableDiffusion3ControlNetPipeline": lambda: (
        of_sd3("StableDiffusion3ControlNetPipeline", controlnet=sd3_controlnet()),
        {**TEXT, "max_sequence_length": 16, "control_image": IMAGE},
    ),
    "StableDiffusion3PAGPipeline": lambda: (
        of_sd3("StableDiffusion3PAGPipeline", pag_applied_layers="1"),
        {**TEXT, "max_sequence_length": 16},
    ),
    "FluxPipeline": flux,
    "FluxImg2ImgPipeline": lambda: img2img("FluxImg2ImgPipeline", lambda: flux(shift=1.0)),
    "FluxInpaintPipeline": lambda: of_flux("FluxInpaintPipeline", **MASKED),
    "FluxFillPipeline": lambda: of_flux("FluxFillPipeline", flux_transformer(16 + 16 + 16), **MASKED),
    "FluxControlPipeline": lambda: of_flux("FluxControlPipeline", flux_transformer(16 + 16), control_image=IMAGE),
    "FluxControlImg2ImgPipeline": lambda: of_flux(
        "FluxControlImg2ImgPipeline", flux_transformer(16 + 16), **EDIT, control_image=IMAGE
    ),
    "FluxControlInpaintPipeline": lambda: of_flux(
        "FluxControlInpaintPipeline", flux_transformer(16 + 16), **MASKED, control_image=IMAGE
    ),
    "FluxKontextPipeline": lambda: of_flux("FluxKontextPipeline", image=IMAGE, max_area=256, _auto_resize=False),
    "FluxControlNetPipeline": lambda: of_flux("FluxControlNetPipeline", flux_controlnet(), control_image=IMAGE),
    "FluxControlNetImg2ImgPipeline": lambda: of_flux(
        "FluxControlNetImg2ImgPipeline", flux_controlnet(), **EDIT, control_image=IMAGE
    ),
    "FluxControlNetInpaintPipeline": lambda: of_flux(
        "FluxControlNetInpaintPipeline", flux_controlnet(), **MASKED, control_image=IMAGE
    ),
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": lambda: flux2("Flux2KleinPipeline"),
    "Flux2KleinInpaintPipeline": lambda: flux2("Flux2KleinInpaintPipeline", **MASKED),
    "QwenImagePipeline": qwen,
    "QwenImageImg2ImgPipeline": lambda: qwen("QwenImageImg2ImgPipeline", image=IMAGE, strength=0.5),
    "QwenImageInpaintPipeline": lambda: qwen("QwenImageInpaintPipeline", **MASKED),
    "ChromaPipeline": chroma,
    "ChromaImg2ImgPipeline": lambda: chroma("ChromaImg2ImgPipeline", **EDIT),
    "Lumina2Pipeline": lumina2,
    "AuraFlowPipeline": aura_flow,
    "ZImagePipeline": z_image,
    "ZImageImg2ImgPipeline": lambda: z_image("ZImageImg2ImgPipeline", **EDIT),
    "ZImageInpaintPipeline": lambda: z_image("ZImageInpaintPipeline", **MASKED),
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
    "Kandinsky3Pipeline": lambda: kandinsky3(height=16, width=16),
    "Kandinsky3Img2ImgPipeline": lambda: kandinsky3("Kandinsky3Img2ImgPipeline", **EDIT),
    "Kandinsky5T2IPipeline": kandinsky5,
    "PixArtSigmaPipeline": pixart_sigma,
    "HunyuanDiTPipeline": hunyuan_dit,
    "HunyuanImagePipeline": hunyuan_image,
    "SanaSprintPipeline": sana_sprint,
    "BriaPipeline": bria,
    "HiDreamImagePipeline": hidream,
    "LuminaPipeline": lumina,
    "OvisImagePipeline": ovis,
    "PRXPipeline": prx,
    "GlmImagePipeline": glm_image,
    "CogView3PlusPipeline": cogview3,
    "StableDiffusionLatentUpscalePipeline": latent_upscale,
    "QwenImageEditPipeline": lambda: qwen_edit("QwenImageEditPipeline"),
    "QwenImageEditPlusPipeline": lambda: qwen_edit("QwenImageEditPlusPipeline"),
    "Krea2Pipeline": krea2,
    "NucleusMoEImagePipeline": nucleus,
    "KandinskyV22InpaintPipeline": lambda: kandinsky(
        "KandinskyV22InpaintPipeline", {"in_channels": 9}, image=IMAGE, mask_image=IMAGE.convert("L")
    ),
    "PixArtSigmaPAGPipeline": lambda: pixart_sigma("PixArtSigmaPAGPipeline"),
    "HunyuanDiTPAGPipeline": lambda: hunyuan_dit("HunyuanDiTPAGPipeline"),
    "SanaPAGPipeline": lambda: sana("SanaPAGPipeline"),
    "SanaControlNetPipeline": sana_controlnet,
    "IFImg2ImgPipeline": lambda: deepfloyd("IFImg2ImgPipeline", **EDIT),
    "IFInpaintingPipeline": lambda: deepfloyd("IFInpaintingPipeline", **MASKED),
    "IFSuperResolutionPipeline": lambda: deepfloyd(
        "IFSuperResolutionPipeline", {"in_channels": 6, "class_embed_type": "timestep"}, **SMALL, image=IMAGE
    ),
    "FluxKontextInpaintPipeline": lambda: of_flux(
        "FluxKontextInpaintPipeline", **MASKED, max_area=256, _auto_resize=False
    ),
    "Flux2KleinKVPipeline": lambda: flux2("Flux2KleinKVPipeline", image=IMAGE.resize((64, 64))),
    "QwenImageEditInpaintPipeline": lambda: qwen_edit("QwenImageEditInpaintPipeline", **MASKED),
    "QwenImageControlNetPipeline": qwen_controlnet,
    "CogView4ControlPipeline": lambda: cogview4("CogView4ControlPipeline", 8, control_image=IMAGE),
    "StableDiffusionAdapterPipeline": adapter,
    "LatentConsistencyModelImg2ImgPipeline": lambda: (
        of_sd(
            "LatentConsistencyModelImg2ImgPipeline",
            unet=tiny.text_unet(time_cond_proj_dim=8),
            scheduler=diffusers.LCMScheduler(),
        ),
        {**TEXT, **EDIT},
    ),
    "StableDiffusionXLInstructPix2PixPipeline": lambda: (
        of_sdxl(
            "StableDiffusionXLInstructPix2PixPipeline",
            unet=network("UNet2DConditionModel", **{**tiny.sdxl_unet().config, "in_channels": 8}),
        ),
        {**TEXT, **SMALL, "image": IMAGE},
    ),
    "ErnieImagePipeline": ernie,
}
