"""Milliseconds of quantized layers and models next to full precision: one process, in turn, medians.

Runs alternate (full, quantized, full, quantized, ...), so that a machine that slows down slows both. What the kernels
move and compute is counted too, for `roofline`.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from dq import cookbook, layers
from dq.bench import roofline
from dq.errors import DQError
from dq.kernels.cpu import attention
from dq.plan import LayerPlan, Recipe, TensorPlan
from dq.timing import in_turn, wait

# (rows, inputs, outputs): attention and feed-forward of small and large diffusion transformers
SHAPES = ((256, 384, 384), (1024, 1152, 1152), (1024, 1152, 4608), (4096, 1536, 1536), (4096, 3072, 3072))


@dataclass(frozen=True)
class Timing:
    """One row. full_ms, quantized_ms: medians per call; dtype: of the full-precision layer and of all activations.

    lines: a line of the roofline per kernel of the quantized side.
    """

    what: str
    device: str
    dtype: str
    kernel: str
    full_ms: float
    quantized_ms: float
    rounds: int
    emulated: bool = False
    lines: tuple[roofline.Line, ...] = ()

    @property
    def speedup(self) -> float:
        """Full-precision time over quantized time: above 1 is faster."""
        return self.full_ms / self.quantized_ms


@torch.inference_mode()
def linears(
    recipe: str | Recipe,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 1.0,
    shapes: Sequence[tuple[int, int, int]] | None = None,
) -> list[Timing]:
    """A row per shape: nn.Linear in `dtype` against the same layer under a recipe (DQError if unknown).

    shapes  (rows, inputs, outputs), SHAPES without any
    """
    wanted = cookbook.get(recipe)
    if not isinstance(wanted, Recipe):
        raise DQError(f"recipe {recipe!r} is a plan; dq bench takes a recipe name")
    weight, act = TensorPlan.parse(wanted.linear[0]), wanted.linear[1] and TensorPlan.parse(wanted.linear[1])
    rows = []
    for count, inputs, outputs in tqdm(shapes or SHAPES, desc="bench linears", delay=2):
        full = nn.Linear(inputs, outputs, device=device, dtype=dtype)
        packed = layers.pack("bench", full, LayerPlan("linear", (outputs, inputs), weight, act), dtype)
        x = torch.randn(count, inputs, device=device, dtype=dtype)
        what = f"linear {count} x {inputs} -> {outputs}"
        packed(x)  # chooses its kernel
        timing = _timing(what, full, packed, lambda layer, x=x: layer(x), seconds, packed.choice.label)
        line = roofline.Line(timing.kernel, 1, timing.quantized_ms, layer_work(packed, x, packed(x)))
        rows.append(replace(timing, emulated=packed.choice.emulated, lines=(line,)))
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
    choices = [layer.choice for layer in found.values() if not isinstance(layer, layers.PackedStack)]
    labels = dict.fromkeys(choice.label for choice in choices)
    run = lambda model: model(*inputs[0], **inputs[1])  # noqa: E731
    timing = _timing(f"{type(quantized).__name__} step", full, quantized, run, seconds, ", ".join(labels))
    lines = tuple(kernel_lines(quantized, lambda: run(quantized)))
    return replace(timing, emulated=any(choice.emulated for choice in choices), lines=lines)


def layer_work(layer: Any, x: torch.Tensor, y: torch.Tensor) -> roofline.Work:
    """What one call of a packed linear or convolution has to move and compute."""
    unit = roofline.unit_of(layer.plan, layer.choice.emulated or layer.choice.weight_only, x.dtype)
    width, bias = x.element_size(), layer.bias is not None
    if layer.op == "linear":
        return roofline.linear(layer.plan, x.numel() // layer.plan.columns, unit, width, bias)
    return roofline.convolution(layer.plan, x.shape, y.shape, unit, width, bias)


def kernel_lines(model: nn.Module, call: Callable[[], object], rounds: int = 3) -> list[roofline.Line]:
    """A line per kernel of the packed layers, and of attention, in one call of the model, longest first.

    Times are medians over `rounds` calls of the sum over all layers the kernel serves. The hooks that watch a layer
    keep fused modules apart: a GELU in an epilogue is not in these times.
    """
    passes = []
    for _ in range(rounds):
        with _Kernels(model) as kernels:
            call()
        passes.append(kernels.lines)
    lines = []
    for name, last in passes[-1].items():
        lines.append(replace(last, ms=statistics.median(each[name].ms for each in passes if name in each)))
    return sorted(lines, key=lambda line: -line.ms)


class _Kernels(TorchFunctionMode):
    """Watches the packed layers of a model, and calls of torch's and dq's attention, while the block runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.lines = {}
        self.hooks = []
        self.began = 0.0

    def __enter__(self):
        for layer in layers.packed_layers(self.model).values():
            if not isinstance(layer, layers.PackedStack):
                self.hooks += [layer.register_forward_pre_hook(self._before), layer.register_forward_hook(self._after)]
        return super().__enter__()

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        ours = function is torch.ops.dq.cpu_attention  # its last argument tells integers from floats
        if not ours and function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self._before()
        y = function(*args, **(kwargs or {}))
        q, k = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key")))
        unit = attention.unit(q.dtype, args[-1]) if ours else roofline.NAMES.get(q.dtype, str(q.dtype))
        work = roofline.attention(*q.shape[:3], k.shape[2], q.shape[3], unit, q.element_size())
        self._add(f"dq attention {unit}" if ours else "F.scaled_dot_product_attention", work)
        return y

    def _before(self, *_) -> None:
        wait()
        self.began = time.perf_counter()

    def _after(self, layer: nn.Module, args: tuple, y: torch.Tensor) -> None:
        self._add(layer.choice.label, layer_work(layer, args[0], y))

    def _add(self, kernel: str, work: roofline.Work) -> None:
        wait()
        spent, old = 1000 * (time.perf_counter() - self.began), self.lines.get(kernel)
        line = roofline.Line(kernel, 1, spent, work)
        if old is not None:
            line = roofline.Line(kernel, old.calls + 1, old.ms + spent, old.work + work)
        self.lines[kernel] = line


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
