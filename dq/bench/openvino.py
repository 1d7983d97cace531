"""OpenVINO and NNCF as contenders: a torch model converted, compressed or quantized, and compiled for the processor.

    plain    as converted; computes in what OpenVINO picks (bf16 where there are units) or in fp32
    weight   nncf.compress_weights of linears, 8 bits a row, affine as by default, or symmetric; convolutions stay: the
             U-Net's of 1 x 1 do not compile with compressed weights
    w8a8     nncf.quantize for transformers: SmoothQuant, then scales of activations from the inputs of the race

NNCF is told to leave alone every product but those of the layers that dq quantizes. ONEDNN_MAX_CPU_ISA binds
OpenVINO's oneDNN kernels only: its own and those of MLAS go by the processor, and `kernel` names them. Some graphs do
not compile under such a limit (compressed weights, bf16): those contenders are left out with OpenVINO's reason.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dq.bench import levels

PRODUCTS = ("MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention", "Gather")  # of a converted model
RUN = ("FullyConnected", "Convolution", "MatMul")  # of a compiled one, by type of layer
INNER = "inner"


class _Flat(nn.Module):
    """A model whose arguments are tensors in order; the other arguments are always the same."""

    def __init__(self, model: nn.Module, given: dict):
        super().__init__()
        self.inner, self.given = model, given
        self.names = [name for name, value in given.items() if isinstance(value, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        out = self.inner(**(self.given | dict(zip(self.names, tensors, strict=True))))
        return out if isinstance(out, torch.Tensor) else out[0]


class Compiled(nn.Module):
    """A compiled model called as the torch model is; it always reads the inputs it was made with, bound once."""

    def __init__(self, compiled: Any, tensors: Sequence[torch.Tensor]):
        super().__init__()
        self.arrays = [tensor.numpy() for tensor in tensors]
        self.request = compiled.create_infer_request()
        self.kernel = kernel(compiled)

    def forward(self, **_given) -> torch.Tensor:
        found = self.request.infer(self.arrays, share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])


class Converted:
    """An fp32 torch model as OpenVINO's, from which its contenders are made.

    targets  names of the layers that may be quantized, by kind
    """

    def __init__(self, model: nn.Module, given: dict, targets: Mapping[str, Sequence[str]]):
        openvino: Any = importlib.import_module("openvino")
        given = {key: _float(value) for key, value in given.items()}
        flat = _Flat(model, given)
        self.tensors = [given[name] for name in flat.names]
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        self.model = openvino.convert_model(flat, example_input=tuple(self.tensors), input=shapes)
        self.targets = targets

    def compiled(self, scheme: str, dtype: str, threads: int) -> Compiled:
        """A contender: a key of SCHEMES, computing in "fp32", or in OpenVINO's own choice for "bf16"."""
        openvino: Any = importlib.import_module("openvino")
        if scheme == PICKED and not levels.has_bf16():
            raise RuntimeError("OpenVINO picks fp32 here: see openvino-fp32")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        if scheme != PICKED and (scheme == FP32 or dtype == "fp32" or not levels.has_bf16()):
            options["INFERENCE_PRECISION_HINT"] = "f32"
        made = SCHEMES[scheme](self.model.clone(), self)
        return Compiled(openvino.Core().compile_model(made, "CPU", options), self.tensors)

    def ignored(self, *kinds: str) -> Any:
        """NNCF's scope of what is left as it is: all but targets of these kinds."""
        nncf: Any = importlib.import_module("nncf")
        own = tuple(f"__module.{INNER}.{name}/" for kind in kinds for name in self.targets[kind])
        others = [node for node in self.model.get_ops() if node.get_type_name() in PRODUCTS]
        names = [node.get_friendly_name() for node in others if not node.get_friendly_name().startswith(own)]
        return nncf.IgnoredScope(names=names, validate=False)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _plain(model: Any, _converted: Converted) -> Any:
    return model


def _weight(mode: str) -> Callable[[Any, Converted], Any]:
    def apply(model: Any, converted: Converted) -> Any:
        nncf: Any = importlib.import_module("nncf")
        kind = nncf.CompressWeightsMode(mode)
        return nncf.compress_weights(model, mode=kind, ignored_scope=converted.ignored("linear"))

    return apply


def _w8a8(model: Any, converted: Converted) -> Any:
    nncf: Any = importlib.import_module("nncf")
    inputs = nncf.Dataset([[tensor.numpy() for tensor in converted.tensors]])
    kind = nncf.ModelType.TRANSFORMER
    others = converted.ignored("linear", "conv2d")
    return nncf.quantize(model, inputs, subset_size=1, model_type=kind, ignored_scope=others)


PICKED, FP32 = "openvino", "openvino fp32"
SCHEMES: dict[str, Callable[[Any, Converted], Any]] = {
    PICKED: _plain,
    FP32: _plain,
    "openvino weight": _weight("int8_asym"),
    "openvino weight sym": _weight("int8_sym"),
    "openvino w8a8": _w8a8,
}


def kernel(compiled: Any) -> str:
    """What serves the products of a compiled model, most used first, and what a limit does not bind."""
    nodes = Counter(
        (_told(node, "layerType"), _told(node, "primitiveType")) for node in compiled.get_runtime_model().get_ops()
    )
    used: Counter[str] = Counter()
    for (kind, made), count in nodes.items():
        if kind in RUN:
            used[made] += count
    label = "OpenVINO " + (", ".join(f"{made} ({count})" for made, count in used.most_common()) or "no product")
    free = {made for _, made in nodes if "avx512" in made or "mlas" in made}
    limited = "AVX2" in os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    return label + (f"; not limited: {', '.join(sorted(free))}" if limited and free else "")


def _told(node: Any, key: str) -> str:
    found = node.get_rt_info()
    return found[key].astype(str) if key in found else ""
