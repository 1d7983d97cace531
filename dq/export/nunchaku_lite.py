"""Checkpoints of diffusers' `nunchaku_lite` quantizer: 4-bit linears on nunchaku's operators (SVDQuant, 2411.05007).

    svdq_w4a4   y = sum_g s_xg s_wg (q_g w_g) + up (down x) + bias,  q = rne(x / smooth_factor / s_x), 7 the largest
    awq_w4a16   y = x (s_g c + z_g) + bias,  c = 0 ... 15,  z_g = -8 s_g

dq multiplies by its smoothing and gives the smoothed input to the branch; there the input is divided, and the branch
gets it as it came: smooth_factor = 1 / smooth, down times smooth. Scales, smoothing and factors are rounded to the
compute dtype (dq keeps scales and smoothing in fp32), codes stay as they are. All branches have the rank of the
largest: zeros are added. Layers that dq kept are copied. The bytes lie as in `dq.kernels.nunchaku.layout`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dq.disk import read_json
from dq.errors import DQError
from dq.formats.base import unpack_bits
from dq.host import files, saved
from dq.kernels.nunchaku import layout
from dq.plan import LayerPlan, Plan

NAME = "nunchaku-lite"
RECIPE = "svdquant-int4-nunchaku"
FORM = "int4/group:64"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = ("bfloat16", "float16")
MOST_NAMES = 6  # of layers in a pattern that an error shows
OUTPUTS = 8  # a weight-only product makes that many at a time


def write(source: Path, out: Path) -> None:
    """Write a saved quantized pipeline or denoiser for diffusers' loader, into an empty folder.

    DQError, before anything is written, for plans that the format cannot hold.
    """
    found = saved.plans(source)
    if not found:
        raise DQError(f"{str(source)!r} holds no quantized model; {saved.MAKE_ONE}")
    for part, (home, plan) in found.items():
        _check(part, home, plan)
    parts = {home.relative_to(source) for home, _ in found.values()}
    if Path() not in parts:
        left_out = {source / part for part in parts}
        shutil.copytree(source, out, dirs_exist_ok=True, ignore=_but(left_out))
    for home, plan in found.values():
        _write(home, out / home.relative_to(source), plan)


def _but(folders: set[Path]):
    """For copytree: everything but these folders."""
    return lambda at, names: [name for name in names if Path(at) / name in folders]


def _check(part: str, home: Path, plan: Plan) -> None:
    """DQError for the first thing of a component that the format cannot hold, with the plan that would fit."""
    place = f"component {part!r}" if part else f"{str(home)!r}"
    if not (home / saved.MODEL).is_file() or "_diffusers_version" not in read_json(home / saved.MODEL):
        raise DQError(f"{place} is no diffusers model, {NAME} holds those alone; quantize it without dq or not at all")
    if plan.compute_dtype not in DTYPES:
        raise DQError(f"{place} computes in {plan.compute_dtype}, {NAME} in bf16 or fp16; quantize with --dtype bf16")
    if plan.attention:
        raise DQError(f"{place} has rounded attention, {NAME} none; quantize with --recipe {RECIPE}")
    reasons = {name: reason for name, layer in plan.layers.items() if (reason := why_not(layer)) is not None}
    if not reasons:
        return
    name, reason = next(iter(reasons.items()))
    unfit = [name for name, layer in plan.layers.items() if _sizes(layer) is not None]
    keep = ""
    if unfit:
        named = "|".join(re.escape(name) for name in unfit[:MOST_NAMES]) + ("|..." if unfit[MOST_NAMES:] else "")
        keep = f" --keep '({named})$'"
    count = f" ({len(reasons)} layers do not fit)" if len(reasons) > 1 else ""
    raise DQError(f"layer {name!r}: {reason}{count}; {NAME} holds what `--recipe {RECIPE}{keep}` plans")


def why_not(plan: LayerPlan) -> str | None:
    """None when the format holds the layer, else why not."""
    if (reason := _sizes(plan)) is not None:
        return reason
    if str(plan.weight) != FORM:
        return f"its weight is {plan.weight}, expected {FORM}"
    if plan.act is None:
        extra = plan.rank or plan.smooth
        return "a weight-only linear has no branch and no smoothing there" if extra else _surroundings(plan)
    if str(plan.act) != FORM:
        return f"its activation is {plan.act}, expected {FORM}"
    if plan.late:
        return f"its activation switches to {plan.late[0]}, the operators have one format"
    return _surroundings(plan)


def _sizes(plan: LayerPlan) -> str | None:
    """Why the operators take no layer of this kind or size, whatever its formats; None when they do."""
    if plan.kind != "linear":
        return f"a {plan.kind} has no operator there"
    outputs, inputs = plan.shape
    if plan.role == "block" and plan.act is not None:
        fits = outputs % layout.BLOCK == inputs % layout.BLOCK == 0
        return None if fits else f"its sizes {plan.shape} are no multiples of {layout.BLOCK}"
    fits = outputs % OUTPUTS == inputs % layout.GROUP == 0
    return None if fits else f"its sizes {plan.shape} are no multiples of {OUTPUTS} outputs and {layout.GROUP} inputs"


def _surroundings(plan: LayerPlan) -> str | None:
    if plan.rotate:
        return f"its input is rotated in blocks of {plan.rotate}, the operators do not rotate"
    if plan.splits or plan.permute:
        return "its input is split, the operators take one whole"
    return "the output of its first token is stored, the operators store none" if plan.start else None


def _write(home: Path, out: Path, plan: Plan) -> None:
    """One denoiser: its weights in one file, and its config."""
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(home.glob("*.safetensors"))
    files.verify(paths)
    state = {name: value for path in paths for name, value in load_file(path).items()}
    widest = max((layer.rank for layer in plan.layers.values()), default=0)
    rank = -(-max(widest, 1) // layout.TILE) * layout.TILE
    for name, layer in plan.layers.items():
        own = {key: state.pop(f"{name}.{key}") for key in _KEYS if f"{name}.{key}" in state}
        made = weight_only(name, own, plan.dtype) if layer.act is None else low_rank(name, own, plan.dtype, rank)
        state |= {f"{name}.{key}": value for key, value in made.items()}
    save_file(dict(sorted(state.items())), out / WEIGHTS, {"format": "pt"})
    config = {**read_json(home / saved.MODEL), "quantization_config": config_of(plan, rank)}
    (out / saved.MODEL).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


_KEYS = ("weight", "scale", "smooth", "proj_down", "proj_up", "bias")


def config_of(plan: Plan, rank: int) -> dict:
    """The `quantization_config` of a plan, as diffusers reads it."""
    config: dict = {"quant_method": "nunchaku_lite", "compute_dtype": plan.compute_dtype}
    both = {"precision": "int4", "group_size": layout.GROUP}
    for op, more, only in (("svdq_w4a4", {"rank": rank}, False), ("awq_w4a16", {}, True)):
        names = [name for name, layer in plan.layers.items() if (layer.act is None) is only]
        config |= {op: {**both, **more, "targets": names}} if names else {}
    return config


def low_rank(name: str, own: Mapping[str, torch.Tensor], dtype: torch.dtype, rank: int) -> dict[str, torch.Tensor]:
    """Tensors of a linear with 4-bit activations, from dq's own: shapes and dtypes as diffusers allocates them."""
    outputs, groups = own["scale"].shape
    inputs = groups * layout.GROUP
    smooth = own.get("smooth", torch.ones(inputs))
    down, up = own.get("proj_down", torch.zeros(0, inputs)), own.get("proj_up", torch.zeros(outputs, 0))
    down = _cast(f"{name}.proj_down", down.float() * smooth, dtype)
    made = {
        "qweight": layout.weight(own["weight"]).reshape(own["weight"].shape),
        "wscales": layout.scale(_cast(f"{name}.scale", own["scale"], dtype)).reshape(groups, outputs),
        "smooth_factor": layout.vector(_cast(f"{name}.smooth", 1 / smooth, dtype)),
        "proj_down": layout.down(F.pad(down, (0, 0, 0, rank - down.shape[0]))),
        "proj_up": layout.up(F.pad(up.to(dtype), (0, rank - up.shape[1]))),
    }
    return made | ({"bias": layout.vector(own["bias"].to(dtype))} if "bias" in own else {})


def weight_only(name: str, own: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of a weight-only linear, from dq's own."""
    codes = unpack_bits(own["weight"], 4, 2 * own["weight"].shape[1], signed=True)
    scale = _cast(f"{name}.scale", own["scale"], dtype).T.contiguous()
    made = {"qweight": layout.words(codes), "wscales": scale, "wzeros": -layout.ZERO * scale}
    return made | ({"bias": own["bias"].to(dtype)} if "bias" in own else {})


def _cast(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the compute dtype. DQError where that loses more than a rounding of it: fp16 holds 6e-5 to 65504 in full."""
    cast, tiny = values.to(dtype), torch.finfo(dtype).tiny
    scales = name.endswith((".scale", ".smooth"))
    if not cast.isfinite().all() or (scales and bool((values < tiny).any())):
        worst = float(values.abs().max() if not cast.isfinite().all() else values.min())
        raise DQError(f"tensor {name!r}: {worst:.3g} is out of the range of {dtype}; quantize with --dtype bf16")
    return cast
