"""What stands in a folder after a save that was killed, failed or was told wrong: the old or the new model, whole."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import dq
from dq import disk
from dq.errors import DQError
from dq.host import files, mark
from tests import mutated
from tests.host.test_text_encoders import text_encoder
from tests.models import WEIGHTS, load


def model(recipe: str, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    made = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(width, width) for _ in range(2)])})
    dq.quantize(made, recipe, progress=False)
    return made


def plain(width: int = 64) -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(width, width) for _ in range(2)])})


def hidden(folder: Path) -> list[str]:
    return [path.name for home in (folder, folder.parent) for path in home.glob(".*")]


def killing_at(monkeypatch, step: int) -> None:
    """Kill this process at its `step`-th change of the file system from now on."""
    left = [step]

    def counted(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for home, names in ((Path, ("mkdir", "rename", "replace", "unlink")), (disk.shutil, ("rmtree", "copymode"))):
        for name in names:
            monkeypatch.setattr(home, name, counted(getattr(home, name)))
    monkeypatch.setattr(disk.os, "link", counted(os.link))
    monkeypatch.setattr(disk, "_exchange", counted(disk._exchange))


@pytest.mark.parametrize("way", ["exchanged", "two renames", "standing in it"])
def test_a_save_killed_at_any_step_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, way):
    folder, old, new = tmp_path / "model", model("int8-weight"), model("int4-weight")
    found = set()
    for step in range(1, 30):
        dq.save(old, folder)
        (folder / "mine").mkdir(exist_ok=True)
        (folder / "mine" / "notes.txt").write_text("mine")

        def work(step=step):
            with monkeypatch.context() as patch:
                if way == "two renames":
                    patch.setattr(disk, "_exchange", lambda *_: False)
                if way == "standing in it":
                    os.chdir(folder)
                killing_at(patch, step)
                dq.save(new, "." if way == "standing in it" else folder)

        if (process := os.fork()) == 0:
            work()
            os._exit(0)
        _, status = os.waitpid(process, 0)
        again = dq.load(folder, plain())
        found.add(mark.plan_of(again).recipe)
        assert (folder / "mine" / "notes.txt").read_text() == "mine"
        assert hidden(folder) == [], f"step {step}"
        if not os.WIFSIGNALED(status):
            break
    assert found == {"int8-weight", "int4-weight"} and step > 5


def test_a_running_save_is_not_swept(tmp_path):
    folder = tmp_path / "model"
    dq.save(model("int8-weight"), folder)
    with disk.replacing(folder) as made:
        (made / "one").write_text("1")
        dq.load(folder, plain())
        assert (made / "one").exists() and len(hidden(folder)) == 1
    assert mutated.contents(folder) == {"one": b"1"} and hidden(folder) == []


def test_what_sweeping_may_move_stays_inside_the_folder(tmp_path):
    """A folder from somebody else, made to look as if a save of it had been killed."""
    outside, folder = tmp_path / "outside", tmp_path / "theirs"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    aside = folder / f".theirs-000000000000{disk.ASIDE}"
    (aside / disk.NEW / "link").mkdir(parents=True)
    (aside / disk.NEW / "link" / "new").write_text("new")
    (folder / "link").symlink_to(outside)
    for stale in (["link/kept"], ["../outside/kept"], [str(outside / "kept")], [5], "x"):
        (aside / disk.STALE).parent.mkdir(exist_ok=True, parents=True)
        (aside / disk.STALE).write_text(json.dumps({"stale": stale}))
        disk.sweep(folder)
        assert mutated.contents(outside) == {"kept": b"kept"}


def test_permissions_and_links_of_the_folder_stay(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir(mode=0o750)
    (tmp_path / "by another name").symlink_to(folder)
    (folder / "weights of mine").symlink_to("/nowhere")
    dq.save(model("int8-weight"), tmp_path / "by another name")
    assert (tmp_path / "by another name").is_symlink() and (folder / files.PLAN_FILE).exists()
    assert folder.stat().st_mode & 0o777 == 0o750 and (folder / "weights of mine").is_symlink()
    fresh = tmp_path / "fresh"
    dq.save(model("int8-weight"), fresh)
    (tmp_path / "plain").mkdir()
    assert fresh.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    parts = dict.fromkeys(["scheduler", "vae", "text_encoder_2", "tokenizer", "tokenizer_2"])
    made = FluxPipeline(**parts, text_encoder=text_encoder("clip"), transformer=flux)
    dq.quantize(made, "int8", progress=False)
    return made


def test_a_disk_that_fills_leaves_no_half_pipeline(pipe, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for place in (tmp_path / "new", tmp_path / "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / "mine").write_text("mine")
        with pytest.raises(
            DQError, match=r"cannot save to .*No space left on device; nothing was changed there"
        ) as error:
            pipe.save_pretrained(place)
        assert "\n" not in str(error.value)
    assert mutated.contents(tmp_path) == {"old/mine": b"mine"} and hidden(tmp_path / "x") == []


@pytest.mark.parametrize("way", ["pipeline", "denoiser", "text encoder", "bare"])
def test_a_folder_without_a_name_and_pickles_are_refused(pipe, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    encoder = text_encoder("t5")
    dq.quantize(encoder, "int8-weight", progress=False)
    target = {"pipeline": pipe, "denoiser": pipe.transformer, "text encoder": encoder, "bare": model("int8")}[way]
    for folder in ("", None, 5):
        with pytest.raises(DQError, match=r"the folder to save to is .*, expected its name"):
            dq.save(target, folder) if way == "bare" else target.save_pretrained(folder)
    if way != "bare":
        with pytest.raises(DQError, match="safe_serialization=False: quantized models are saved as safetensors only"):
            target.save_pretrained("out", safe_serialization=False)
    assert mutated.contents(tmp_path) == {}


def test_a_pipeline_that_is_not_quantized_is_saved_as_ever(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "replacing", None)
    FluxPipeline(**dict.fromkeys(pipe.components)).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "model_index.json").exists()


# checksums


def rewritten(path: Path, change) -> None:
    """A weights file with its metadata changed."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=change(metadata))


def halved(metadata):
    sums = json.loads(metadata[files.CHECKSUMS])
    return metadata | {files.CHECKSUMS: json.dumps(dict(list(sums.items())[::2]))}


def without(metadata):
    return {key: value for key, value in metadata.items() if key != files.CHECKSUMS}


@pytest.mark.parametrize("kind", ["diffusers", "transformers", "bare"])
def test_a_table_with_gaps_is_refused_and_a_missing_one_said(tmp_path, quantized, kind):
    if kind == "diffusers":
        place, again = tmp_path / WEIGHTS, lambda: load(tmp_path)
        load(quantized).save_pretrained(tmp_path)
    elif kind == "transformers":
        encoder = text_encoder("clip")
        dq.quantize(encoder, "int8-weight", progress=False)
        encoder.save_pretrained(tmp_path)
        place, again = tmp_path / "model.safetensors", lambda: type(encoder).from_pretrained(tmp_path)
    else:
        dq.save(model("int8"), tmp_path)
        place, again = tmp_path / files.WEIGHTS_FILE, lambda: dq.load(tmp_path, plain())
    whole = place.read_bytes()
    rewritten(place, halved)
    with pytest.raises(DQError, match="has no checksum, the file was changed"):
        again()
    place.write_bytes(whole)
    rewritten(place, without)
    with pytest.warns(UserWarning, match="tensors have no checksum, damage to them would go unnoticed"):
        again()


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_every_tensor_of_a_text_encoder_is_compared(tmp_path, kind):
    encoder = text_encoder(kind)
    dq.quantize(encoder, "int8-weight", progress=False)
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    for name in state:
        raw = state[name].clone().reshape(-1).view(torch.uint8)
        raw[len(raw) // 2] ^= 1
        save_file(state | {name: raw.view(state[name].dtype).reshape(state[name].shape)}, path, metadata=metadata)
        with pytest.raises(DQError, match=f"tensor '{name}': its bytes are not those that were saved"):
            type(encoder).from_pretrained(tmp_path)
    name = next(name for name in state if "norm" in name)
    save_file({key: value for key, value in state.items() if key != name}, path, metadata=without(metadata))
    with pytest.raises(DQError, match=f"lacks tensor '{name}'"), pytest.warns(UserWarning, match="no checksum"):
        type(encoder).from_pretrained(tmp_path)


def test_checksums_have_the_names_that_tensors_have_in_the_file(tmp_path):
    """transformers renames tensors of some models when it saves them, and leaves tied ones out."""
    text = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    text |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight)
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    dq.quantize(encoder, "int8-weight", progress=False)
    encoder.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        with safe_open(path, "pt") as file:
            sums = json.loads(file.metadata()[files.CHECKSUMS])
            assert sums == {name: files.checksum(file.get_tensor(name)) for name in file.keys()}
