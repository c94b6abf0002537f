"""Tiny pipelines that make videos: a function of each class gives (pipe, arguments of its call)."""

import diffusers
import tiny
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import vae
from tiny_image_pipelines import kandinsky5_texts, kandinsky5_transformer, sd_scheduler
from tiny_parts import IMAGE, SMALL, TEXT, assemble, embeddings, network, normal, ones, part


def clip_vision(size=16, patch=8):
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    encoder = tiny.seeded(lambda: transformers.CLIPVisionModelWithProjection(config))
    processor = transformers.CLIPImageProcessor(
        crop_size={"height": size, "width": size}, size={"height": size, "width": size}
    )
    return {"image_encoder": encoder, "image_processor": processor}


def wan_transformer(kind="WanTransformer3DModel", **config):
    defaults = {"in_channels": 4, "out_channels": 4, "rope_max_seq_len": 32}
    return network(
        kind,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        **{name: value for name, value in (defaults | config).items() if value is not None},
    )


def wan_vae():
    return part(
        "AutoencoderKLWan",
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def wan_scheduler():
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan(kind="WanPipeline", parts=None, **arguments):
    given = {"tokenizer": None, "text_encoder": None, "vae": wan_vae(), "scheduler": wan_scheduler()}
    pipe = assemble(kind, **given | {"transformer": wan_transformer()} | (parts or {}))
    return pipe, embeddings(5, 32) | {"height": 32, "width": 32, "num_frames": 5} | arguments


def wan_experts():
    """Wan 2.2: a second network below a time."""
    other = wan_transformer(eps=1e-2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.8)
    return wan(parts={"transformer_2": other, "boundary_ratio": 0.875}, guidance_scale_2=3.0)


def wan_of_picture():
    # Beside the state: the picture's, in its first frame, and 4 bits of which frames are given.
    return wan("WanImageToVideoPipeline", {"transformer": wan_transformer(in_channels=12)}, image=IMAGE)


def wan_of_video():
    pipe, arguments = wan("WanVideoToVideoPipeline", video=[IMAGE] * 5, strength=0.5)
    del arguments["num_frames"]
    return pipe, arguments


def wan_vace():
    # A video to keep, one to change and 8 x 8 of the mask beside each place of the state.
    transformer = wan_transformer(
        "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=4 + 4 + 64, qk_norm="rms_norm_across_heads"
    )
    video = {"video": [IMAGE] * 5, "mask": [IMAGE.convert("L")] * 5}
    return wan("WanVACEPipeline", {"transformer": transformer}, **video)


def skyreels():
    return wan("SkyReelsV2Pipeline", {"transformer": wan_transformer("SkyReelsV2Transformer3DModel")})


def skyreels_forcing():
    """A time of its own for every frame."""
    pipe, arguments = wan(
        "SkyReelsV2DiffusionForcingPipeline", {"transformer": wan_transformer("SkyReelsV2Transformer3DModel")}
    )
    return pipe, {"prompt": None, **arguments}


def chrono_edit():
    parts = {"transformer": wan_transformer("ChronoEditTransformer3DModel", in_channels=12, image_dim=16)}
    return wan("ChronoEditPipeline", parts | clip_vision(), image=IMAGE)


def any_flow():
    """A network of two times, for steps of any length."""
    parts = {
        "transformer": wan_transformer("AnyFlowTransformer3DModel", gate_value=0.25, deltatime_type="r"),
        "scheduler": diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    }
    pipe, arguments = wan("AnyFlowPipeline", parts)
    del arguments["negative_prompt_embeds"]  # unguided by itself
    return pipe, arguments


def sana_video():
    transformer = network(
        "SanaVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=8,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.SanaVideoPipeline(None, None, wan_vae(), transformer, scheduler)
    arguments = {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False, "negative_prompt": None}
    return pipe, embeddings(5, 8, masks=True) | arguments


def ltx(kind="LTXPipeline", **arguments):
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
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    if kind == "LTXConditionPipeline":  # times in a line, by its default
        scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = getattr(diffusers, kind)(scheduler, autoencoder, None, None, transformer)
    return pipe, embeddings(5, 32, masks=True) | {"height": 32, "width": 32, "num_frames": 9} | arguments


def hunyuan_transformer(**config):
    defaults = {"in_channels": 4, "guidance_embeds": True}
    return network(
        "HunyuanVideoTransformer3DModel",
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        **defaults | config,
    )


def hunyuan_video(kind="HunyuanVideoPipeline", transformer=None, **arguments):
    autoencoder = part(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_processor")
    pipe = assemble(
        kind,
        **dict.fromkeys(names),
        transformer=transformer or hunyuan_transformer(),
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    text = embeddings(5, 16, masks=True, negative=False) | {"pooled_prompt_embeds": normal(1, 8)}
    return pipe, text | {"height": 16, "width": 16, "num_frames": 5} | arguments


def hunyuan_of_picture(how):
    """The picture beside the state ("latent_concat") or as its first frame ("token_replace")."""
    beside = how == "latent_concat"
    transformer = hunyuan_transformer(
        in_channels=2 * 4 + 1 if beside else 4, guidance_embeds=not beside, image_condition_type=how
    )
    return hunyuan_video("HunyuanVideoImageToVideoPipeline", transformer, image=IMAGE)


def hunyuan_skyreels():
    transformer = hunyuan_transformer(in_channels=2 * 4)
    others = {"negative_" + k: v.flip(-1) for k, v in hunyuan_video()[1].items() if isinstance(v, torch.Tensor)}
    return hunyuan_video("HunyuanSkyreelsImageToVideoPipeline", transformer, image=IMAGE, **others)


def hunyuan_video15():
    transformer = network(
        "HunyuanVideo15Transformer3DModel",
        in_channels=2 * 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    autoencoder = part(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipe = assemble(
        "HunyuanVideo15Pipeline",
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        transformer=transformer,
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    texts = {
        f"{name}prompt_embeds{what}": value
        for k, name in enumerate(["", "negative_"])
        for what, value in {
            "": normal(1, 5, 16, seed=k),
            "_mask": ones(1, 5),
            "_2": normal(1, 5, 16, seed=k),
            "_mask_2": ones(1, 5),
        }.items()
    }
    return pipe, texts | {"height": 16, "width": 16, "num_frames": 5}


def mochi():
    transformer = network(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    autoencoder = part(
        "AutoencoderKLMochi",
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = diffusers.MochiPipeline(scheduler, autoencoder, None, None, transformer)
    return pipe, embeddings(16, 32, masks=True) | {**SMALL, "num_frames": 7}


def cogvideox(kind="CogVideoXPipeline", config=None, **arguments):
    transformer = network(
        "CogVideoXTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=8,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
        **{"in_channels": 4} | (config or {}),
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
    pipe = getattr(diffusers, kind)(None, None, autoencoder, transformer, scheduler)
    return pipe, embeddings(16, 32) | {**SMALL, "num_frames": 9} | arguments


def cogvideox_of_video():
    pipe, arguments = cogvideox("CogVideoXVideoToVideoPipeline", video=[IMAGE] * 9, strength=0.5)
    del arguments["num_frames"]
    return pipe, arguments


class Checker(torch.nn.Module):
    """A safety checker to which all is safe."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, *_):
        return True

    def check_video_safety(self, video):
        return video


def cosmos_transformer(**config):
    defaults = {"in_channels": 4}
    return network(
        "CosmosTransformer3DModel",
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,  # would need torchvision
        **defaults | config,
    )


def cosmos(kind="CosmosTextToWorldPipeline", transformer=None, **arguments):
    autoencoder = part(
        "AutoencoderKLCosmos",
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    transformer = transformer or cosmos_transformer()
    pipe = getattr(diffusers, kind)(None, None, transformer, autoencoder, scheduler, Checker())
    return pipe, embeddings(5, 32) | {"height": 32, "width": 32, "num_frames": 9} | arguments


def cosmos_of_picture():
    transformer = cosmos_transformer(in_channels=5)  # a mask of the given frames beside the state
    return cosmos("CosmosVideoToWorldPipeline", transformer, image=IMAGE.resize((32, 32)))


def cosmos2(kind, scheduler, **arguments):
    channels = 4 if kind == "Cosmos2TextToImagePipeline" else 5
    transformer = cosmos_transformer(in_channels=channels)
    pipe = getattr(diffusers, kind)(None, None, transformer, wan_vae(), scheduler, Checker())
    return pipe, embeddings(5, 32) | {"height": 32, "width": 32} | arguments


def cosmos2_scheduler():
    return FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


def kandinsky5(kind, conditioned, **arguments):
    autoencoder = hunyuan_video()[0].vae
    pipe = assemble(
        kind,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        transformer=kandinsky5_transformer(conditioned),
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    return pipe, kandinsky5_texts() | {"height": 32, "width": 32, "num_frames": 5} | arguments


def allegro():
    transformer = network(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    )
    autoencoder = part(
        "AutoencoderKLAllegro",
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    autoencoder.enable_tiling()  # it decodes in no other way
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    pipe = diffusers.AllegroPipeline(None, None, autoencoder, transformer, scheduler)
    return pipe, embeddings(5, 24, masks=True) | SMALL | {"num_frames": 8, "negative_prompt": None}


def latte():
    transformer = network(
        "LatteTransformer3DModel",
        sample_size=8,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    pipe = diffusers.LattePipeline(None, None, vae(), transformer, sd_scheduler())
    return pipe, embeddings(5, 32) | SMALL | {"video_length": 2, "negative_prompt": None}


def easy_animate():
    transformer = network(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    blocks = ("Spatial{}Block3D", *("SpatialTemporal{}Block3D",) * 3)
    autoencoder = part(
        "AutoencoderKLMagvit",
        down_block_types=tuple(block.format("Down") for block in blocks),
        up_block_types=tuple(block.format("Up") for block in blocks),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    pipe = diffusers.EasyAnimatePipeline(autoencoder, None, None, transformer, FlowMatchEulerDiscreteScheduler())
    return pipe, embeddings(5, 16, masks=True) | SMALL | {"num_frames": 5}


def animate_diff(kind="AnimateDiffPipeline", **arguments):
    """The UNet of Stable Diffusion with layers along the frames."""
    motion = network(
        "MotionAdapter",
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    parts = {**tiny.stable_diffusion(sd_scheduler()).components, "motion_adapter": motion}
    return assemble(kind, **parts), {**TEXT, **SMALL, **arguments}


def stable_video():
    unet = network(
        "UNetSpatioTemporalConditionModel",
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=3 * 8,
        addition_time_embed_dim=8,
    )
    autoencoder = part(
        "AutoencoderKLTemporalDecoder",
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    # It asks for 224 x 224 whatever the encoder.
    seeing = clip_vision(size=224, patch=56)
    pipe = diffusers.StableVideoDiffusionPipeline(
        autoencoder, seeing["image_encoder"], unet, scheduler, seeing["image_processor"]
    )
    return pipe, {**SMALL, "image": IMAGE, "num_frames": 2}


def text_to_video():
    unet = network(
        "UNet3DConditionModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    parts = {**tiny.stable_diffusion(sd_scheduler()).components, "unet": unet}
    return assemble("TextToVideoSDPipeline", **parts), {**TEXT, **SMALL, "num_frames": 2}


def wan_times():
    """Wan 2.2 in one network: a time for every token."""
    return wan(parts={"expand_timesteps": True})


def helios():
    """One trajectory after another, each a section of the video that sees those before it."""
    transformer = wan_transformer(
        "HeliosTransformer3DModel",
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        rope_max_seq_len=None,
    )
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return wan("HeliosPipeline", {"transformer": transformer, "scheduler": scheduler}, num_frames=40)


def motif():
    """Guidance that keeps a momentum over the steps."""
    transformer = network(
        "MotifVideoTransformer3DModel",
        in_channels=2 * 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )
    pipe = assemble(
        "MotifVideoPipeline",
        **dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor")),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=wan_vae(),
        transformer=transformer,
        guider=diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5),
    )
    return pipe, embeddings(5, 32, masks=True) | {"height": 32, "width": 32, "num_frames": 5}


PIPELINES = {
    "WanPipeline": wan,
    "LTXPipeline": ltx,
    "HunyuanVideoPipeline": hunyuan_video,
    "MochiPipeline": mochi,
    "CogVideoXPipeline": cogvideox,
    "CosmosTextToWorldPipeline": cosmos,
    "WanPipeline, two experts": wan_experts,
    "WanImageToVideoPipeline": wan_of_picture,
    "WanVideoToVideoPipeline": wan_of_video,
    "WanVACEPipeline": wan_vace,
    "SkyReelsV2Pipeline": skyreels,
    "SkyReelsV2DiffusionForcingPipeline": skyreels_forcing,
    "ChronoEditPipeline": chrono_edit,
    "AnyFlowPipeline": any_flow,
    "SanaVideoPipeline": sana_video,
    "LTXImageToVideoPipeline": lambda: ltx("LTXImageToVideoPipeline", image=IMAGE),
    "LTXConditionPipeline": lambda: ltx("LTXConditionPipeline", image=IMAGE),
    "HunyuanVideoImageToVideoPipeline": lambda: hunyuan_of_picture("latent_concat"),
    "HunyuanVideoImageToVideoPipeline, first frame": lambda: hunyuan_of_picture("token_replace"),
    "HunyuanSkyreelsImageToVideoPipeline": hunyuan_skyreels,
    "HunyuanVideo15Pipeline": hunyuan_video15,
    "CogVideoXImageToVideoPipeline": lambda: cogvideox(
        "CogVideoXImageToVideoPipeline", {"in_channels": 8}, image=IMAGE
    ),
    "CogVideoXVideoToVideoPipeline": cogvideox_of_video,
    "CosmosVideoToWorldPipeline": cosmos_of_picture,
    "Cosmos2TextToImagePipeline": lambda: cosmos2("Cosmos2TextToImagePipeline", cosmos2_scheduler()),
    "Cosmos2VideoToWorldPipeline": lambda: cosmos2(
        "Cosmos2VideoToWorldPipeline", cosmos2_scheduler(), image=IMAGE, num_frames=5
    ),
    "Cosmos2_5_PredictBasePipeline": lambda: cosmos2(
        "Cosmos2_5_PredictBasePipeline", wan_scheduler(), video=[IMAGE] * 5, num_frames=9
    ),
    "Kandinsky5T2VPipeline": lambda: kandinsky5("Kandinsky5T2VPipeline", False),
    "Kandinsky5I2VPipeline": lambda: kandinsky5("Kandinsky5I2VPipeline", True, image=IMAGE, num_frames=25),
    "AllegroPipeline": allegro,
    "LattePipeline": latte,
    "EasyAnimatePipeline": easy_animate,
    "AnimateDiffPipeline": lambda: animate_diff(num_frames=2),
    "AnimateDiffVideoToVideoPipeline": lambda: animate_diff(
        "AnimateDiffVideoToVideoPipeline", video=[IMAGE] * 2, strength=0.5
    ),
    "StableVideoDiffusionPipeline": stable_video,
    "TextToVideoSDPipeline": text_to_video,
    "WanPipeline, a time for every token": wan_times,
    "HeliosPipeline": helios,
    "MotifVideoPipeline": motif,
}
