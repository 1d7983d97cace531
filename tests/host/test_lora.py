"""LoRA on quantized models: load, set, scale, fuse, unfuse, hot-swap, delete, save."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoModel, FluxPipeline
from torch import nn

import dq
from dq.errors import DQError
from dq.fit import drafts
from dq.host import mark
from dq.host import peft as branches
from dq.layers import packed_layers
from tests import zoo
from tests.models import FLUX, UNET, output

peft = pytest.importorskip("peft")
from peft import LoraConfig  # noqa: E402

BLOCK = "transformer_blocks.0.attn"


def quantized(name: str = FLUX, dtype: torch.dtype = torch.float32, recipe: str = "int8") -> nn.Module:
    model = zoo.build(name, dtype=dtype)
    dq.quantize(model, recipe, progress=False)
    return model


def factors(model: nn.Module, layers: list[str], seed: int = 1, rank: int = 4, dtype=torch.float32) -> dict:
    """A LoRA state dict for linears of a model, with effects of the size of the layers'."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name in layers:
        rows, columns = model.get_submodule(name).plan.shape[:2]
        down, up = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        state[f"transformer.{name}.lora_A.weight"] = (down / columns**0.5).to(dtype)
        state[f"transformer.{name}.lora_B.weight"] = (up / rank**0.5).to(dtype)
    return state


LAYERS = [f"{BLOCK}.{key}" for key in ("to_q", "to_k", "to_out.0")]


def with_adapter(dtype: torch.dtype = torch.float32, recipe: str = "int8", seed: int = 1) -> nn.Module:
    model = quantized(dtype=dtype, recipe=recipe)
    model.load_lora_adapter(factors(model, LAYERS, seed, dtype=dtype), adapter_name="a")
    return model


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_adds_its_term_in_the_compute_dtype(dtype):
    plain, adapted = quantized(dtype=dtype), with_adapter(dtype)
    layer = adapted.get_submodule(LAYERS[0])
    assert layer.lora_A["a"].weight.dtype == dtype
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    term = layer.lora_B["a"](layer.lora_A["a"](x)) * layer.scaling["a"]
    assert torch.allclose(
        layer(x), plain.get_submodule(LAYERS[0])(x) + term, atol=2e-2 if dtype != torch.float32 else 1e-6
    )
    assert distance(output(adapted), output(plain)) > 0.05


def test_adapter_can_be_scaled_disabled_and_deleted():
    plain, model = output(quantized()), with_adapter()
    model.set_adapters(["a"], [0.5])
    half = output(model)
    model.set_adapters(["a"], [1.0])
    full = output(model)
    assert 0 < distance(half, plain) < distance(full, plain)
    model.disable_lora()
    assert torch.equal(output(model), plain)
    model.enable_lora()
    assert torch.equal(output(model), full)
    model.delete_adapters("a")
    model.unload_lora()
    assert torch.equal(output(model), plain)
    assert branches.attached(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_keeps_the_output_and_unfusing_restores_every_bit(dtype):
    model = with_adapter(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = output(model)
    model.fuse_lora()
    assert distance(output(model), adapted) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert model.get_submodule(LAYERS[0]).get_base_layer().plan.rank == 4
    model.unfuse_lora()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(output(model), adapted)


def test_fuse_scale_and_weights_are_applied():
    model = with_adapter()
    model.set_adapters(["a"], [0.25])
    adapted = output(model)
    model.fuse_lora()
    assert distance(output(model), adapted) < 1e-5
    model.unfuse_lora()
    model.fuse_lora(lora_scale=2.0)
    fused = output(model)
    model.unfuse_lora()
    assert distance(output(model), fused) < 1e-5  # peft keeps the scale it fused with


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_adapters_fuse_and_unfuse_in_any_order(order):
    model = with_adapter(recipe="int8-weight")  # one rounded activation that flips is already 3e-4
    model.load_lora_adapter(factors(model_without(model), LAYERS, seed=2, rank=2), adapter_name="b")
    model.set_adapters(["a", "b"], [1.0, 0.5])
    both = output(model)
    for name in order:
        model.fuse_lora(adapter_names=[name])
    assert distance(output(model), both) < 1e-5
    assert model.get_submodule(LAYERS[0]).get_base_layer().plan.rank == 6
    model.unfuse_lora()
    assert torch.equal(output(model), both)


def model_without(model: nn.Module) -> nn.Module:
    """An equally shaped model without adapters, to read shapes from."""
    return quantized(type(model).__name__)


def calibrated(dense: nn.Module, rotate: int, rank: int = 3, act: str | None = None) -> nn.Module:
    """A packed layer as calibration leaves it: smoothed, rotated, with a low-rank branch."""
    torch.manual_seed(0)
    kind, weight = ("linear" if isinstance(dense, nn.Linear) else "conv2d"), dq.TensorPlan.parse("int4/group:32")
    planned = dq.TensorPlan.parse(act) if act else None
    plan = dq.LayerPlan(kind, tuple(dense.weight.shape), weight, planned, smooth=True, rotate=rotate, rank=rank)
    draft = drafts.draft(dense, plan)
    draft.smooth.data.uniform_(0.5, 2.0)
    draft.proj_down.data.normal_(), draft.proj_up.data.normal_()
    return draft.pack(torch.float32)


@pytest.mark.parametrize("rotate", [0, 4, 12])  # order 12 is not symmetric
def test_fusing_beside_a_branch_smoothing_and_rotation_of_the_layer_is_exact(rotate):
    layer, x = calibrated(nn.Linear(96, 48), rotate), torch.randn(5, 96)
    down, up = torch.randn(2, 96), torch.randn(48, 2)
    before = layer(x)
    branches.widen(layer, down, up)
    assert torch.allclose(layer(x), before + x @ down.T @ up.T, atol=1e-4)
    assert layer.plan.rank == 5
    branches.narrow(layer, 3)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("build", "act"),
    [
        (lambda: nn.Linear(64, 48), "int8/token"),
        (lambda: nn.Conv2d(16, 12, 3, padding=1, stride=2), "int8/tensor"),
        (lambda: nn.Conv2d(16, 12, 3, padding=1), None),
    ],
    ids=["linear", "strided", "weight-only"],
)
@torch.no_grad()
def test_an_adapter_of_a_calibrated_layer_gives_the_same_fused_and_unfused(build, act):
    torch.manual_seed(0)
    dense = build()
    holder = nn.Sequential(calibrated(dense, rotate=16, act=act))
    x = torch.randn(5, 64) if isinstance(dense, nn.Linear) else torch.randn(2, 16, 7, 7)
    plain = holder(x)
    peft.inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), holder)
    adapted = holder(x)
    assert distance(adapted, plain) > 1e-3
    holder[0].merge()
    assert holder[0].get_base_layer().plan.rank == 7 and distance(holder(x), adapted) < 1e-5
    holder[0].unmerge()
    assert torch.equal(holder(x), adapted)


def test_fused_adapter_stays_after_unloading_and_survives_saving(tmp_path):
    model = with_adapter()
    adapted = output(model)
    model.fuse_lora()
    model.unload_lora()
    assert branches.attached(model) is None
    assert distance(output(model), adapted) < 1e-5
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(str(tmp_path))
    assert torch.equal(output(again), output(model))
    assert mark.plan_of(again).layers[LAYERS[0]].rank == 4


def test_saving_with_adapters_attached_is_refused_and_writes_nothing(tmp_path):
    model = with_adapter()
    for save in (model.save_pretrained, lambda folder: dq.save(model, folder)):
        with pytest.raises(DQError, match=rf"has adapters attached \(layer '{BLOCK}.*fuse_lora"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapter_can_be_hot_swapped_also_in_a_compiled_model():
    model = quantized()
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(factors(model, LAYERS, seed=1), adapter_name="a")
    first = output(model)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="eager")
    assert distance(output(model), first) < 1e-5
    state = factors(model_without(model), LAYERS, seed=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.load_lora_adapter(state, adapter_name="a", hotswap=True)
        swapped = output(model)
    fresh = with_adapter(seed=2)
    assert distance(swapped, output(fresh)) < 1e-5
    assert distance(swapped, first) > 0.01


def test_hot_swapped_while_fused_unfuses_exactly():
    model = with_adapter()
    plain = {name: value.clone() for name, value in packed_state(model).items()}
    model.fuse_lora()
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A["a"].weight.data.mul_(3)
    model.unfuse_lora()
    assert all(torch.equal(value, plain[name]) for name, value in packed_state(model).items())


def packed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, layer in packed_layers(model).items()
        for key, value in layer.state_dict().items()
    }


@pytest.mark.parametrize("recipe", ["int8", "int4-weight"])
def test_flux_pipeline_loads_fuses_and_saves_adapter_weights(tmp_path, recipe):
    model = quantized(recipe=recipe)
    pipe = FluxPipeline(
        None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=model
    )
    plain = output(model)
    pipe.load_lora_weights(factors(model, LAYERS), adapter_name="a")
    adapted = output(model)
    assert distance(adapted, plain) > 0.02
    pipe.set_adapters(["a"], [0.7])
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(output(model), plain)
    pipe.load_lora_weights(factors(model, LAYERS), adapter_name="b")
    assert torch.equal(output(model), adapted)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=lora_state(model))
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(output(model), adapted)


def lora_state(model: nn.Module) -> dict:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    return convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name="b"))


def adapted_unet() -> nn.Module:
    """A quantized UNet with random adapters on linears and convolutions."""
    model = quantized(UNET)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1", "conv"], init_lora_weights=False))
    return model.eval()


def test_convolution_adapters_fuse_and_unfuse():
    model = adapted_unet()
    adapted = output(model)
    kinds = {type(layer).__name__ for layer in model.modules() if hasattr(layer, "lora_A")}
    assert {"PackedConv2dAdapter", "PackedLinearAdapter"} <= kinds
    model.fuse_lora()
    assert distance(output(model), adapted) < 1e-4
    model.unfuse_lora()
    assert torch.equal(output(model), adapted)


def test_fused_convolution_adapters_survive_saving(tmp_path):
    model = adapted_unet()
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModel.from_pretrained(str(tmp_path))), output(model))


TARGETS = ["to_q", "to_v", "proj_in", "conv1", "ff.net.0.proj"]


def attached(dora: bool = False, name: str = "a") -> nn.Module:
    """A full-precision UNet with a random adapter on linears and convolutions."""
    model = zoo.build(UNET)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=dora), name)
    return model.eval()


def on_and_off(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    on = output(model)
    model.disable_adapters()
    off = output(model)
    model.enable_adapters()
    return on, off


@pytest.mark.parametrize("recipe", ["int8", "int4-weight"])
def test_an_adapter_that_is_attached_while_quantizing_stays_switchable(recipe, tmp_path):
    model = attached()
    before = on_and_off(model)
    report = dq.quantize(model, recipe, progress=False)
    assert not any("base_layer" in row.name or "lora" in row.name for row in report.layers)
    after, plain = on_and_off(model), zoo.build(UNET)
    dq.quantize(plain, recipe, progress=False)
    usual = distance(output(plain), before[1])  # what the recipe costs this model
    assert all(distance(new, old) < 1.5 * usual for new, old in zip(after, before, strict=True))
    assert distance(*before) > 1.5 * usual
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.fuse_lora()
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    assert layer.get_base_layer().plan.rank == mark.plan_of(model).layers["mid_block.resnets.0.conv1"].rank > 3
    assert distance(output(model), after[0]) < usual
    model.unfuse_lora()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    model.unload_lora()
    assert torch.equal(output(model), after[1])
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModel.from_pretrained(str(tmp_path))), after[1])


class Denoiser(nn.Module):
    """Blocks of two linears, small enough to be calibrated in a moment."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        pair = lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))  # noqa: E731
        self.proj_in = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(pair() for _ in range(3))

    def forward(self, x):
        x = self.proj_in(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("recipe", ["svdquant-int4", "viditq-w8a8", "qdiffusion-w4a8", "gptq-int4-weight"])
@torch.no_grad()
def test_calibration_sees_an_attached_adapter_at_work_and_leaves_it_switchable(recipe):
    model, plain, x = Denoiser(), Denoiser(), torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(2))
    config = LoraConfig(r=4, target_modules=r"proj_in|blocks\.\d\.[02]", init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    on, off = model(x), plain(x)
    for target in (model, plain):
        dq.quantize(target, recipe, calibration=lambda given: given(x), progress=False)
    assert set(mark.plan_of(model).layers) == set(mark.plan_of(plain).layers)
    drawn = model(x)
    peft.inject_adapter_in_model(config, plain)  # the same adapter, on a model that was calibrated without it
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" in name}, strict=False)
    assert distance(drawn, on) < 1.02 * distance(plain(x), on) < distance(off, on)
    adapters = [module for module in model.modules() if hasattr(module, "lora_A")]
    for module in adapters:
        module.enable_adapters(False)
    assert distance(model(x), off) < 0.1
    for module in adapters:
        module.enable_adapters(True)
        module.merge()
    assert distance(model(x), drawn) < 0.02
    for module in adapters:
        module.unmerge()
    assert torch.equal(model(x), drawn)


def test_the_same_layers_are_planned_alike_with_and_without_an_adapter():
    plain, model = zoo.build(UNET), attached()
    for target in (plain, model):
        dq.quantize(target, "int8", progress=False)
    model.unload_lora()
    assert mark.plan_of(plain).to_dict() == mark.plan_of(model).to_dict()
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_undoing_the_quantization_leaves_the_adapter_switchable(fused):
    model = attached()
    before = on_and_off(model)
    dq.quantize(model, "int8", progress=False)
    if fused:
        model.fuse_lora()
    dq.dequantize(model)
    assert distance(output(model), before[0]) < 0.1
    model.unfuse_lora() if fused else model.fuse_lora()
    assert distance(output(model), before[0]) < 0.1
    if not fused:
        model.unfuse_lora()
    assert all(distance(new, old) < 0.1 for new, old in zip(on_and_off(model), before, strict=True))
    assert {type(module).__module__ for module in model.modules() if hasattr(module, "lora_A")} == {
        "peft.tuners.lora.layer"
    }


@pytest.mark.parametrize("first", [False, True], ids=["adapter first", "quantized first"])
def test_dora_works_unfused_on_packed_linears_and_convolutions(first):
    truth, model = attached(dora=True), attached(dora=True)
    if first:
        state = {name: value for name, value in model.state_dict().items() if "lora" in name}
        model = quantized(UNET)
        model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True), "a")
        model.load_state_dict(state, strict=False)
    else:
        dq.quantize(model, "int8", progress=False)
    on, off = on_and_off(model)
    assert distance(on, output(truth)) < 0.1 and distance(on, off) > 0.2
    with pytest.raises(DQError, match=r"'a' is a Dora\w+Variant, which is not a low-rank sum; use it without fusing"):
        model.fuse_lora()
    assert torch.equal(output(model), on)


def test_an_adapter_of_another_kind_is_refused_before_quantizing():
    model = zoo.build(UNET)
    model.add_adapter(peft.LoHaConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(DQError, match=r"UNet2DConditionModel has a Linear adapter on layer .* only LoRA can stay on"):
        dq.quantize(model, "int8", progress=False)
    assert not packed_layers(model)


def test_adapter_with_nan_is_refused_by_a_safe_fuse_and_nothing_is_fused():
    model = with_adapter()
    model.get_submodule(LAYERS[0]).lora_A["a"].weight.data[0, 0] = torch.nan
    with pytest.raises(DQError, match="'a' holds NaN or Inf"):
        model.fuse_lora(safe_fusing=True)
    assert model.get_submodule(LAYERS[0]).get_base_layer().plan.rank == 0


def test_layers_that_are_not_packed_keep_their_own_adapters():
    model = quantized()
    dense = model.x_embedder
    assert type(dense) is nn.Linear
    model.add_adapter(LoraConfig(r=4, target_modules=["x_embedder"]))
    assert type(model.x_embedder).__name__ == "Linear"


def test_adapters_can_be_trained_on_a_quantized_model():
    model = quantized()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"]))
    inputs = zoo.ENTRIES[FLUX].inputs(torch.Generator().manual_seed(0), torch.float32)
    model(**inputs)[0].square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_an_adapter_that_learns_on_packed_weights_is_saved_and_loaded_as_any(tmp_path):
    """QLoRA (2305.14314): the base is frozen bytes, gradients pass through what they stand for."""
    inputs = zoo.ENTRIES[FLUX].inputs(torch.Generator().manual_seed(0), torch.float32)
    model = quantized(recipe="int4-weight")
    with torch.no_grad():
        start = model(**inputs)[0]
    wanted = start + 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(2)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), adapter_name="a")
    adam, losses = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-2), []
    for _ in range(12):
        adam.zero_grad()
        loss = (model(**inputs)[0] - wanted).square().mean()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    kept = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, kept[name]) for name, value in before.items())
    model.save_lora_adapter(str(tmp_path), adapter_name="a", weight_name="a.safetensors")
    other = quantized(recipe="int4-weight")
    other.load_lora_adapter(str(tmp_path), prefix=None, adapter_name="a", weight_name="a.safetensors")
    with torch.no_grad():
        found = model(**inputs)[0]
        torch.testing.assert_close(other(**inputs)[0], found)
        other.fuse_lora()
        assert distance(other(**inputs)[0], found) < 1e-5
