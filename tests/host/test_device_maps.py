"""Pipelines and models placed by `device_map`: quantized where they are, saved, and mapped again when loaded.

Cards are made up: maps are planned for memory that is not there.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from accelerate.utils import compute_module_sizes
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from diffusers.models.model_loading_utils import _determine_device_map
from diffusers.pipelines import pipeline_utils
from diffusers.quantizers.auto import DiffusersAutoQuantizer

import dq
from dq.layers import packed_layers, parameter_bytes
from pipelines import tiny
from tests import zoo
from tests.models import FLUX

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


# --- several cards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["int8", "int4-weight", "nvfp4-weight"])
def test_quantizing_while_loading_is_planned_by_packed_bytes(recipe, dtype):
    packed, model = zoo.build(FLUX, dtype=dtype), zoo.build(FLUX, dtype=dtype)
    dq.quantize(packed, recipe, progress=False)
    sizes, full = compute_module_sizes(packed), compute_module_sizes(model)[""]
    room = {0: int(0.6 * sizes[""]), 1: int(0.6 * sizes[""]), "cpu": 10 * full}
    assert sizes[""] < 0.75 * full
    quantizer = DiffusersAutoQuantizer.from_config(dq.DQConfig(recipe), pre_quantized=False)
    quantizer.update_torch_dtype(dtype)
    quantizer.preprocess_model(model=model)

    def taken(by):
        places = _determine_device_map(model, "sequential", dict(room), dtype, [], by)
        return {place: sum(sizes[name] for name in places if places[name] == place) for place in room}

    ours, plain = taken(quantizer), taken(None)
    assert sum(ours.values()) == sizes[""] and all(ours[place] <= room[place] for place in (0, 1))
    assert ours["cpu"] < plain["cpu"], "planned in full precision, less of it finds room on the cards"


def test_a_saved_model_is_planned_by_packed_bytes_in_any_dtype(saved):
    """Scales stay fp32: they count four bytes where everything else is loaded in two."""
    folder, _ = saved
    quantizer = pre_quantized(folder / "transformer")
    model = PixArtTransformer2DModel.from_config(PixArtTransformer2DModel.load_config(folder / "transformer"))
    quantizer.update_torch_dtype(torch.bfloat16)
    quantizer.preprocess_model(model=model.to(torch.bfloat16))
    special = quantizer.get_special_dtypes_update(model, torch.bfloat16)
    counted = compute_module_sizes(model, dtype=torch.bfloat16, special_dtypes=special)
    names = packed_layers(model)
    assert names and all(counted[name] == parameter_bytes(layer) for name, layer in names.items())


def pre_quantized(folder):
    config = PixArtTransformer2DModel.load_config(folder)["quantization_config"]
    return DiffusersAutoQuantizer.from_config(config, pre_quantized=True)


class Planned(Exception):
    """Ends loading when the map is made."""


def planned(folder, room, **options):
    """Where diffusers' balanced map puts the parts of a pipeline on cards of so many bytes."""

    def stop(**given):
        raise Planned(plan(**given))

    plan = pipeline_utils._get_final_device_map
    with mock.patch.object(pipeline_utils, "_get_final_device_map", stop), pytest.raises(Planned) as found:
        DiffusionPipeline.from_pretrained(folder, device_map="balanced", max_memory=room, **options)
    return found.value.args[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_balanced_pipeline_is_planned_by_packed_bytes(saved, dtype):
    """A card that has just the bytes of the saved transformer gets it, one with a byte less does not."""
    folder, _ = saved
    model = PixArtTransformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
    size = parameter_bytes(model) + sum(value.numel() * dtype.itemsize for value in model.buffers())
    assert planned(folder, {0: size, 1: 9}, dtype=dtype)["transformer"] == 0
    assert planned(folder, {0: size - 1, 1: 9}, dtype=dtype).get("transformer") != 0
