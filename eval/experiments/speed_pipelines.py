"""Rows of eval/results/pipelines.json: a step of each embedded model under every recipe, beside full precision.

`python -m eval.experiments.speed --pipelines`. A calibrated recipe is not fitted: its plan is packed with neutral
values, since a kernel takes as long for any numbers. Where fitting decides about shapes, they are those it starts
from: a branch of the rank the recipe can afford, smoothing where the method smooths, one step's stored scales, and for
mixed formats the one that most layers have before the search.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import nn

import dq
from dq import api, cookbook, layers, methods, model, planning
from dq.bench import layers as bench
from dq.bench import roofline
from dq.fit import groups
from dq.host import mark
from dq.layers import naming
from dq.plan import LayerPlan, Plan, Recipe
from eval.experiments import rows
from eval.markdown import table
from pipelines import tiny

FILE = rows.FOLDER / "pipelines.json"
KEYS = ("model", "device", "dtype", "recipe", "machine", "level", "threads")
SMOOTHED = ("svdquant", "viditq")
LEAST = 0.8  # of full precision's speed: below it `dq.explain` has to say so
SAYS = "times as long here as in full precision"


def run(options: argparse.Namespace) -> None:
    """A row per model, dtype and recipe; written one by one."""
    from eval.experiments import speed

    stamp = rows.stamp(options.device) | rows.conditions(options.threads)
    file = options.out or FILE
    for name in options.models or tiny.NAMES:
        for dtype in speed.dtypes(options):
            for recipe in options.recipes or dq.recipes():
                kind = str(speed.DTYPES[dtype])[6:]
                key = {"model": name, "device": options.device, "dtype": kind, "recipe": recipe}
                if options.again or not rows.there(file, key, stamp):
                    row = measure(name, recipe, options.device, speed.DTYPES[dtype], min(options.seconds, 2.0))
                    rows.add(file, row | key | stamp, KEYS)
                    ratio = row["full_ms"] / row["quantized_ms"]
                    print(f"{name} {dtype} {recipe}: {row['full_ms']:.2f} ms, {ratio:.2f} times as fast")


def measure(name: str, recipe: str, device: str, dtype: torch.dtype, seconds: float) -> dict:
    """Figures of a step, whether the recipe was fitted, and what `dq.explain` says of full precision's speed."""
    pipe, wanted = tiny.load(name, dtype).to(device), cookbook.get(recipe)
    [(part, denoiser)] = api.find_denoisers(pipe).items()
    if wanted.needs_calibration:
        quantize_unfitted(denoiser, wanted)
    else:
        dq.quantize(denoiser, recipe, progress=False)
    timing = bench.denoiser(pipe, part, "a red circle", seconds, **tiny.CALL[name])
    figures = {key: value for key, value in asdict(timing).items() if key not in ("lines", "what")}
    said = [note for note in dq.explain(denoiser).notes if SAYS in note]
    return figures | {"fitted": not wanted.needs_calibration, "said": said}


@torch.no_grad()
def quantize_unfitted(denoiser: nn.Module, recipe: Recipe) -> Plan:
    """Pack a model as a calibrated recipe would, with values that nothing was fitted for."""
    plan = methods.prepared(denoiser, planning.make_plan(denoiser, recipe), recipe)
    dtype = next(denoiser.parameters()).dtype
    plan.compute_dtype = str(dtype).removeprefix("torch.")
    plan.layers = {name: _as_fitted(layer, recipe, dtype.itemsize) for name, layer in plan.layers.items()}
    model.install(denoiser, {name: _packed(denoiser, name, layer, dtype) for name, layer in plan.layers.items()})
    mark.mark(denoiser, plan)
    return plan


def _as_fitted(layer: LayerPlan, recipe: Recipe, width: int) -> LayerPlan:
    options: Mapping = recipe.options
    if layer.act is None or layer.kind != "linear" or recipe.method not in SMOOTHED:
        return layer
    rank = groups.affordable_rank(layer, options["rank"], options["share"], width) if "rank" in options else 0
    return replace(layer, rank=rank, smooth=True)


def _packed(denoiser: nn.Module, name: str, plan: LayerPlan, dtype: torch.dtype) -> nn.Module:
    module = naming.at(denoiser, name)
    made = layers.PACKED[plan.kind].like(module, plan, dtype, str(module.weight.device))
    layers.fill(name, made, module.weight)
    if module.bias is not None:
        made.put("bias", module.bias.detach().to(dtype))
    stored = layers.tensor_shapes(plan).get("act_scale")
    if stored is not None:
        made.put("act_scale", torch.full(stored[0], 0.05, device=module.weight.device))
    return made.train(module.training)


def tables(found: list[dict]) -> list[str]:
    """Markdown lines: a line a recipe, a column per model, level and dtype; below it what is slow and not said."""
    keys = list(dict.fromkeys((row["model"], row["level"], row["dtype"]) for row in found))
    timed = [row for row in found if not row["emulated"]]
    cells = {(row["model"], row["level"], row["dtype"], row["recipe"]): _cell(row) for row in timed}
    head = ["recipe", *(f"{model}, {level}, {roofline.NAMES[getattr(torch, dtype)]}" for model, level, dtype in keys)]
    names = list(dict.fromkeys(row["recipe"] for row in timed))
    lines = table(head, [[f"`{name}`", *(cells.get((*key, name), "") for key in keys)] for name in names])
    emulated = sorted({row["recipe"] for row in found} - set(names))
    below = [f"Emulated here, and not timed: {', '.join(f'`{name}`' for name in emulated)}."] if emulated else []
    return [*lines, "", *below] if below else lines


def _cell(row: dict) -> str:
    return f"{row['full_ms'] / row['quantized_ms']:.2f}" + (" (said)" if row["said"] else "")


def silent(found: list[dict]) -> list[str]:
    """Recipes slower than LEAST of full precision of which `dq.explain` did not say so."""
    slow = [row for row in found if row["full_ms"] < LEAST * row["quantized_ms"] and not row["said"]]
    return [f"{row['recipe']} on {row['model']} in {row['dtype']} on {row['level']}" for row in slow]
