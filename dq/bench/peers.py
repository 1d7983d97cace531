"""What a diffusers user would pick instead of dq, on the same layers of the same model: contenders, and running them.

A lane is a process. Contenders share one unless the libraries would change each other: torchao rewrites inductor's
configuration, SDNQ decides at import whether it compiles its functions. Every lane times a model in full precision of
its own, in bf16 or fp32 as the race is, and ratios are to that. All contenders quantize the layers to which dq's
`int8` gives integer activations. Peers are called through their public functions only; nothing of theirs is in this
repository.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dq import cookbook, layers, planning
from dq.attentionplan import INT8
from dq.bench import layers as bench
from dq.bench import levels, openvino, roofline, widths
from dq.errors import DQError, nearest
from dq.fusions import attention as ours
from dq.kernels.cpu import attention as cpu_attention
from dq.layers import attending
from dq.layers.memory import peak_bytes
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan

PINS = ("torchao==0.18.0", "sdnq==0.2.8", "openvino==2026.4.1", "nncf==3.4.0")
NEEDED = ("tabulate", "pydot", "scikit-learn", "joblib", "threadpoolctl", "narwhals")  # by NNCF; without telemetry
INSTALL = f"pip install --no-deps --target FOLDER {' '.join(PINS + NEEDED)}, then --peers-folder FOLDER"
BASE = "bf16"  # unless the race says fp32
FULL = "full"  # the scheme of a model that is not quantized, in the dtype of the race
W4A8 = Recipe("w4a8", linear=("int4/group:64", "int8/token"), conv=("int8/channel", "int8a/tensor"))
W4A8_ROW = Recipe("w4a8-row", linear=("int4/channel", "int8/token"), conv=("int8/channel", "int8a/tensor"))
W4A8_TWO = Recipe(
    "w4a8-two-level", linear=("int4/group:64+channel", "int8/token"), conv=("int8/channel", "int8a/tensor")
)
PRODUCT = re.compile(r"^(aten|onednn|mkldnn|quantized|torchao|dq|sdnq)::\w*(mm|linear|conv)\w*$")
REST = 0.02  # seconds between turns of processes or libraries: OpenMP threads spin a few ms before they sleep
WARM = 2  # calls before the first timed one: allocators, caches, guards of compiled graphs


@dataclass(frozen=True)
class Contender:
    """lane: the process. scheme: a key of SCHEMES or of `openvino.SCHEMES`.

    attention: as for `attended`; "" is what `dq.quantize` leaves, dq's own in bf16 where there are CPU kernels.
    only: the kinds of model it is for, dtypes: the races; all when empty.
    """

    name: str
    lane: str
    scheme: str
    compiled: bool = False
    attention: str = ""
    needs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    usual: bool = True

    def fits(self, model: str, dtype: str = BASE) -> bool:
        """Whether it is meant for a model of `widths` in a race of a dtype."""
        kind = "linear" if widths.LINEAR.fullmatch(model) else widths.width(model).kind
        meant = (not self.only or kind in self.only) and (not self.dtypes or dtype in self.dtypes)
        return meant and not (self.attention and kind == "linear")


SDNQ = {"SDNQ_USE_OPENVINO_MM": "0"}  # else it multiplies with OpenVINO where that is installed
EAGER, COMPILED = SDNQ | {"SDNQ_USE_TORCH_COMPILE": "0"}, SDNQ | {"SDNQ_USE_TORCH_COMPILE": "1"}
CONTENDERS = (
    Contender("dq-int8", "dq", "int8"),
    Contender("dq-w4a8", "dq", "w4a8"),
    Contender("dq-w4a8-row", "dq", "w4a8-row", only=("linear",)),
    Contender("dq-int8-attention-torch", "dq", "int8", attention="torch"),
    Contender("dq-int8-attention-int8", "dq", "int8", attention="int8"),
    Contender("bf16-attention-dq", "dq", FULL, attention="bf16", dtypes=("bf16",)),
    Contender("bf16", "bf16", "bf16", dtypes=("fp32",)),
    Contender("dq-int8-compiled", "dq compiled", "int8", compiled=True, usual=False),
    Contender("bf16-compiled", "full compiled", FULL, compiled=True, dtypes=("bf16",)),
    Contender("fp32-compiled", "full compiled", FULL, compiled=True, dtypes=("fp32",)),
    Contender("torchao-int8", "torchao", "torchao", needs="torchao"),
    Contender("torchao-int8-compiled", "torchao", "torchao", compiled=True, needs="torchao"),
    Contender("sdnq-int8", "sdnq", "sdnq", needs="sdnq", environment=EAGER),
    Contender("sdnq-int8-conv", "sdnq", "sdnq conv", needs="sdnq", environment=EAGER, only=(widths.UNET_CLASS,)),
    Contender("sdnq-int8-compiled", "sdnq compiled", "sdnq", needs="sdnq", environment=COMPILED),
    Contender("openvino", "openvino", openvino.PICKED, needs="openvino"),
    Contender("openvino-fp32", "openvino", openvino.FP32, needs="openvino"),
    Contender("openvino-int8-weight", "openvino", "openvino weight", needs="nncf"),
    Contender("openvino-int8-weight-sym", "openvino", "openvino weight sym", needs="nncf", usual=False),
    Contender("openvino-w8a8", "openvino", "openvino w8a8", needs="nncf"),
)
NAMES = tuple(contender.name for contender in CONTENDERS)


def get(name: str) -> Contender:
    """A contender by name. DQError for an unknown one."""
    found = next((contender for contender in CONTENDERS if contender.name == name), None)
    if found is None:
        raise DQError(f"contender {name!r} is unknown, {nearest(name, NAMES)}")
    return found


def plan(model: nn.Module, recipe: Recipe) -> Plan:
    """What a recipe makes of a model of `widths`; a single linear is quantized, not kept as the edge of a model."""
    if not isinstance(model, widths.Alone):
        return planning.make_plan(model, recipe)
    weight, act = (TensorPlan.parse(text) for text in recipe.linear)
    return Plan({"layer": LayerPlan("linear", tuple(model.layer.weight.shape), weight, act)}, recipe=recipe.name)


def targets(model: nn.Module, kinds: tuple[str, ...] = ("linear",)) -> list[str]:
    """The layers every contender quantizes: those to which dq's `int8` gives integer activations."""
    found = plan(model, cookbook.RECIPES["int8"]).layers
    return [name for name, layer in found.items() if layer.act is not None and layer.kind in kinds]


def _dq(recipe: Recipe) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        from dq import api

        api.quantize(model, plan(model, recipe), progress=False)
        return model

    return apply


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    chosen = set(targets(model))
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)
    return model


def _sdnq(**more) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        chosen = set(targets(model, ("linear", "conv2d") if more else ("linear",)))
        weights = (name for name, module in model.named_modules() if getattr(module, "weight", None) is not None)
        others = [f"{name}.weight" for name in weights if name not in chosen]
        options = {"weights_dtype": "int8", "use_quantized_matmul": True, "add_skip_keys": False} | more
        return sdnq_post_load_quant(model, modules_to_not_convert=others, **options)

    return apply


SCHEMES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "int8": _dq(cookbook.RECIPES["int8"]),
    "w4a8": _dq(W4A8),
    "w4a8-row": _dq(W4A8_ROW),
    "w4a8-two-level": _dq(W4A8_TWO),
    "torchao": _torchao,
    "sdnq": _sdnq(),
    "sdnq conv": _sdnq(quant_conv=True, use_quantized_matmul_conv=True),
}


class Contestant:
    """The half of a lane that stands in its process: one model at a time, quantized by each of the lane's schemes."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self.threads = threads
        self.name, self.base = "", BASE
        self.inputs = {}
        self.expected = None
        self.models: dict[str, nn.Module] = {}
        self.runs: dict[str, Callable] = {}
        self.around: dict[str, Callable] = {}  # context managers, by contender, inside which its calls are timed
        self.converted: openvino.Converted | None = None

    @torch.no_grad()
    def load(self, name: str, dtype: str = BASE) -> dict:
        """Build the model `name` of `widths` in bf16 or fp32, the base of this lane; forget the one before."""
        self.drop()
        self.name, self.base, self.inputs = name, dtype, widths.inputs(name, roofline.DTYPES[dtype])
        model = self.models[FULL] = widths.build(name, roofline.DTYPES[dtype])
        run = self.runs[dtype] = self._call(model)
        for _ in range(WARM):
            self.expected = run().float()
        found = {"kernel": _products(run), "weight_bytes": layers.parameter_bytes(model)}
        return found | {"level": levels.shown()}

    @torch.no_grad()
    def ready(self, contender: Contender) -> dict:
        """Quantize, compile and warm up. -> kernel, error_db to the base, seconds, versions; or `skipped`: why."""
        began = time.perf_counter()
        try:
            if why := _missing(contender):
                return {"skipped": why}
            model = self._quantized(contender.scheme)
            call = self._call(torch.compile(model, dynamic=False) if contender.compiled else model)
            self.runs[contender.name] = call
            self.around[contender.name] = functools.partial(attended, model, contender.attention)
            if isinstance(model, openvino.Compiled):
                self.around[contender.name] = rested
            with self.around[contender.name]():
                own = set(ours.attached(model).values())
                for _ in range(WARM):
                    y = call()
            if emulated := _emulated(model):  # kernels are chosen in the first call
                self.runs.pop(contender.name)
                return {"skipped": f"emulated here, which no table of speeds shows: {emulated}"}
        except Exception as error:  # a peer that fails is a row that says so, not the end of the others
            self.runs.pop(contender.name, None)
            return {"skipped": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        kernel = ", ".join(_labels(model)) or getattr(model, "kernel", "") or _products(self.runs[contender.name])
        units = sorted({cpu_attention.unit(roofline.DTYPES[self.base], plan == INT8) for plan in own})
        kernel += "".join(f", dq attention {unit}" for unit in units)
        figures = {"kernel": kernel, "error_db": _error_db(self.expected, y), "versions": _versions(contender)}
        return figures | {"seconds": round(time.perf_counter() - began, 1)}

    @torch.no_grad()
    def turn(self, name: str, least_ms: float = 0.0) -> list[float]:
        """Milliseconds of calls of a contender that is ready: one, or as many as fill `least_ms` after a first."""
        times, run = [], self.runs[name]
        with self.around.get(name, contextlib.nullcontext)():
            if least_ms:
                run()  # brings weights and code back into the caches
            while not times or sum(times) < least_ms:
                began = time.perf_counter()
                run()
                times.append(1000 * (time.perf_counter() - began))
        return times

    @torch.no_grad()
    def lines(self, scheme: str = "int8", rounds: int = 3) -> list[roofline.Line]:
        """A roofline line per kernel of a quantized model that is ready, its attention in each precision it ran in."""
        lines: dict[str, roofline.Line] = {}
        for name, run in self.runs.items():
            if name != self.base and get(name).scheme == scheme and not get(name).compiled:
                with self.around[name]():
                    found = bench.kernel_lines(self.models[scheme], run, rounds)
                lines = {line.kernel: line for line in found} | lines
        return list(lines.values())

    def peaks(self, units: tuple[str, ...]) -> roofline.Peaks:
        """What this process can reach at most."""
        return roofline.measure("cpu", units)

    def drop(self) -> None:
        """Forget all models and compiled graphs."""
        self.models.clear()
        self.runs.clear()
        self.around.clear()
        self.expected = self.converted = None
        torch.compiler.reset()

    @torch.no_grad()
    def save(self, name: str, folder: str, recipe: Recipe | None) -> int:
        """Save a model, quantized when there is a recipe. -> bytes of its weights in bf16."""
        model = widths.build(name)
        size = layers.parameter_bytes(model)
        if recipe is not None:
            SCHEMES[recipe.name](model)
        model.save_pretrained(folder)
        return size

    @torch.no_grad()
    def peak(self, name: str, folder: str, recipe: Recipe | None) -> dict:
        """Load a saved model, quantize it while it loads when there is a recipe, and run one step.

        -> peak_bytes: the most this process ever held; before_bytes: what it held with everything imported
        """
        import diffusers

        import dq

        kind, inputs = getattr(diffusers, widths.width(name).kind), widths.inputs(name)
        before = peak_bytes() or 0
        config = {} if recipe is None else {"quantization_config": dq.DQConfig(recipe)}
        model = kind.from_pretrained(folder, torch_dtype=torch.bfloat16, **config)
        widths.run(model, inputs)
        return {
            "before_bytes": before,
            "peak_bytes": peak_bytes() or 0,
            "kernel": ", ".join(_labels(model)) or "torch",
        }

    def _call(self, model: Callable) -> Callable[[], torch.Tensor]:
        given = self.inputs
        return lambda: widths.run(model, given)

    def _quantized(self, scheme: str) -> nn.Module:
        if scheme not in self.models:
            self.models[scheme] = self._made(scheme)
        return self.models[scheme]

    def _made(self, scheme: str) -> nn.Module:
        dtype = roofline.DTYPES[self.base]
        if scheme in openvino.SCHEMES:
            if self.converted is None:
                model = widths.build(self.name, dtype)
                chosen = {kind: targets(model, (kind,)) for kind in ("linear", "conv2d")}
                self.converted = openvino.Converted(model.float(), self.inputs, chosen)
            return self.converted.compiled(scheme, self.base, self.threads)
        if scheme == "bf16":
            return Cast(widths.build(self.name), torch.bfloat16)
        return SCHEMES[scheme](widths.build(self.name, dtype))


class Cast(nn.Module):
    """A model in another dtype than its inputs come in."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.inner, self.dtype = model, dtype

    def forward(self, **given):
        return self.inner(**{key: self._in(value) for key, value in given.items()})

    def _in(self, value):
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def serve(connection, threads: int, folder: str, log: str) -> None:
    """Answer orders (method, arguments) of `race.Lane` until it hangs up: ("done", result) or ("failed", why).

    What the libraries print goes to the file `log`.
    """
    with Path(log).open("w") as printed:
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
    if folder:
        sys.path.append(folder)
    runner = Contestant(threads)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            order, arguments = connection.recv()
            try:
                connection.send(("done", getattr(runner, order)(*arguments)))
            except Exception as error:
                connection.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


@contextlib.contextmanager
def rested() -> Iterator[None]:
    """A pause on both sides: threads of torch and of another library spin a few ms before they sleep."""
    time.sleep(REST)
    yield
    time.sleep(REST)


@contextlib.contextmanager
def attended(model: nn.Module, attention: str) -> Iterator[None]:
    """Attention of "torch", or dq's own in "bf16" or "int8", inside the block; "" leaves what the model has."""
    before = ours.attached(model)
    wanted = attending.planned(model, INT8) if attention == "int8" else {}
    if attention in ("bf16", "int8") and not ours.attach(model, wanted):
        raise RuntimeError(f"no attention of dq's own: {ours.why_not(model) or 'no module of the model has any'}")
    if attention == "torch":
        ours.detach(model)
    try:
        yield
    finally:
        if attention:
            ours.detach(model)
            if before:
                ours.attach(model, before)


def _missing(contender: Contender) -> str | None:
    """Why a contender cannot start here, None when it can."""
    if contender.needs:
        try:
            importlib.import_module(contender.needs)
        except ImportError as error:
            return f"{contender.needs} is not installed ({error}): {INSTALL}"
    return None


def _labels(model: nn.Module) -> list[str]:
    """Kernels of the layers with quantized activations, most used first."""
    found = layers.packed_layers(model).values()
    chosen = [layer for layer in found if not isinstance(layer, layers.PackedStack)]
    counts: Counter[str] = Counter()
    for layer in chosen:
        if layer.plan.act is not None:
            counts[layer.choice.label] += 1
    return [label for label, _ in counts.most_common()]


def _emulated(model: nn.Module) -> str | None:
    """The first kernel that only emulates what its layer's plan asks for."""
    found = layers.packed_layers(model).values()
    return next(
        (layer.choice.label for layer in found if not isinstance(layer, layers.PackedStack) and layer.choice.emulated),
        None,
    )


def _products(run: Callable) -> str:
    """Matrix products that the profiler sees in a call, longest first, those above a tenth of their time."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
    seen = {event.key: event.self_cpu_time_total for event in profile.key_averages() if PRODUCT.match(event.key)}
    total = sum(seen.values())
    names = [name for name, spent in sorted(seen.items(), key=lambda item: -item[1]) if spent >= 0.1 * total]
    return ", ".join(names) or "no product of a library"


def _error_db(expected: torch.Tensor, y: torch.Tensor) -> float | None:
    """10 log10(sum x^2 / sum (x - y)^2), None for NaN and for equal outputs."""
    noise = (expected - y.float()).square().sum()
    decibels = float(10 * torch.log10(expected.square().sum() / noise))
    return round(decibels, 1) if math.isfinite(decibels) else None


def _versions(contender: Contender) -> dict[str, str]:
    needed = [contender.needs, "openvino"] if contender.lane == "openvino" else [contender.needs]
    return {name: importlib.metadata.version(name) for name in filter(None, needed)}
