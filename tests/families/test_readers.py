"""Layers that other code reads, shares or computes are kept, with the reason in the report."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import dq
from dq.families import readers
from dq.layers import PackedLinear, packed_layers

WIDE = 64


class Reads(nn.Module):
    """Calls `plain`, and reads the weights of all others, each in another way."""

    def __init__(self):
        super().__init__()
        self.plain, self.used, self.cast, self.placed = (nn.Linear(WIDE, WIDE) for _ in range(4))
        self.many = nn.ModuleList([nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)])
        self.fused = nn.Linear(WIDE, WIDE)

    @property
    def kind(self) -> torch.dtype:
        return self.many[1].weight.dtype

    def fuse(self) -> torch.Tensor:
        return self.fused.weight.data.dtype

    def _use(self, x):
        return F.linear(x, self.used.weight, self.used.bias)

    def forward(self, x):
        x = self.cast(self._use(x).to(self.cast.weight.dtype)).to(self.placed.weight.device)
        return self.plain(self.placed(self.many[0](self.many[1](x.to(self.kind))))) + self.fused(x)


def test_readers_are_found_in_methods_properties_and_lists():
    assert readers.read_directly(nn.Sequential(Reads())) == {"0.used", "0.cast", "0.many.1"}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ff = nn.MultiheadAttention(WIDE, 4, batch_first=True), nn.Linear(WIDE, WIDE)

    def forward(self, x):
        return self.ff(self.attn(x, x, x)[0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.ff = nn.LSTM(WIDE, WIDE, batch_first=True), nn.Linear(WIDE, WIDE)

    def forward(self, x):
        return self.ff(self.rnn(x)[0])


class Computed(nn.Module):
    """Weights that are computed from other tensors before or at every call."""

    def __init__(self):
        super().__init__()
        self.old, self.new = weight_norm(nn.Linear(WIDE, WIDE)), parametrizations.weight_norm(nn.Linear(WIDE, WIDE))
        self.spectral, self.ff = parametrizations.spectral_norm(nn.Linear(WIDE, WIDE)), nn.Linear(WIDE, WIDE)

    def forward(self, x):
        return self.ff(self.spectral(self.new(self.old(x))))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDE, 4, 128, batch_first=True), 2)


MODELS = {"reads": Reads, "attention": Attention, "recurrent": Recurrent, "computed": Computed, "encoder": encoder}


@pytest.mark.parametrize("recipe", ["int8", "int8-weight"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_with_modules_that_read_weights_run_quantized(name, recipe):
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), torch.randn(2, 8, WIDE)
    before = model(x)
    report = dq.quantize(model, recipe, progress=False)
    assert (model(x) - before).norm() < 0.03 * before.norm()
    kept = {row.name: row.reason for row in report.layers if row.weight is None}
    if name == "attention":
        assert kept == {"attn.out_proj": "its weight is read without calling it"} and set(packed_layers(model)) == {
            "ff"
        }
    if name == "computed":
        assert set(kept) == {"old", "new", "spectral"} and set(packed_layers(model)) == {"ff"}


class Twice(nn.Module):
    """One layer under two names, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, WIDE), nn.Linear(WIDE, 50, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)])
        self.again = self.blocks[1]
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.again(self.blocks[1](self.blocks[0](self.embed(ids)))))


@torch.no_grad()
def test_shared_layers_are_packed_once_and_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model, ids = Twice().eval(), torch.arange(10)[None]
    before = model(ids)
    dq.quantize(model, "int8-weight", progress=False)
    assert isinstance(model.again, PackedLinear) and model.again is model.blocks[1]
    assert model.head.weight is model.embed.weight
    packed = model(ids)
    assert (packed - before).norm() < 0.03 * before.norm()
    dq.save(model, tmp_path)
    loaded = dq.load(tmp_path, Twice().eval())
    assert loaded.again is loaded.blocks[1] and torch.equal(loaded(ids), packed)
    dq.dequantize(model)
    assert type(model.again) is nn.Linear and model.again is model.blocks[1]
    assert (model(ids) - packed).norm() < 1e-5 * packed.norm()


def test_embeddings_of_pixels_are_kept():
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 32, 8, 8), "patch_embedding": nn.Linear(3 * 16 * 16, 64)})
    model.update({"patch_proj": nn.Conv2d(16, 32, 2), "patch_emb": nn.Linear(64, 64), "text": nn.Linear(768, 64)})
    model.update({"blocks": nn.ModuleList(nn.Linear(512, 512) for _ in range(4))})
    report = dq.quantize(model, "int8-weight", keep=["text"], progress=False)
    reasons = {row.name: row.reason for row in report.layers if row.weight is None}
    assert reasons["stem"] == reasons["patch_embedding"] == "embedding of pixels"
    assert reasons.keys() <= {"stem", "patch_embedding", "text", "patch_emb", "patch_proj"}
    assert "embedding of pixels" not in (reasons.get("patch_emb"), reasons.get("patch_proj"), reasons["text"])
