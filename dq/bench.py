"""Milliseconds of quantized layers and models next to full precision: one process, in turn, medians.

Runs alternate (full, quantized, full, quantized, ...), so that a machine that slows down slows both.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from dq import layers, recipes
from dq.plan import DQError, LayerPlan, Recipe, TensorPlan

# (rows, inputs, outputs): attention and feed-forward of small and large diffusion transformers
SHAPES = ((256, 384, 384), (1024, 1152, 1152), (1024, 1152, 4608), (4096, 1536, 1536), (4096, 3072, 3072))


@dataclass(frozen=True)
class Timing:
    """One row. full_ms, quantized_ms: medians per call; dtype: of the full-precision layer and of all activations."""

    what: str
    device: str
    dtype: str
    kernel: str
    full_ms: float
    quantized_ms: float
    rounds: int

    @property
    def speedup(self) -> float:
        """Full-precision time over quantized time: above 1 is faster."""
        return self.full_ms / self.quantized_ms


def in_turn(runs: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 5) -> dict[str, list[float]]:
    """Milliseconds of every call, by name: callables run alternately, once unmeasured, then for so many seconds."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(next(iter(times.values()))) < least:
        for name, run in runs.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def linears(recipe: str, device: str, dtype: torch.dtype = torch.bfloat16, seconds: float = 1.0) -> list[Timing]:
    """A row per shape in SHAPES: nn.Linear in `dtype` against the same layer under a recipe (DQError if unknown)."""
    wanted = recipes.get(recipe)
    if not isinstance(wanted, Recipe):
        raise DQError(f"recipe {recipe!r} is a plan; dq bench takes a recipe name")
    weight, act = (text and TensorPlan.parse(text) for text in wanted.linear)
    rows = []
    for count, inputs, outputs in tqdm(SHAPES, desc="bench linears", delay=2):
        full = nn.Linear(inputs, outputs, device=device, dtype=dtype)
        packed = layers.pack("bench", full, LayerPlan("linear", (outputs, inputs), weight, act), dtype)
        x = torch.randn(count, inputs, device=device, dtype=dtype)
        what = f"linear {count} x {inputs} -> {outputs}"
        rows.append(_timing(what, full, packed, lambda layer, x=x: layer(x), seconds, packed.choice.label))
    return rows


@torch.inference_mode()
def denoiser(pipe, name: str, prompt: str = "a red circle", seconds: float = 5.0, **call) -> Timing:
    """One denoising step of a quantized pipeline against the full-precision model its layers stand for.

    name   the component, e.g. "transformer"
    call   further arguments of the pipeline; the inputs of the step are recorded from a real call
    """
    quantized = getattr(pipe, name)
    found = layers.packed_layers(quantized)
    if not found:
        raise DQError(f"{name} is not quantized; call dq.quantize(pipe, 'int8') first")
    from dq.api import dequantize

    full = copy.deepcopy(quantized)
    dequantize(full)
    inputs = recorded_inputs(pipe, name, prompt, **call)
    labels = dict.fromkeys(layer.choice.label for layer in found.values() if getattr(layer, "choice", None))
    run = lambda model: model(*inputs[0], **inputs[1])  # noqa: E731
    return _timing(f"{type(quantized).__name__} step", full, quantized, run, seconds, ", ".join(labels))


def recorded_inputs(pipe, name: str, prompt: str | list[str], **call) -> tuple[tuple, dict]:
    """Positional and keyword arguments that the denoiser `name` got in the first step of a two-step run."""
    seen: list[tuple[tuple, dict]] = []
    model = getattr(pipe, name)
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        pipe(prompt=prompt, **({"output_type": "latent"} | call | {"num_inference_steps": 2}))
    finally:
        handle.remove()
    return seen[0]


def _timing(what: str, full: nn.Module, quantized: nn.Module, run: Callable, seconds: float, kernel: str) -> Timing:
    times = in_turn({"full": lambda: run(full), "quantized": lambda: run(quantized)}, seconds)
    first = next(p for p in full.parameters() if p.is_floating_point())
    dtype, medians = str(first.dtype).removeprefix("torch."), {key: statistics.median(v) for key, v in times.items()}
    return Timing(what, first.device.type, dtype, kernel, medians["full"], medians["quantized"], len(times["full"]))
