"""Tiny pipelines whose loops are other than a flow from noise to a picture.

Priors over embeddings, maps of depth, discrete states, distilled networks, guidance with a memory, pipelines of
pipelines. A function of each gives (pipe, arguments of its call).
"""

import diffusers
import tiny
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.shap_e import ShapERenderer
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tiny import vae
from tiny_image_pipelines import kandinsky, of_sd
from tiny_parts import IMAGE, SMALL, TEXT, assemble, network, normal, part
from tiny_video_pipelines import clip_vision


def kandinsky_prior():
    """Draws the embedding of a picture from that of a text."""
    prior = network(
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=16,
        num_embeddings=7,
        num_layers=1,
    )
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
    )
    seeing = clip_vision()
    pipe = diffusers.KandinskyV22PriorPipeline(
        prior,
        seeing["image_encoder"],
        tiny.clip_text(projection=True),
        tiny.clip_tokenizer(),
        scheduler,
        seeing["image_processor"],
    )
    return pipe, {**TEXT, "output_type": "pt"}


def kandinsky_combined():
    """A prior and a decoder, each with its own loop and scheduler."""
    pipe, _ = kandinsky("KandinskyV22Pipeline")
    first = {f"prior_{name}": value for name, value in kandinsky_prior()[0].components.items()}
    pipe = diffusers.KandinskyV22CombinedPipeline(**pipe.components, **first)
    return pipe, {**TEXT, "height": 16, "width": 16, "prior_num_inference_steps": 2}


def unclip():
    """A prior and a decoder in one loop after the other, each with a scheduler."""
    first = kandinsky_prior()[0]
    unet = network(
        "UNet2DConditionModel",
        **{
            **tiny.text_unet().config,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2 * 16,
        },
    )
    parts = of_sd("StableDiffusionPipeline", unet=unet).components
    pipe = assemble(
        "StableUnCLIPPipeline",
        **parts,
        prior_tokenizer=first.tokenizer,
        prior_text_encoder=first.text_encoder,
        prior=first.prior,
        prior_scheduler=first.scheduler,
        image_normalizer=tiny.seeded(lambda: StableUnCLIPImageNormalizer(embedding_dim=16)),
        image_noising_scheduler=diffusers.DDPMScheduler(),
    )
    return pipe, {**TEXT, **SMALL, "prior_num_inference_steps": 2}


def cascade_unet(**config):
    return network(
        "StableCascadeUNet",
        conditioning_dim=16,
        timestep_ratio_embedding_dim=8,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=16,
        **config,
    )


def cascade_texts():
    return {
        f"{name}prompt_embeds{kind}": normal(1, tokens, 16, seed=k)
        for k, name in enumerate(["", "negative_"])
        for kind, tokens in {"": 5, "_pooled": 1}.items()
    }


def cascade_prior():
    prior = cascade_unet(
        in_channels=4, out_channels=4, switch_level=(False,), clip_image_in_channels=16, clip_text_in_channels=16
    )
    pipe = diffusers.StableCascadePriorPipeline(
        tiny.clip_tokenizer(), tiny.clip_text(projection=True), prior, diffusers.DDPMWuerstchenScheduler()
    )
    return pipe, cascade_texts() | {"height": 128, "width": 128, "output_type": "pt"}


def cascade_decoder():
    decoder = cascade_unet(in_channels=4, out_channels=4, effnet_in_channels=4)
    shrinker = tiny.seeded(lambda: PaellaVQModel(bottleneck_blocks=1, embed_dim=8))
    scheduler = diffusers.DDPMWuerstchenScheduler()
    pipe = diffusers.StableCascadeDecoderPipeline(
        decoder, tiny.clip_tokenizer(), tiny.clip_text(projection=True), scheduler, shrinker
    )
    return pipe, cascade_texts() | {"image_embeddings": normal(1, 4, 2, 2), "guidance_scale": 2.0}


def shap_e():
    """A flat row of numbers that a renderer makes a shape of."""
    prior = network(
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=8,
        num_embeddings=4,
        embedding_proj_dim=16,
        time_embed_dim=16,
        num_layers=1,
        clip_embed_dim=16,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )
    renderer = tiny.seeded(
        lambda: ShapERenderer(param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=8, d_hidden=8, n_output=12)
    )
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True
    )
    pipe = diffusers.ShapEPipeline(prior, tiny.clip_text(projection=True), tiny.clip_tokenizer(), scheduler, renderer)
    return pipe, TEXT


def marigold():
    """The depth of a picture: the picture beside the state, and an ensemble of runs."""
    parts = {**of_sd("StableDiffusionPipeline").components, "unet": tiny.text_unet(in_channels=8)}
    parts["scheduler"] = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    arguments = {"image": IMAGE, "processing_resolution": 0, "ensemble_size": 1, "output_type": "np"}
    return assemble("MarigoldDepthPipeline", **parts), arguments


def amused():
    """States are codes of a book; a step fills in masked ones."""
    transformer = network(
        "UVit2DModel",
        hidden_size=16,
        cond_embed_dim=16,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=16,
        vocab_size=32,
        codebook_size=16,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
    )
    book = part(
        "VQModel",
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=8,
        num_vq_embeddings=16,
        norm_num_groups=4,
        lookup_from_codebook=True,
    )
    pipe = diffusers.AmusedPipeline(
        book,
        tiny.clip_tokenizer(),
        tiny.clip_text(projection=True),
        transformer,
        diffusers.AmusedScheduler(mask_token_id=31),
    )
    return pipe, {**TEXT, **SMALL}


def consistency():
    """Distilled: a network that says the end of its path."""
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return diffusers.ConsistencyModelPipeline(tiny.unet(), scheduler), {"batch_size": 1, "output_type": "pt"}


def dance():
    """A wave, by a UNet in one dimension."""
    unet = network(
        "UNet1DModel",
        block_out_channels=(32, 32),
        extra_in_channels=64,
        sample_size=64,
        sample_rate=64,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    )
    return diffusers.DanceDiffusionPipeline(unet, diffusers.IPNDMScheduler()), {"batch_size": 1}


def gligen():
    """Boxes with phrases, for the first part of the steps."""
    unet = network("UNet2DConditionModel", zeros=1.0, **{**tiny.text_unet().config, "attention_type": "gated"})
    pipe = of_sd("StableDiffusionGLIGENPipeline", unet=unet)
    return pipe, {
        **TEXT,
        "gligen_scheduled_sampling_beta": 0.5,
        "gligen_phrases": ["a cat"],
        "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]],
    }


def semantic():
    """Guidance with a momentum over the steps."""
    pipe = of_sd("SemanticStableDiffusionPipeline")
    return pipe, {**TEXT, "editing_prompt": ["blue"], "edit_warmup_steps": 0, "edit_momentum_scale": 0.3}


def latent_diffusion():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return diffusers.LDMPipeline(vae(), tiny.unet(channels=4), scheduler), {"batch_size": 1, "output_type": "np"}


def repaint():
    """Goes up in time again and again."""
    pipe = diffusers.RePaintPipeline(tiny.unet(), diffusers.RePaintScheduler())
    picture = normal(1, 3, 8, 8).clamp(-1, 1)
    arguments = {"image": picture, "mask_image": (picture[:, :1] > 0).float(), "jump_length": 2, "jump_n_sample": 2}
    return pipe, {**arguments, "output_type": "np"}


def panorama():
    """Overlapping views, each with a copy of the scheduler's state."""
    return of_sd("StableDiffusionPanoramaPipeline"), {**TEXT, "height": 16, "width": 16}


def self_attention_guidance():
    """A hook in the network's middle, and a second call at another state."""
    return of_sd("StableDiffusionSAGPipeline"), {**TEXT, "sag_scale": 0.5}


PIPELINES = {
    "KandinskyV22PriorPipeline": kandinsky_prior,
    "KandinskyV22CombinedPipeline": kandinsky_combined,
    "StableUnCLIPPipeline": unclip,
    "StableCascadePriorPipeline": cascade_prior,
    "StableCascadeDecoderPipeline": cascade_decoder,
    "ShapEPipeline": shap_e,
    "MarigoldDepthPipeline": marigold,
    "AmusedPipeline": amused,
    "ConsistencyModelPipeline": consistency,
    "DanceDiffusionPipeline": dance,
    "StableDiffusionGLIGENPipeline": gligen,
    "SemanticStableDiffusionPipeline": semantic,
    "LDMPipeline": latent_diffusion,
    "RePaintPipeline": repaint,
    "StableDiffusionPanoramaPipeline": panorama,
    "StableDiffusionSAGPipeline": self_attention_guidance,
}
