"""Blocks of diffusers' FLUX at its real width with random weights: bf16, dq's recipes, and what others make of them.

Quantized on the CPU and moved, as a user does who has no room on the card. Eager calls are launched from Python each
time; graphed ones replay a CUDA graph; compiled ones do both after torch.compile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import nn

from eval.gpu import bench
from eval.gpu.bench import DEVICE, REHEARSAL, Uncaptured

SIZE = {
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
TINY = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32}
PICTURE, TEXT = (16, 8) if REHEARSAL else (4096, 512)
WAYS = ("compiled", "graphed", "eager")
RECIPES = ("int8", "fp8", "mxfp8", "nvfp4-weight", "int8-weight", "int4-weight")


def model() -> nn.Module:
    """A double block and two single ones, bf16 on the CPU; ImportError without diffusers."""
    from diffusers import FluxTransformer2DModel

    size = TINY | {"axes_dims_rope": (8, 12, 12)} if REHEARSAL else SIZE
    torch.manual_seed(0)
    made = FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True, **size)
    return made.to(torch.bfloat16).eval().requires_grad_(False)


def inputs(made: nn.Module) -> dict[str, torch.Tensor]:
    config, make = made.config, {"device": DEVICE, "dtype": torch.bfloat16}
    side = int(PICTURE**0.5)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(side) * 1.0, torch.arange(side) * 1.0).to(DEVICE)
    return {
        "hidden_states": torch.randn(1, PICTURE, config.in_channels, **make),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, **make),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **make),
        "timestep": torch.full((1,), 0.5, **make),
        "guidance": torch.full((1,), 3.5, **make),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, 3, device=DEVICE),
    }


def by_dq(recipe: str, made: nn.Module) -> nn.Module:
    import dq

    dq.quantize(made, recipe, progress=False)
    return made.to(DEVICE)


def by_torchao(made: nn.Module) -> nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    made = made.to(DEVICE)
    quantize_(made, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return made


def by_sdnq(made: nn.Module) -> nn.Module:
    from sdnq import sdnq_post_load_quant

    found = sdnq_post_load_quant(made.to(DEVICE), weights_dtype="int8", use_quantized_matmul=True)
    return found[0] if isinstance(found, tuple) else found


def makers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What is compared first comes first: a visit may end."""
    found: dict[str, Callable] = {"bf16": lambda made: made.to(DEVICE)}
    ours = {f"dq {recipe}": partial(by_dq, recipe) for recipe in RECIPES}
    return found | dict(list(ours.items())[:2]) | {"torchao fp8 rows": by_torchao, "sdnq int8": by_sdnq} | ours


def measure(options: SimpleNamespace, note: Callable) -> None:
    """One maker after another, each beside compiled bf16, the base of its ratios; its rows are kept at once."""
    plain = model()
    given, shape = inputs(plain), (PICTURE + TEXT, plain.config.attention_head_dim * plain.config.num_attention_heads)
    base = cache(partial(_made, makers()["bf16"], plain))
    first = bench.later(partial(_called, base, "compiled", given))
    with torch.no_grad():
        truth = base()(**given, return_dict=False)[0].double()
    for name, make in makers().items():
        what = f"FLUX blocks, {name}"
        if options.recorded(f"{what} {shape}"):
            continue
        quantized = cache(partial(_made, make, plain))
        try:
            about = _about(name, quantized(), given, truth)
        except Exception as error:  # not installed, or it does not run here
            note(what, name, shape, None, error=f"{type(error).__name__}: {bench.first_line(error)}")
            continue
        runs: dict[str, Callable[[], object]] = {"bf16, compiled": first}
        for way in WAYS:
            run = bench.later(partial(_called, quantized, way, given))
            runs.setdefault(f"{name}, {way}", Uncaptured(run) if way == "eager" else run)
        mine = {each: about for each in runs if each.startswith(f"{name}, ")}
        bench.record(what, shape, runs, 0, options, note, mine)


def _made(make: Callable, plain: nn.Module) -> nn.Module:
    return make(copy.deepcopy(plain))


def _called(quantized: Callable[[], nn.Module], way: str, given: dict) -> Callable[[], object]:
    run = quantized()
    if way == "compiled":
        run = torch.compile(run, backend="aot_eager" if REHEARSAL else "inductor")
    return torch.no_grad()(partial(run, **given, return_dict=False))


@torch.no_grad()
def _about(name: str, made: nn.Module, given: dict, truth: torch.Tensor) -> dict:
    """Distance of the output from that of bf16; the kernels of dq's layers."""
    y = made(**given, return_dict=False)[0].double()
    found: dict = {"off": ((y - truth).norm() / truth.norm()).item()}
    if name.startswith("dq "):
        import dq

        layers = [row for row in dq.explain(made).layers if row.weight is not None]
        found["kernel"] = ", ".join(sorted({row.kernel for row in layers}))
        found["emulated"] = any(row.emulated for row in layers)
    return found
