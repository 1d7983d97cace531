"""Pipelines of tiny random parts, one for each file in `pipelines/`, and the small sizes at which the file draws them.

Denoisers come from tests/zoo, tokenizers from the embedded models; text encoders and autoencoders are made here, with
widths that fit the zoo's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
import transformers

from pipelines import tiny
from tests import zoo

WIDTH = 96  # of text embeddings, as the zoo's transformers expect them; the U-Nets take 80
POOLED = 80


@dataclass(frozen=True)
class Parts:
    """A pipeline, changes to a file's CALL that make it quick, and models for further arguments of its `main`."""

    pipe: diffusers.DiffusionPipeline
    call: dict
    extra: dict


BUILDERS: dict[str, Callable[[], Parts]] = {}


def parts(**call) -> Callable:
    """Decorator: files a function that makes a pipeline, or a pipeline and further models, under its name.

    call  changes to the file's CALL
    """

    def add(make: Callable) -> Callable:
        def build() -> Parts:
            made = make()
            pipe, extra = made if isinstance(made, tuple) else (made, {})
            return Parts(pipe, call, extra)

        BUILDERS[make.__name__] = build
        return make

    return add


def seeded(make: Callable) -> torch.nn.Module:
    """What `make` gives, with random weights that are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def words(name: str = "tiny-pixart", length: int = 77):
    """The T5 tokenizer of an embedded model (CLIP's of tiny-sd), padding to `length` tokens where asked to pad."""
    kind = transformers.T5Tokenizer if name == "tiny-pixart" else transformers.CLIPTokenizer
    return kind.from_pretrained(tiny.folder(name) / "tokenizer", model_max_length=length)


def t5(kind: str = "T5", width: int = WIDTH):
    """An encoder of T5's kind, two layers, and its tokenizer."""
    config = {"vocab_size": 128, "d_model": width, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**config, feed_forward_proj="gated-gelu")
    return seeded(lambda: getattr(transformers, f"{kind}EncoderModel")(config)), words()


def clip(width: int, projected: bool = False):
    """A CLIP text model of two layers, with or without projection to the same width, and its tokenizer."""
    config = transformers.CLIPTextConfig(
        vocab_size=448,
        hidden_size=width,
        intermediate_size=128,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return seeded(lambda: kind(config)), words("tiny-sd")


DECODER = {
    "vocab_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def decoder(kind: str, width: int, **more):
    """A decoder-only language model without its head, three layers, and a tokenizer."""
    config = getattr(transformers, f"{kind}Config")(**DECODER, hidden_size=width, **more)
    return seeded(lambda: getattr(transformers, f"{kind}Model")(config)), words()


def vae(latents: int = 4, **more) -> diffusers.AutoencoderKL:
    """The image autoencoder, eight times smaller each way unless told otherwise."""
    levels = more.pop("levels", 4)
    return seeded(
        lambda: diffusers.AutoencoderKL(
            latent_channels=latents,
            block_out_channels=(8,) * levels,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            shift_factor=0.1,
            **more,
        )
    )


def flow(**more) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The scheduler of flow-matching models."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


@parts(height=32, width=32)
def pixart():
    """Text of width 96, latents of 4 channels."""
    encoder, tokenizer = t5()
    transformer = zoo.build("PixArtTransformer2DModel", init="own", use_additional_conditions=False)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtSigmaPipeline(tokenizer, encoder, vae(), transformer, scheduler)


UNET = {
    "cross_attention_dim": 64,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}


def stable_diffusion(kind: str, **changes):
    """A pipeline of Stable Diffusion 1.5's kind."""
    encoder, tokenizer = clip(64)
    return getattr(diffusers, kind)(
        vae=vae(levels=2),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=zoo.build("UNet2DConditionModel", init="own", **UNET, **changes),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@parts()
def sd():
    """Latents of 8 by 8, which is the U-Net's default."""
    return stable_diffusion("StableDiffusionPipeline")


@parts()
def image_to_image():
    """As sd."""
    return stable_diffusion("StableDiffusionImg2ImgPipeline")


@parts()
def inpainting():
    """As sd, with nine channels going in."""
    return stable_diffusion("StableDiffusionInpaintPipeline", in_channels=9)


def stable_diffusion_xl(kind: str, **more):
    """A pipeline of SDXL's kind: text of 16 and 64 columns, the second pooled."""
    first, tokenizer = clip(16)
    second, tokenizer_2 = clip(64, projected=True)
    return getattr(diffusers, kind)(
        vae=vae(levels=2),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=zoo.build("UNet2DConditionModel", init="own"),
        scheduler=diffusers.EulerDiscreteScheduler(),
        **more,
    )


@parts()
def sdxl():
    """Latents of 8 by 8, which is the U-Net's default."""
    return stable_diffusion_xl("StableDiffusionXLPipeline")


@parts()
def controlnet():
    """The U-Net of sdxl, and a ControlNet made from it, given beside it."""
    pipe = stable_diffusion_xl("StableDiffusionXLPipeline")
    guide = seeded(lambda: diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16)))
    return pipe, {"controlnet": guide}


@parts(height=32, width=32, max_sequence_length=16)
def sd3():
    """Two CLIP models of 80 pooled columns together, and T5 of width 96."""
    (first, tokenizer), (second, tokenizer_2), (third, tokenizer_3) = clip(32, True), clip(48, True), t5()
    return diffusers.StableDiffusion3Pipeline(
        transformer=zoo.build("SD3Transformer2DModel", init="own"),
        scheduler=flow(),
        vae=vae(16),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
    )


@parts(height=32, width=32, max_sequence_length=16)
def flux():
    """CLIP of 80 pooled columns, T5 of width 96."""
    (first, tokenizer), (second, tokenizer_2) = clip(POOLED), t5()
    return diffusers.FluxPipeline(
        scheduler=flow(),
        vae=vae(16),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        transformer=zoo.build("FluxTransformer2DModel", init="own"),
    )


@parts(height=32, width=32)
def qwen_image():
    """A Qwen2.5-VL of width 96, of which the pipeline drops the first 34 tokens: those of its own instruction."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 4, 6]}
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    text = DECODER | {"hidden_size": WIDTH, "rope_scaling": rotary, "rope_parameters": rotary}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=sight)
    return diffusers.QwenImagePipeline(
        scheduler=flow(),
        vae=seeded(lambda: diffusers.AutoencoderKLQwenImage(**WAN_VAE)),
        text_encoder=seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=words(),
        transformer=zoo.build("QwenImageTransformer2DModel", init="own"),
    )


@parts(height=32, width=32, max_sequence_length=16, complex_human_instruction=None)
def sana():
    """Gemma of width 96; an autoencoder that is eight times smaller each way."""
    encoder, tokenizer = decoder("Gemma2", WIDTH, head_dim=16)
    halving = {
        "latent_channels": 16,
        "encoder_block_out_channels": (8, 8, 16, 16),
        "decoder_block_out_channels": (8, 8, 16, 16),
        "encoder_layers_per_block": (1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "encoder_qkv_multiscales": ((), (), (), ()),
        "decoder_qkv_multiscales": ((), (), (), ()),
    }
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=seeded(lambda: diffusers.AutoencoderDC(**halving)),
        transformer=zoo.build("SanaTransformer2DModel", init="own"),
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )


@parts(height=32, width=32, max_sequence_length=16)
def lumina():
    """Gemma of width 80."""
    encoder, tokenizer = decoder("Gemma2", 80, head_dim=16)
    transformer = zoo.build("Lumina2Transformer2DModel", init="own")
    return diffusers.Lumina2Pipeline(transformer, flow(), vae(16), encoder, tokenizer)


WAN_VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@parts(height=16, width=16, num_frames=5, max_sequence_length=16)
def wan():
    """Two transformers, the second for the steps below 0.875 of the noise."""
    encoder, tokenizer = t5("UMT5")
    text_only = {"image_dim": None, "added_kv_proj_dim": None}
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=seeded(lambda: diffusers.AutoencoderKLWan(**WAN_VAE)),
        scheduler=flow(shift=3.0),
        transformer=zoo.build("WanTransformer3DModel", init="own", **text_only),
        transformer_2=zoo.build("WanTransformer3DModel", seed=1, init="own", **text_only),
        boundary_ratio=0.875,
    )


@parts(height=32, width=32, num_frames=9, max_sequence_length=16)
def ltx():
    """Latents of 64 channels, 32 times smaller each way."""
    encoder, tokenizer = t5()
    layers = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1, 1), "latent_channels": 64}
    layers |= {"decoder_block_out_channels": (8, 8, 8, 8), "decoder_layers_per_block": (1, 1, 1, 1, 1)}
    return diffusers.LTXPipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=seeded(lambda: diffusers.AutoencoderKLLTXVideo(**layers)),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=zoo.build("LTXVideoTransformer3DModel", init="own"),
    )


@parts(height=16, width=16, num_frames=9, max_sequence_length=16)
def hunyuan_video():
    """Llama of width 96, CLIP of 80 pooled columns."""
    (first, tokenizer), (second, tokenizer_2) = decoder("Llama", WIDTH), clip(POOLED)
    blocks = {f"{way.lower()}_block_types": (f"HunyuanVideo{way}Block3D",) * 4 for way in ("Down", "Up")}
    blocks |= {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16}
    return diffusers.HunyuanVideoPipeline(
        text_encoder=first,
        tokenizer=tokenizer,
        transformer=zoo.build("HunyuanVideoTransformer3DModel", init="own"),
        vae=seeded(lambda: diffusers.AutoencoderKLHunyuanVideo(**blocks)),
        scheduler=flow(shift=7.0),
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
    )


@parts(height=16, width=16, num_frames=9, max_sequence_length=16)
def cogvideox():
    """T5 of width 96; the transformer for text alone."""
    encoder, tokenizer = t5()
    size = {"sample_height": 2, "sample_width": 2, "max_text_seq_length": 16, "ofs_embed_dim": None}
    blocks = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=seeded(lambda: diffusers.AutoencoderKLCogVideoX(**blocks)),
        transformer=zoo.build("CogVideoXTransformer3DModel", init="own", **size),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
