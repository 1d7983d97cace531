"""Pipelines and models placed by `device_map`: quantized where they are, saved, and mapped again when loaded."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel

import dq
from pipelines import tiny

CALL = tiny.CALL["tiny-pixart"] | {"num_inference_steps": 2, "output_type": "pt"}


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red star", generator=torch.Generator().manual_seed(0), **CALL).images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """-> folder of a quantized pipeline that was loaded by a device map, and a picture of it."""
    pipe = DiffusionPipeline.from_pretrained(tiny.folder("tiny-pixart"), device_map="cpu", dtype=torch.float32)
    assert pipe.hf_device_map == "cpu"
    dq.quantize(pipe, "int8", progress=False)
    folder, drawn = tmp_path_factory.mktemp("mapped"), picture(pipe)
    pipe.save_pretrained(folder)
    return folder, drawn


def test_a_mapped_pipeline_is_quantized_in_place_and_its_copy_is_mapped_again(saved):
    folder, drawn = saved
    again = DiffusionPipeline.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    assert again.hf_device_map == "cpu" and torch.equal(picture(again), drawn)


def test_a_saved_model_is_spread_over_places_and_draws_the_same(saved, tmp_path):
    folder, drawn = saved
    parts = ("pos_embed", "norm_out", "proj_out", "adaln_single", "caption_projection", "scale_shift_table")
    places = dict.fromkeys(parts, "cpu") | {"transformer_blocks": "disk"}
    model = PixArtTransformer2DModel.from_pretrained(
        folder / "transformer", device_map=places, offload_folder=tmp_path, dtype=torch.float32
    )
    blocks = model.transformer_blocks
    assert all(value.is_meta for value in blocks.parameters()), "they come from the disk in each call"
    pipe = DiffusionPipeline.from_pretrained(folder, transformer=model, dtype=torch.float32)
    assert torch.equal(picture(pipe), drawn) and all(value.is_meta for value in blocks.parameters())


def test_quantizing_while_loading_to_the_disk_is_refused_in_one_line(tmp_path):
    with pytest.raises(dq.DQError, match="device_map puts layers on disk while quantizing") as error:
        PixArtTransformer2DModel.from_pretrained(
            tiny.folder("tiny-pixart") / "transformer",
            device_map={"": "disk"},
            offload_folder=tmp_path,
            quantization_config=dq.DQConfig("int8"),
        )
    assert "\n" not in str(error.value)
