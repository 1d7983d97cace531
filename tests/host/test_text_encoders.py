"""Text encoders through transformers, and whole pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import dq
from dq.errors import DQError
from dq.host import mark
from dq.layers import packed_layers
from tests.models import same_state

# text encoders, through transformers

T5 = {"vocab_size": 40, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
CLIP = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CLIP |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1}


def text_encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "t5":
        return T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")).eval()
    return CLIPTextModel(CLIPTextConfig(**CLIP)).eval()


@torch.no_grad()
def encode(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(10).reshape(1, 10)).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_text_encoder_quantizes_while_loading_and_reloads_bit_exactly(tmp_path, kind, dtype):
    dense = text_encoder(kind)
    dense.save_pretrained(tmp_path / "base")
    config = dq.DQConfig("int8-weight")
    model = type(dense).from_pretrained(tmp_path / "base", quantization_config=config, dtype=dtype)
    assert len(packed_layers(model)) == len(mark.plan_of(model).layers) >= 12
    assert (encode(model).float() - encode(dense)).norm() / encode(dense).norm() < 0.03
    model.save_pretrained(tmp_path / "q")
    again = type(dense).from_pretrained(tmp_path / "q")
    assert same_state(model, again)
    assert torch.equal(encode(model), encode(again))


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_text_encoder_quantized_after_loading_equals_while_loading(tmp_path, kind):
    dense = text_encoder(kind)
    dense.save_pretrained(tmp_path / "base")
    during = type(dense).from_pretrained(tmp_path / "base", quantization_config=dq.DQConfig("int8-weight"))
    dq.quantize(dense, "int8-weight", progress=False)
    assert same_state(during, dense)
    dense.save_pretrained(tmp_path / "q")
    assert same_state(type(dense).from_pretrained(tmp_path / "q"), during)


@pytest.mark.parametrize("damage", ["missing", "tampered", "truncated"])
def test_damaged_text_encoder_checkpoint_is_refused(tmp_path, damage):
    model = text_encoder("t5")
    dq.quantize(model, "int8-weight", progress=False)
    model.save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "encoder.block.0.layer.0.SelfAttention.q"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    if damage == "missing":
        del state[f"{name}.scale"]
    if damage == "tampered":
        state[f"{name}.weight"].neg_()
    save_file(state, path, metadata=metadata)
    if damage == "truncated":
        with path.open("r+b") as file:
            file.truncate(1000)
    message = {"missing": f"lacks tensor '{name}.scale'", "tampered": f"'{name}.weight': its bytes"}
    with pytest.raises(DQError, match=message.get(damage, "is missing or damaged")):
        T5EncoderModel.from_pretrained(tmp_path)


def test_dequantized_text_encoder_saves_as_an_ordinary_one(tmp_path):
    model = text_encoder("t5")
    dq.quantize(model, "int8-weight", progress=False)
    before = encode(model)
    model.dequantize()
    model.save_pretrained(tmp_path)
    again = T5EncoderModel.from_pretrained(tmp_path)
    assert not packed_layers(again)
    assert torch.allclose(encode(again), before, atol=1e-5)


# pipelines


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A FLUX pipeline with small random parts and no tokenizers, on disk."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=1, norm_num_groups=8, shift_factor=0.0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    parts = {"text_encoder": text_encoder("clip"), "text_encoder_2": text_encoder("t5")}
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, tokenizer=None, tokenizer_2=None, transformer=transformer, **parts
    )
    folder = str(tmp_path_factory.mktemp("pipeline"))
    pipe.save_pretrained(folder)
    return folder


def open_pipeline(folder, **options) -> FluxPipeline:
    absent = dict.fromkeys(("tokenizer", "tokenizer_2", "feature_extractor", "image_encoder"))
    return FluxPipeline.from_pretrained(folder, **absent, **options)


def draw(pipe: FluxPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": encode(pipe.text_encoder_2), "pooled_prompt_embeds": encode(pipe.text_encoder)[:, 0]}
    generator = torch.Generator().manual_seed(0)
    return pipe(**prompts, height=8, width=8, num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.parametrize("how", ["mapping", "backend"])
def test_pipeline_quantizes_while_loading_and_reloads_the_same_pictures(tmp_path, pipeline, how):
    parts = ["transformer", "text_encoder_2"]
    if how == "mapping":
        config = PipelineQuantizationConfig(quant_mapping=dict.fromkeys(parts, dq.DQConfig("int8")))
    else:
        config = PipelineQuantizationConfig("dq", {"recipe": "int8"}, components_to_quantize=parts)
    pipe = open_pipeline(pipeline, quantization_config=config)
    assert all(packed_layers(getattr(pipe, part)) for part in parts)
    assert not packed_layers(pipe.text_encoder)
    picture = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(open_pipeline(tmp_path)), picture)


def test_saved_pipeline_with_quantized_text_encoder_reloads_the_same_pictures(tmp_path, pipeline):
    pipe = open_pipeline(pipeline)
    dq.quantize(pipe, "int8", components={"text_encoder": "int8-weight"}, progress=False)
    picture = draw(pipe)
    dq.save(pipe, tmp_path / "out")
    assert torch.equal(draw(open_pipeline(tmp_path / "out")), picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100}
TIED = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(10).reshape(1, 10)
    return model(ids, **({"decoder_input_ids": ids} if isinstance(model, T5ForConditionalGeneration) else {})).logits


@pytest.mark.parametrize("name", TIED)
def test_tied_output_heads_stay_tied(tmp_path, name):
    torch.manual_seed(0)
    dense = TIED[name]().eval()
    wanted = logits(dense)
    dense.save_pretrained(tmp_path / "base")
    during = type(dense).from_pretrained(tmp_path / "base", quantization_config=dq.DQConfig("int8-weight")).eval()
    dq.quantize(dense, "int8-weight", progress=False)
    dense.save_pretrained(tmp_path / "q")
    again = type(dense).from_pretrained(tmp_path / "q").eval()
    for model in (during, dense, again):
        assert model.lm_head.weight is model.get_input_embeddings().weight and "lm_head" not in packed_layers(model)
        assert torch.equal(logits(model), logits(dense))
    assert (logits(dense) - wanted).norm() < 0.03 * wanted.norm()
