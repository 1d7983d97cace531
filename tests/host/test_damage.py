"""What saving and loading refuse, with the target left as it was; modules that are no diffusers models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dq
from dq import cookbook, layers, planning
from dq.errors import DQError
from dq.host import mark
from dq.layers import packed_layers
from dq.model import swap
from tests.models import WEIGHTS, load, same_state

# what must be refused


def damaged(quantized: str, folder: Path, change) -> Path:
    """A copy of a saved model whose state dict went through `change(state)`."""
    path = Path(quantized, WEIGHTS)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, folder / WEIGHTS, metadata=metadata)
    (folder / "config.json").write_text(Path(quantized, "config.json").read_text())
    return folder


LAYER = "transformer_blocks.0.attn.to_q"


def drop(state):
    del state[f"{LAYER}.scale"]


def reshape(state):
    state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"][:-1].contiguous()


def retype(state):
    state[f"{LAYER}.scale"] = state[f"{LAYER}.scale"].to(torch.bfloat16)


def flip(state):
    state[f"{LAYER}.weight"][0, 0] += 1


def zero(state):
    state[f"{LAYER}.scale"][0] = 0


def poison(state):
    state[f"{LAYER}.scale"][0] = torch.inf


def drop_kept(state):
    del state["x_embedder.weight"]


DAMAGES = [
    (drop, rf"lacks tensor '{LAYER}.scale'"),
    (reshape, rf"tensor '{LAYER}.weight': got shape .* expected"),
    (retype, rf"tensor '{LAYER}.scale': got torch.bfloat16, expected torch.float32"),
    (flip, rf"tensor '{LAYER}.weight': its bytes are not those that were saved"),
    (zero, rf"tensor '{LAYER}.scale': holds values of zero or below"),
    (poison, rf"tensor '{LAYER}.scale': holds NaN or Inf"),
    (drop_kept, "lacks tensor 'x_embedder.weight'"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES, ids=[change.__name__ for change, _ in DAMAGES])
def test_damaged_checkpoint_is_refused_by_name(tmp_path, quantized, change, message):
    with pytest.raises(DQError, match=message):
        load(damaged(quantized, tmp_path, change))


def test_truncated_checkpoint_is_refused(tmp_path, quantized):
    damaged(quantized, tmp_path, lambda state: None)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate((tmp_path / WEIGHTS).stat().st_size - 100)
    with pytest.raises(OSError, match=f"Unable to load weights from checkpoint file.*{WEIGHTS}"):  # diffusers' own
        load(tmp_path)


def test_truncated_shard_is_refused(tmp_path, base):
    load(base, quantization_config=dq.DQConfig("int8")).save_pretrained(tmp_path, max_shard_size="50KB")
    last = max(tmp_path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(DQError, match=rf"{last.name}' is missing or damaged"):
        load(tmp_path)


def test_plan_for_another_model_is_refused_naming_the_first_layer(tmp_path, quantized):
    damaged(quantized, tmp_path, lambda state: None)
    data = json.loads((tmp_path / "config.json").read_text())
    rows = data["quantization_config"]["plan"]["layers"]
    rows[LAYER]["shape"] = [8, 8]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(DQError, match=rf"layer '{LAYER}': the plan is for linear \(8, 8\)"):
        load(tmp_path)
    rows["no.such.layer"] = rows.pop(LAYER)
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(DQError, match=r"layer 'no\.such\.layer' of the plan is not in FluxTransformer2DModel"):
        load(tmp_path)


def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was(base):
    model = load(base)
    plan = planning.make_plan(model, cookbook.get("int8"))
    plan.layers["no.such.layer"] = next(iter(plan.layers.values()))
    with pytest.raises(DQError, match=r"no\.such\.layer"):
        swap(model, plan, torch.float32)
    assert not packed_layers(model)


def test_full_disk_leaves_the_target_as_it_was(tmp_path, base, monkeypatch):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    (tmp_path / "config.json").write_text("mine")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DQError, match="No space left on device; nothing was changed"):
        model.save_pretrained(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_place_that_cannot_be_written_is_refused(tmp_path, base):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DQError, match="cannot save to"):
            model.save_pretrained(place)
        with pytest.raises(DQError, match="cannot save to"):
            dq.save(model, place)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_saving_as_pickle_is_refused_and_writes_nothing(tmp_path, base):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    with pytest.raises(DQError, match="safetensors only"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


# modules that are no diffusers models


class Small(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3)])
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Linear(width, 8, bias=False)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x) + self.conv(x.reshape(-1, 32, 2, 1)).mean() * self.table[1]


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(seed)
    return Small().to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bare_module_saves_and_loads_bit_exactly(tmp_path, dtype):
    model, x = small(dtype=dtype), torch.randn(4, 64).to(dtype)
    dq.quantize(model, "int8", progress=False)
    dq.save(model, tmp_path / "out")
    again = dq.load(tmp_path / "out", small(seed=1))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dq_plan.json", "model.safetensors"]
    assert same_state(model, again)
    assert torch.equal(model(x), again(x))
    assert mark.plan_of(again).to_dict() == mark.plan_of(model).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.0.0.scale"), "lacks tensor 'blocks.0.0.scale'"),
        (lambda s: s.update({"table": torch.zeros(5)}), r"tensor 'table': got shape \(5,\)"),
        (lambda s: s["blocks.0.0.weight"].neg_(), "'blocks.0.0.weight': its bytes"),
        (lambda s: s.update(extra=torch.zeros(1)), "holds tensor 'extra', which Small has not"),
    ],
    ids=["missing", "mis-shaped", "tampered", "unknown"],
)
def test_damaged_bare_checkpoint_is_refused_and_the_model_unchanged(tmp_path, change, message):
    model = small()
    dq.quantize(model, "int8", progress=False)
    dq.save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata=metadata)
    fresh = small(seed=1)
    with pytest.raises(DQError, match=message):
        dq.load(tmp_path, fresh)
    assert same_state(fresh, small(seed=1))


def test_truncated_bare_checkpoint_is_refused(tmp_path):
    model = small()
    dq.quantize(model, "int8", progress=False)
    dq.save(model, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DQError, match="missing or damaged"):
        dq.load(tmp_path, small())


def test_saving_what_is_not_quantized_is_refused(tmp_path, base):
    for model in (small(), load(base)):
        with pytest.raises(DQError, match="is not quantized, nothing to save"):
            dq.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loading_from_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DQError, match=r"dq_plan\.json' does not exist"):
        dq.load(tmp_path, small())


def test_stacked_expert_weights_save_and_reload(tmp_path):
    class TinyExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 64, 32))

        def forward(self, x):
            return torch.stack([x @ self.gate_up_proj[i] for i in range(3)])

    def build(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict({"blocks": nn.ModuleList([TinyExperts()])})

    model, x = build(0), torch.randn(2, 64)
    dq.quantize(model, "int8-weight", progress=False)
    assert isinstance(model["blocks"][0].gate_up_proj, layers.PackedStack)
    dq.save(model, tmp_path)
    again = dq.load(tmp_path, build(1))
    assert torch.equal(model["blocks"][0](x), again["blocks"][0](x))


def test_two_level_scales_save_and_reload_and_multipliers_out_of_range_are_refused(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(200, 48), nn.GELU(), nn.Linear(48, 40))

    pair = ("int4/group:64+channel", "int8/token")
    model, x = build(0), torch.randn(5, 200)
    dq.quantize(model, dq.Recipe("two-level", pair, pair), progress=False)
    assert {str(layer.plan.weight) for layer in packed_layers(model).values()} == {pair[0]}
    dq.save(model, tmp_path)
    again = dq.load(tmp_path, build(1))
    assert torch.equal(model(x), again(x))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    dense = [layer.dense_weight() for layer in packed_layers(model).values()]
    dq.dequantize(model)
    assert all(torch.equal(weight, layer.weight) for weight, layer in zip(dense, (model[0], model[2]), strict=True))
    for bad in (0, 17, -3):
        state = load_file(tmp_path / "model.safetensors")
        state["0.scale"][3, 1] = bad
        save_file(state, tmp_path / "model.safetensors")  # without checksums
        with (
            pytest.warns(UserWarning, match="no checksum"),
            pytest.raises(DQError, match="multipliers outside of 1 to 16"),
        ):
            dq.load(tmp_path, build(1))
