"""Tiny pipelines that make sound: a function of each class gives (pipe, arguments of its call)."""

import diffusers
from tiny_parts import network, part


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


PIPELINES = {
    "StableAudioPipeline": stable_audio,
}
