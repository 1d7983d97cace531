"""Diffusers, transformers and peft know of dq whichever is imported first, each tried in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dq
from pipelines import tiny

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("torch", "diffusers", "transformers", "peft", "accelerate", "torchao")
COMMON = f"""
import sys
from pathlib import Path
folder = Path({{folder!r}})

def there():
    return [name for name in {HOSTS!r} if name in sys.modules]

def packed(model):
    from dq.layers import packed_layers
    return len(packed_layers(model))

def refused(call, what):
    try:
        call()
    except ValueError as error:
        assert type(error).__name__ == "DQError" and what in str(error), error
    else:
        raise AssertionError("not refused")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny-pixart with its transformer and its text encoder quantized, saved."""
    out = tmp_path_factory.mktemp("registration") / "int8"
    pipe = tiny.load("tiny-pixart")
    dq.quantize(pipe, "int4-weight", components={"text_encoder": "int8-weight"}, progress=False)
    dq.save(pipe, out)
    return out


def run(folder, code: str) -> None:
    """Run code in a fresh process; `folder` is a saved pipeline."""
    text = COMMON.format(folder=str(folder)) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_dq_first_then_diffusers_then_peft(folder, tmp_path):
    run(
        folder,
        f"""
        import dq
        assert there() == [], there()
        from diffusers import PipelineQuantizationConfig
        assert "diffusers.models.modeling_utils" not in sys.modules and "dq.host.config" not in sys.modules
        wanted = PipelineQuantizationConfig(quant_backend="dq", quant_kwargs={{"recipe": "int8"}})
        assert type(wanted._resolve_quant_config(True, "transformer")) is dq.DQConfig

        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert packed(pipe.transformer) and packed(pipe.text_encoder) and "dq.api" not in sys.modules
        name = "transformer_blocks.0.attn1.to_q"
        import peft
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[name]), pipe.transformer)
        adapted = pipe.transformer.get_submodule(name)
        assert type(adapted).__name__ == "PackedLinearAdapter"
        refused(lambda: pipe.transformer.save_pretrained({str(tmp_path)!r}), "has adapters attached")

        import diffusers.loaders.lora_pipeline as lora
        shape = lora.FluxLoraLoaderMixin._calculate_module_shape(None, adapted.base_layer)
        assert shape == adapted.base_layer.plan.shape != adapted.base_layer.weight.shape
        from dq.host import later
        assert later._finder not in sys.meta_path
        homes = ("diffusers.quantizers.auto", "transformers.modeling_utils", "peft.tuners.lora.model")
        assert not [home for home in homes if type(sys.modules[home].__spec__.loader) is later._Loader]
        """,
    )


def test_dq_last(folder, tmp_path):
    run(
        folder,
        f"""
        import peft
        from diffusers import AutoModel
        from transformers import T5EncoderModel
        import dq
        assert not [name for name in sys.modules if name in ("dq.layers", "dq.plan")]
        encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
        model = AutoModel.from_pretrained(str(folder / "transformer"))
        assert packed(encoder) and packed(model)
        for name, each in (("encoder", encoder), ("model", model)):
            each.save_pretrained(Path({str(tmp_path)!r}) / name)
        assert packed(AutoModel.from_pretrained({str(tmp_path / "model")!r})) == packed(model)
        """,
    )


def test_transformers_only(folder, tmp_path):
    run(
        folder,
        f"""
        import dq
        from transformers import T5Config, T5EncoderModel
        plain = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
        plain.save_pretrained({str(tmp_path)!r})
        assert "diffusers" not in sys.modules and "dq.plan" not in sys.modules, "for a model that is not dq's"
        assert packed(T5EncoderModel.from_pretrained(folder / "text_encoder"))
        """,
    )
