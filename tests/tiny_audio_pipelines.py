"""Tiny pipelines that make sound, alone or beside a video: a function of each gives (pipe, arguments of its call)."""

import diffusers
import tiny
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from tiny import vae
from tiny_image_pipelines import sd_scheduler
from tiny_parts import IMAGE, assemble, embeddings, network, normal, ones, part


def oobleck(**config):
    return part(
        "AutoencoderOobleck",
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
        **config,
    )


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
    projection = tiny.seeded(lambda: StableAudioProjectionModel(8, conditioning_dim=4, min_value=0, max_value=32))
    pipe = diffusers.StableAudioPipeline(
        oobleck(decoder_input_channels=3), None, projection, None, transformer, scheduler
    )
    return pipe, embeddings(5, 8) | {"audio_end_in_s": 2.0}


def stable_audio3():
    transformer = network(
        "StableAudio3DiTModel",
        io_channels=8,
        embed_dim=32,
        depth=1,
        num_heads=2,
        cond_token_dim=8,
        global_cond_dim=8,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=2,
        use_differential_attention=False,
    )
    autoencoder = part(
        "AutoencoderSAME",
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    lengths = tiny.seeded(lambda: StableAudio3DurationEmbedder(output_dim=8, fourier_dim=16))
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0, stochastic_sampling=False)
    pipe = diffusers.StableAudio3Pipeline(autoencoder, None, None, lengths, transformer, scheduler)
    return pipe, embeddings(5, 8) | {"duration": 1.0, "guidance_scale": 3.0}


def vocoder():
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
        initializer_range=0.3,
    )
    return tiny.seeded(lambda: transformers.SpeechT5HifiGan(config))


def clap():
    """An encoder of texts and sounds."""
    text = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sound = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    config = transformers.ClapConfig(
        text_config=text | {"num_attention_heads": 1}, audio_config=sound, projection_dim=16
    )
    return tiny.seeded(lambda: transformers.ClapModel(config))


def audio_ldm(kind, encoder):
    """A UNet over a spectrogram; the sound's embedding in the place of a class."""
    unet = tiny.text_unet(
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
    )
    pipe = assemble(
        kind,
        **dict.fromkeys(("tokenizer", "feature_extractor")),
        text_encoder=encoder,
        vae=vae(in_channels=1, out_channels=1),
        unet=unet,
        scheduler=sd_scheduler(),
        vocoder=vocoder(),
    )
    texts = {"prompt_embeds": normal(1, 16), "negative_prompt_embeds": normal(1, 16, seed=1)}
    return pipe, texts | {"audio_length_in_s": 0.004}


def audio_ldm2():
    unet = tiny.seeded(
        lambda: AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, 8, 16),) * 2,  # attention to itself, and to the two texts
        )
    )
    projection = tiny.seeded(lambda: AudioLDM2ProjectionModel(16, 16, 8))
    config = transformers.GPT2Config(vocab_size=30, n_embd=8, n_head=1, n_layer=1, n_positions=16)
    language = tiny.seeded(lambda: transformers.GPT2LMHeadModel(config))
    pipe = assemble(
        "AudioLDM2Pipeline",
        **dict.fromkeys(("text_encoder", "tokenizer", "tokenizer_2", "feature_extractor")),
        text_encoder_2=tiny.t5_text(),
        language_model=language,
        projection_model=projection,
        vae=vae(in_channels=1, out_channels=1),
        unet=unet,
        scheduler=sd_scheduler(),
        vocoder=vocoder(),
    )
    texts = {
        f"{name}{kind}": value
        for k, name in enumerate(["", "negative_"])
        for kind, value in {
            "prompt_embeds": normal(1, 5, 16, seed=k),
            "generated_prompt_embeds": normal(1, 4, 8, seed=k),
            "attention_mask": ones(1, 5),
        }.items()
    }
    return pipe, texts | {"audio_length_in_s": 0.004}


def ace_step():
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16}
    transformer = network(
        "AceStepTransformer1DModel",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        **attention,
    )
    condition = network(
        "AceStepConditionEncoder",
        hidden_size=16,
        intermediate_size=32,
        text_hidden_dim=32,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **attention,
    )
    pipe = diffusers.AceStepPipeline(
        oobleck(decoder_input_channels=8),
        tiny.t5_text(),
        tiny.t5_tokenizer(),
        transformer,
        condition,
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    return pipe, {"prompt": "a red cat", "lyrics": "la la", "audio_duration": 4.0, "max_text_length": 256}


def ltx2(kind="LTX2Pipeline", **arguments):
    """A video and its sound: two states, two schedulers."""
    transformer = network(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = tiny.seeded(
        lambda: LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=2,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_theta=10000.0,
            rope_double_precision=False,
            causal_temporal_positioning=False,
            rope_type="split",
        )
    )
    autoencoder = part(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    )
    sound = part(
        "AutoencoderKLLTX2Audio",
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    speaker = tiny.seeded(
        lambda: LTX2Vocoder(
            in_channels=16,
            hidden_channels=32,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        )
    )
    pipe = getattr(diffusers, kind)(
        FlowMatchEulerDiscreteScheduler(), autoencoder, sound, None, None, connectors, transformer, speaker
    )
    guidance = {"guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0}
    sounds = {f"audio_{name}": value for name, value in guidance.items()}
    # Two layers of the encoder, side by side.
    texts = embeddings(8, 32, masks=True)
    return pipe, texts | guidance | sounds | {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "frame_rate": 25.0,
    } | arguments


PIPELINES = {
    "StableAudioPipeline": stable_audio,
    "StableAudio3Pipeline": stable_audio3,
    "AudioLDMPipeline": lambda: audio_ldm("AudioLDMPipeline", tiny.clip_text()),
    "MusicLDMPipeline": lambda: audio_ldm("MusicLDMPipeline", clap()),
    "AudioLDM2Pipeline": audio_ldm2,
    "AceStepPipeline": ace_step,
    "LTX2Pipeline": ltx2,
    "LTX2ImageToVideoPipeline": lambda: ltx2("LTX2ImageToVideoPipeline", image=IMAGE, image_crf=0),
}
