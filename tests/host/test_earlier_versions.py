"""Checkpoints that earlier versions wrote load to the same bytes, and say so.

tests/data/checkpoints_0.1.0 was written before the library was cut into rooms (commit 332d762): a DiT with smoothing
and 4-bit activations, a UNet with step tables, and a module of no library. decoded.json holds the checksum of every
weight as that version decoded it.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel
from safetensors.torch import load_file
from torch import nn

import dq
from dq.host import mark
from dq.host.files import checksum
from dq.layers import packed_layers

DATA = Path(__file__).resolve().parents[1] / "data" / "checkpoints_0.1.0"
DECODED = json.loads((DATA / "decoded.json").read_text())


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 64)) for _ in range(2))
        self.out = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x, timestep):
        for block in self.blocks:
            x = x + block(x)
        return x


def load(name):
    return dq.load(DATA / name, Denoiser()) if name.startswith("bare") else AutoModel.from_pretrained(str(DATA / name))


def plan_in(folder):
    bare = folder / "dq_plan.json"
    if bare.exists():
        return json.loads(bare.read_text())
    return json.loads((folder / "config.json").read_text())["quantization_config"]["plan"]


@pytest.mark.parametrize("name", DECODED)
@torch.no_grad()
def test_it_loads_to_the_same_bytes_and_the_same_weights(name):
    model = load(name)
    (file,) = (DATA / name).glob("*.safetensors")
    stored, state = load_file(file), model.state_dict()
    assert stored.keys() == state.keys() and all(torch.equal(state[key], value) for key, value in stored.items())
    decoded = {key: checksum(layer.dense_weight().contiguous()) for key, layer in packed_layers(model).items()}
    assert {key: decoded[key] for key in DECODED[name]} == DECODED[name] and len(DECODED[name]) > 3


@pytest.mark.parametrize("name", DECODED)
def test_it_saves_to_the_same_files(name, tmp_path):
    model = load(name)
    if name.startswith("bare"):
        dq.save(model, tmp_path / "again")
    else:
        model.save_pretrained(tmp_path / "again")
    (file,) = (DATA / name).glob("*.safetensors")
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert plan_in(tmp_path / "again") == plan_in(DATA / name)


def test_step_tables_run():
    model = load("unet-tfmq-w4a8")
    assert len(mark.plan_of(model).edges) == 3
    x = torch.ones(1, 4, 8, 8)
    outputs = [model(x, torch.tensor(time)).sample for time in (950.0, 20.0)]
    assert all(output.isfinite().all() for output in outputs) and not torch.equal(*outputs)
