"""The layers that ship: bytes and kernels in place of a linear, a convolution or stacked expert weights.

    y = W' Q(z) + up (down z) + bias,    z = (x * smooth) R,    W' = Q((W / smooth) R - up down)

x (..., in), W (out, in), smooth (in,), R (in, in) of Hadamard blocks, down (rank, in), up (out, rank). Convolutions
are the same with channels for features. Packed layers subclass the layer they replace and hold plain Parameters only
(no buffers, no tensor subclasses), so that offload, hooks, LoRA and safetensors treat them like any other layer;
weights are int8 bytes, never uint8, and tell the compute dtype to who asks for `layer.weight.dtype` (`codes`). Their
differentiable counterparts, for fitting, are in `drafts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dq import kernels
from dq.errors import DQError
from dq.formats.base import FormatError, check_finite
from dq.kernels import Conv, Tensors, reference
from dq.kernels.reference import encode
from dq.layers import codes, hadamard, naming
from dq.layers.serving import Served
from dq.plan import LayerPlan

CONV_KINDS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
PLAIN = {"linear": nn.Linear, **CONV_KINDS}
OPTIONAL = tuple("zero scale_global table smooth permute proj_down proj_up act_scale start_in start_out".split())
STARTS_ALIKE = 1e-4  # squared distance, as a share of the power, up to which a first token is the stored one


def kind_of(module: nn.Module) -> str | None:
    """The LayerPlan kind of a full-precision layer, None when dq cannot quantize it (or already has)."""
    own = getattr(module, "_parameters", {}).get("weight")  # weight_norm, parametrizations: computed from others
    if isinstance(module, _Packed) or forward_replaced(module) or not isinstance(own, nn.Parameter):
        return None
    for kind, base in PLAIN.items():
        if isinstance(module, base) and type(module).forward is base.forward:  # a forward of its own is not ours
            return kind
    return None


def forward_replaced(module: nn.Module) -> bool:
    """Whether somebody gave this one instance another forward; accelerate's and diffusers' hooks call the old one."""
    own = vars(module)
    return "forward" in own and "_hf_hook" not in own and "_diffusers_hook" not in own


def tensor_shapes(plan: LayerPlan) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of every packed tensor of a layer but its bias; dtype None means the compute dtype."""
    spec, grain, rows = plan.weight.spec, plan.weight.grain, plan.rows
    widths = [last - first for first, last in plan.parts]
    scale_rows = 1 if grain.kind == "tensor" else rows
    blocks = sum(grain.scale_shape(rows, width)[1] for width in widths)
    shapes: dict = {"weight": ((rows, spec.row_bytes(plan.columns)), torch.int8)}
    shapes["scale"] = ((scale_rows, blocks), torch.int8 if spec.scale_bytes == 1 or grain.two_level else torch.float32)
    if spec.affine or spec.offset:
        shapes["zero"] = ((scale_rows, blocks), torch.int8 if spec.affine else torch.float32)
    if spec.global_bytes or grain.two_level:
        shapes["scale_global"] = ((rows, len(widths)) if grain.two_level else (len(widths),), torch.float32)
    if spec.tabled:
        shapes["table"] = ((scale_rows, len(widths) * spec.table_width), torch.int8)
    if plan.smooth:
        shapes["smooth"] = ((plan.shape[1],), torch.float32)
    if plan.permute:
        shapes["permute"] = ((plan.shape[1],), torch.int32)
    if plan.rank:
        shapes["proj_down"], shapes["proj_up"] = ((plan.rank, plan.columns), None), ((rows, plan.rank), None)
    if plan.act is not None and plan.act.scale != "dynamic":
        shapes["act_scale"] = ((plan.steps, len(widths)), torch.float32)
    if plan.start:
        shapes["start_in"], shapes["start_out"] = ((plan.columns,), None), ((rows,), None)
    return shapes


def stored_bytes(plan: LayerPlan, dtype: torch.dtype) -> int:
    """Bytes of every packed tensor of a layer of compute dtype `dtype` but its bias."""
    return sum(math.prod(shape) * (kind or dtype).itemsize for shape, kind in tensor_shapes(plan).values())


def geometry(module: nn.modules.conv._ConvNd) -> tuple[Conv, tuple[int, ...] | None, str]:
    """-> (zero-padding geometry, explicit padding for F.pad or None, its mode) of a convolution."""
    pads = tuple(module._reversed_padding_repeated_twice)
    symmetric = pads[0::2] == pads[1::2]
    explicit = module.padding_mode != "zeros" or not symmetric
    padding = (0,) * len(module.stride) if explicit else tuple(reversed(pads[0::2]))
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return Conv(module.stride, padding, module.dilation, module.groups), pads if explicit else None, mode


def per_channel(vector: torch.Tensor, x: torch.Tensor, conv: bool) -> torch.Tensor:
    """`vector` (in,) in x's dtype, shaped to multiply x along its channels."""
    vector = vector.to(x.dtype)
    return vector.reshape(-1, *[1] * (x.dim() - 2)) if conv else vector


class _Frozen(nn.Module):
    """Frozen Parameters whose dtypes belong to the format.

    wide  of an fp16 model: the host keeps this layer in fp32, which is what it gives then
    """

    wide = False
    plan: LayerPlan
    compute_dtype: torch.dtype
    scale: torch.Tensor
    zero: torch.Tensor | None
    scale_global: torch.Tensor | None
    table: torch.Tensor | None

    @property
    def weight(self) -> torch.Tensor:
        """The packed bytes, which tell the compute dtype to who casts by it (`codes`)."""
        found = self._parameters.get("weight")
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        if found.is_meta or torch.compiler.is_compiling():
            return found  # accelerate casts what it brings back to the dtype it finds on meta
        return codes.of(found, torch.float32 if self.wide else self.compute_dtype)

    @property
    def stored(self) -> nn.Parameter:
        """The Parameter of the packed bytes, int8."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def put(self, name: str, value: torch.Tensor) -> None:
        """Set one packed tensor as a frozen Parameter."""
        setattr(self, name, nn.Parameter(value, requires_grad=False))

    def _apply(self, fn: Callable, recurse: bool = True):
        """Move, never convert: a cast of the model must not round scales or factors."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


class _Packed(Served, _Frozen):
    """What packed linears and convolutions share. `plan`, `compute_dtype` and `clock` are set by `_allocate`."""

    op = "linear"
    clock: Any  # a Clock, None without a table and later phases
    backend: str | None
    bias: torch.Tensor | None
    smooth: torch.Tensor | None
    permute: torch.Tensor | None
    act_scale: torch.Tensor | None
    proj_down: torch.Tensor | None
    proj_up: torch.Tensor | None
    start_in: Any
    start_out: Any
    _plain: Callable[[str], nn.Module]

    def _allocate(self, plan: LayerPlan, has_bias: bool, compute_dtype: torch.dtype, device: str) -> None:
        self.plan = plan
        self.compute_dtype = compute_dtype
        self.clock, self.wide = None, False
        self.backend = None  # one of its own, set by dq.set_backend for its model
        self._unbind()
        self.register_parameter("bias", None)  # first: many take the dtype of a model's first parameter for its own
        if has_bias:
            self.put("bias", torch.empty(plan.shape[0], dtype=compute_dtype, device=device))
        for name, (shape, dtype) in tensor_shapes(plan).items():
            self.put(name, torch.empty(shape, dtype=dtype or compute_dtype, device=device))
        for name in OPTIONAL:
            if name not in self._parameters:
                self.register_parameter(name, None)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        """The bias last, and all in dq's own order, as in files."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if kernels.is_laid(self._order()):
            found = kernels.restored(self._order())
            destination |= {f"{prefix}weight": found.weight.detach(), f"{prefix}scale": found.scale.detach()}
        if (bias := destination.pop(f"{prefix}bias", None)) is not None:
            destination[f"{prefix}bias"] = bias

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def _conv(self) -> Conv | None:
        return None

    def tensors(self) -> Tensors:
        """The tensors in dq's own order, with the activation scales of the running step."""
        found = self._raw()
        return kernels.restored(found) if kernels.is_laid(found) else found

    def _raw(self) -> Tensors:
        """`tensors`, in the order in which they lie: a kernel's own, where one laid them."""
        own: dict[str, Any] = self._parameters  # eight look-ups by attribute take as long as a small product
        stored = own["act_scale"]
        if stored is not None:
            stored = stored.index_select(0, self.clock.to(stored.device))[0] if self.plan.steps > 1 else stored[0]
        return Tensors(
            own["weight"], own["scale"], own["zero"], own["scale_global"], own["bias"], stored, own["proj_down"],
            own["proj_up"], own["table"],
        )  # fmt: skip

    def run(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """smooth, rotate, permute, then the kernel chosen for the running phase; with `gelu` a tanh GELU."""
        if x.dtype is torch.float16 and (self.wide or self.smooth is not None or self.plan.rotate):
            y = self.run(x.float(), gelu)  # a transformed input may leave the range of fp16
            return y if self.wide else y.to(x.dtype)
        self.ready(x.device)
        if self.smooth is not None:
            x = x * per_channel(self.smooth, x, self.op == "conv")
        if self.plan.rotate:
            turn = next((each for each in self._turns if each.dtype is x.dtype), self._turns[0])
            x = hadamard.rotate(x, self.plan.rotate, 1 if self.op == "conv" else -1, matrix=turn)
        if self.permute is not None:
            x = x.index_select(1 if self.op == "conv" else -1, self.permute)
        return self.product(x, gelu)

    @torch.no_grad()
    def dense_weight(self) -> torch.Tensor:
        """The fp32 weight this layer stands for, branch, order, rotation and smoothing included, in its own shape."""
        weight = reference.weight_decoder(self.plan)(self.tensors())
        if self.proj_up is not None and self.proj_down is not None:
            weight = weight + self.proj_up.float() @ self.proj_down.float()
        weight = weight.reshape(self.plan.shape)
        if self.permute is not None:
            weight = weight.index_select(1, self.permute.argsort())
        if self.plan.rotate:
            weight = hadamard.rotate(weight, self.plan.rotate, 1, inverse=True)
        if self.smooth is not None:
            weight = weight * self.smooth.reshape(1, -1, *[1] * (weight.dim() - 2))
        return weight

    def dense(self) -> nn.Module:
        """The full-precision layer this one stands for, in the compute dtype (fp32 if `wide`)."""
        module: Any = self._plain("meta")
        dtype = torch.float32 if self.wide else self.compute_dtype
        module.weight = nn.Parameter(self.dense_weight().to(dtype), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.data.float() if self.wide else self.bias.data.clone()
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module.train(self.training)

    def extra_repr(self) -> str:
        act = ", act=" + ", then ".join(map(str, (self.plan.act, *self.plan.late))) if self.plan.act else ""
        return f"{tuple(self.plan.shape)}, weight={self.plan.weight}{act}, rank={self.plan.rank}"


class PackedLinear(_Packed, nn.Linear):
    """A quantized nn.Linear: x (..., in) -> (..., out).

    then_gelu  of a call, given by `dq.fusions` in place of the module that would apply a tanh GELU next
    """

    def __init__(self, plan: LayerPlan, has_bias: bool, compute_dtype: torch.dtype, device: str = "meta"):
        nn.Module.__init__(self)
        self.out_features, self.in_features = plan.shape
        self._allocate(plan, has_bias, compute_dtype, device)

    @classmethod
    def like(cls, module: Any, plan: LayerPlan, compute_dtype: torch.dtype, device: str = "meta"):
        return cls(plan, module.bias is not None, compute_dtype, device)

    def forward(self, input: torch.Tensor, then_gelu: bool = False) -> torch.Tensor:
        y = self.run(input, then_gelu)
        return y if self.start_in is None or input.dim() != 3 else self.started(input, y)

    def started(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y (batch, tokens, out) with the stored output where the first token is the stored one."""
        stored = self.start_in.float()
        near = (x[:, 0].float() - stored).square().sum(-1) < STARTS_ALIKE * stored.square().sum()
        first = torch.where(near[:, None], self.start_out.to(y.dtype), y[:, 0])
        return torch.cat([first[:, None], y[:, 1:]], 1)

    def _plain(self, device: str) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device=device)


class _PackedConv(_Packed):
    """A quantized convolution: x (batch, in, *space) -> (batch, out, *space); an unbatched x works as well."""

    op = "conv"

    def __init__(
        self, module: nn.modules.conv._ConvNd, plan: LayerPlan, compute_dtype: torch.dtype, device: str = "meta"
    ):
        nn.Module.__init__(self)
        for name in _CONV_SETTINGS:
            setattr(self, name, getattr(module, name))
        self._geometry, self._pad, self._pad_mode = geometry(module)
        plain = Conv((1,) * len(module.stride), (0,) * len(module.stride), self._geometry.dilation, 1)
        if plan.act is not None and plan.act.granularity == "token" and self._geometry != plain:
            raise DQError(f"one activation scale per pixel needs stride 1, no padding and one group, got {module}")
        self._allocate(plan, module.bias is not None, compute_dtype, device)

    @classmethod
    def like(cls, module: Any, plan: LayerPlan, compute_dtype: torch.dtype, device: str = "meta"):
        return cls(module, plan, compute_dtype, device)

    def _conv(self) -> Conv:
        return self._geometry

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dim() == len(self.plan.shape) - 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        return self.run(input if self._pad is None else F.pad(input, self._pad, mode=self._pad_mode))

    def _plain(self, device: str) -> nn.Module:
        settings = {name: getattr(self, name) for name in _CONV_SETTINGS if not name.startswith("_")}
        return CONV_KINDS[self.plan.kind](**settings, bias=self.bias is not None, device=device)


_CONV_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_CONV_SETTINGS += ("padding_mode", "_reversed_padding_repeated_twice")


class PackedConv1d(_PackedConv, nn.Conv1d):
    """A quantized nn.Conv1d."""


class PackedConv2d(_PackedConv, nn.Conv2d):
    """A quantized nn.Conv2d."""


class PackedConv3d(_PackedConv, nn.Conv3d):
    """A quantized nn.Conv3d."""


PACKED = {"linear": PackedLinear, "conv1d": PackedConv1d, "conv2d": PackedConv2d, "conv3d": PackedConv3d}


class PackedStack(_Frozen, nn.Module):
    """Stacked expert weights (experts, in, out) in place of a Parameter: indexed or used whole, decoded when used.

    `stack[e]` decodes one expert; torch functions that take the whole parameter (`grouped_mm`) see it decoded.
    """

    def __init__(self, plan: LayerPlan, compute_dtype: torch.dtype, device: str = "meta"):
        super().__init__()
        self.plan = plan
        self.compute_dtype = compute_dtype
        self.dtype = compute_dtype
        for name, (shape, dtype) in tensor_shapes(plan).items():
            self.put(name, torch.empty(shape, dtype=dtype or compute_dtype, device=device))
        for name in ("zero", "scale_global", "table"):
            if name not in self._parameters:
                self.register_parameter(name, None)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.plan.shape)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def dense_weight(self) -> torch.Tensor:
        """(experts, in, out) fp32."""
        experts, inputs, outputs = self.plan.shape
        tensors = Tensors(self.stored, self.scale, self.zero, self.scale_global, table=self.table)
        return reference.weight_decoder(self.plan)(tensors).reshape(experts, outputs, inputs).transpose(1, 2)

    def __getitem__(self, expert: int) -> torch.Tensor:
        outputs = self.plan.shape[2]
        rows = slice(expert * outputs, (expert + 1) * outputs)
        found: list[Any] = [self.stored, self.scale, self.zero, self.scale_global, self.table]
        picked: list[Any] = [t if t is None or len(t) < self.plan.rows else t[rows] for t in found]  # else of all rows
        *picked, table = picked
        return reference.weight_decoder(self.plan)(Tensors(*picked, table=table)).t().to(self.compute_dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def whole(value):
            return value.dense_weight().to(value.compute_dtype) if isinstance(value, cls) else value

        return func(*map(whole, args), **{key: whole(value) for key, value in (kwargs or {}).items()})

    def extra_repr(self) -> str:
        return f"{self.plan.shape}, weight={self.plan.weight}"


@torch.no_grad()
def pack(name: str, module: Any, plan: LayerPlan, compute_dtype: torch.dtype) -> PackedLinear | _PackedConv:
    """Round one full-precision layer to nearest, data-free. `name` is for errors.

    Raises DQError for non-finite weights and for plans that need fitting (stored activation scales).
    """
    if plan.act is not None and plan.act.scale != "dynamic":
        raise DQError(f"layer {name!r}: plan has stored activation scales ({plan.act}), which need calibration data")
    packed = PACKED[plan.kind].like(module, plan, compute_dtype, str(module.weight.device))
    fill(name, packed, module.weight)
    if module.bias is not None:
        packed.put("bias", module.bias.detach().to(compute_dtype))
    packed.bind(module.weight.device)
    return packed.train(module.training)


@torch.no_grad()
def pack_stack(name: str, weight: torch.Tensor, plan: LayerPlan, compute_dtype: torch.dtype) -> PackedStack:
    """Round stacked expert weights (experts, in, out)."""
    packed = PackedStack(plan, compute_dtype, str(weight.device))
    fill(name, packed, weight)
    return packed


@torch.no_grad()
def fill(name: str, packed: _Frozen, weight: torch.Tensor) -> None:
    """Round `weight` into a packed layer: neutral smoothing, empty branch, no start token. DQError for NaN or Inf."""
    plan = packed.plan
    if weight.is_meta:
        return
    weight = weight.float() if weight.itemsize == 1 else weight  # a file of fp8 values
    try:
        check_finite(weight, f"layer {name!r}: weight")
    except FormatError as error:
        raise DQError(str(error)) from None
    rows = weight.transpose(1, 2) if plan.kind == "stack" else weight
    if plan.rotate:
        rows = hadamard.rotate(rows.float(), plan.rotate, 1)
    for key, value in encode(rows.reshape(plan.rows, -1).float(), plan).items():
        packed.put(key, value)
    for key, (shape, dtype) in tensor_shapes(plan).items():
        if key == "permute":
            packed.put(key, torch.arange(shape[0], dtype=dtype, device=weight.device))
        if key in ("smooth", "proj_down", "proj_up", "start_in", "start_out"):
            start = torch.ones if key == "smooth" else torch.zeros
            packed.put(key, start(shape, dtype=dtype or packed.compute_dtype, device=weight.device))


def parameter_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters together, shared ones once."""
    return sum({id(value): value.nbytes for module in modules for value in module.parameters()}.values())


def packed_layers(model: nn.Module) -> dict[str, _Packed | PackedStack]:
    """Packed layers and stacks of a model by dotted name, that of the layer itself where adapters are attached."""
    return {name: module for name, module in naming.named(model) if isinstance(module, _Packed | PackedStack)}
