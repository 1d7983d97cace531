"""Blocks of diffusers' FLUX at its real width with random weights: bf16, dq's recipes, and what others make of them.

Quantized on the CPU and moved, as a user does who has no room on the card. Eager calls are launched from Python each
time; graphed ones replay a CUDA graph; compiled ones do both after torch.compile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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
RECIPES = ("int8", "fp8", "mxfp8", "nvfp4", "int8-weight", "int4-weight")


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
    found: dict[str, Callable] = {"bf16": lambda made: made.to(DEVICE)}
    found |= {f"dq {recipe}": partial(by_dq, recipe) for recipe in RECIPES}
    return found | {"torchao fp8 rows": by_torchao, "sdnq int8": by_sdnq}


def measure(options: SimpleNamespace, note: Callable) -> None:
    """A way of calling after another, compiled bf16 first: it is the base of all ratios of its piece."""
    plain = model()
    given, shape = inputs(plain), (PICTURE + TEXT, SIZE["attention_head_dim"] * SIZE["num_attention_heads"])
    made = {name: cache(partial(_made, make, plain)) for name, make in makers().items()}
    truth = []
    runs: dict[str, Callable[[], object]] = {}
    about: dict[str, Mapping] = {}
    for way in ("compiled", "graphed", "eager"):
        for name, quantized in made.items():
            run = bench.later(partial(_called, quantized, way, given))
            runs[f"{name}, {way}"] = Uncaptured(run) if way == "eager" else run
    for name, quantized in made.items():
        try:
            about |= dict.fromkeys((f"{name}, {way}" for way in ("compiled", "graphed", "eager")),
                                   _about(name, quantized(), given, truth))  # fmt: skip
        except Exception as error:  # told again by the row of each call
            print(f"  {name}: {type(error).__name__}: {bench.first_line(error)}")
    bench.record("FLUX blocks", shape, runs, 0, options, note, about)


def _made(make: Callable, plain: nn.Module) -> nn.Module:
    return make(copy.deepcopy(plain))


def _called(quantized: Callable[[], nn.Module], way: str, given: dict) -> Callable[[], object]:
    run = quantized()
    if way == "compiled":
        run = torch.compile(run, backend="aot_eager" if REHEARSAL else "inductor")
    return torch.no_grad()(partial(run, **given, return_dict=False))


@torch.no_grad()
def _about(name: str, made: nn.Module, given: dict, truth: list) -> dict:
    """Distance of the output from that of bf16, the first one asked about; the kernels of dq's layers."""
    y = made(**given, return_dict=False)[0].double()
    truth.append(y)
    found: dict = {"off": ((y - truth[0]).norm() / truth[0].norm()).item()}
    if name.startswith("dq "):
        import dq

        layers = [row for row in dq.explain(made).layers if row.weight is not None]
        found["kernel"] = ", ".join(sorted({row.kernel for row in layers}))
        found["emulated"] = any(row.emulated for row in layers)
    return found
