"""A single and a double block of FLUX with random weights: a model's own arithmetic in bf16, and fused 8-bit kernels.

    single   [q k v | m] = W1 n,  y = x + g W2 [attention(q, k, v) | gelu(m)]           n = (1 + a) norm(x) + b
    double   two streams (picture, text) with weights of their own, attention over both, then a feed-forward each

x (tokens, width); a, b, g one row; q and k pass RMSNorm and rotary embedding. Fused: norm, modulation and quantization
in one kernel, GELU, gate and residual in the products. Attention is torch's in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq import layers
from dq.kernels.triton.ops import E4M3, FP8_TOP, INT8_TOP, Codes, Epilogue, RowFormat, quant_rows, w8a8_gemm
from dq.plan import LayerPlan, TensorPlan
from eval.gpu import launches


@dataclass(frozen=True)
class Size:
    """heads of `head` channels; tokens of the picture and of the text."""

    heads: int = 24
    head: int = 128
    picture: int = 4096
    text: int = 512
    device: str = "cuda"

    @property
    def width(self) -> int:
        return self.heads * self.head

    @property
    def tokens(self) -> int:
        return self.picture + self.text


class Stream(nn.Module):
    """Weights of one stream: rows of queries, keys and values first, modulation (shift, scale, gate) twice."""

    def __init__(self, size: Size, single: bool):
        super().__init__()
        w = size.width
        shapes = ((7 * w, w), (w, 5 * w)) if single else ((3 * w, w), (w, w), (4 * w, w), (w, 4 * w))
        make = {"device": size.device, "dtype": torch.bfloat16}
        self.linears = nn.ModuleList(nn.Linear(k, n, **make) for n, k in shapes)
        self.modulation = nn.Parameter(torch.randn(6, 1, w, **make) * 0.1)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(size.head, **make)) for _ in range(2))
        self.size = size

    def normed(self, x: Tensor, first: int) -> Tensor:
        shift, scale = self.modulation[first], self.modulation[first + 1]
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """In bf16, as a model computes it; `torch.compile` and torchao start from here."""

    def __init__(self, size: Size, single: bool):
        super().__init__()
        self.size, self.single = size, single
        self.streams = nn.ModuleList(Stream(size, single) for _ in range(1 if single else 2))
        angle = torch.randn(size.tokens, size.head // 2, device=size.device).repeat_interleave(2, 1)
        self.cos, self.sin = (nn.Parameter(part, requires_grad=False) for part in (angle.cos(), angle.sin()))

    def parts(self, x: Tensor) -> list[tuple[Stream, Tensor]]:
        """Each stream with its tokens, text first."""
        sizes = [self.size.tokens] if self.single else [self.size.text, self.size.picture]
        return list(zip(self.streams, x.split(sizes), strict=True))

    def heads(self, stream: Stream, qkv: Tensor) -> Tensor:
        """(tokens, 3 width) -> (3, tokens, heads, channels), queries and keys normed."""
        q, k, v = qkv.unflatten(-1, (3, self.size.heads, self.size.head)).unbind(-3)
        q, k = (F.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in ((q, stream.q_norm), (k, stream.k_norm)))
        return torch.stack((q, k, v))

    def attention(self, qkv: Tensor) -> Tensor:
        """(3, tokens, heads, channels) -> (tokens, width)."""

        def turned(x: Tensor) -> Tensor:
            a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            y = x.float() * self.cos[:, None] + torch.stack((-b, a), -1).flatten(-2) * self.sin[:, None]
            return y.to(x.dtype)

        q, k, v = (x.transpose(0, 1)[None] for x in (turned(qkv[0]), turned(qkv[1]), qkv[2]))
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.single:
            (stream,) = self.streams
            qkv, m = stream.linears[0](stream.normed(x, 0)).tensor_split((3 * self.size.width,), -1)
            mixed = torch.cat((self.attention(self.heads(stream, qkv)), F.gelu(m, approximate="tanh")), -1)
            return x + stream.modulation[2] * stream.linears[1](mixed)
        parts = self.parts(x)
        qkv = torch.cat([self.heads(s, s.linears[0](s.normed(part, 0))) for s, part in parts], 1)
        found, out = self.attention(qkv).split([len(part) for _, part in parts]), []
        for (stream, part), mixed in zip(parts, found, strict=True):
            part = part + stream.modulation[2] * stream.linears[1](mixed)
            hidden = F.gelu(stream.linears[2](stream.normed(part, 3)), approximate="tanh")
            out.append(part + stream.modulation[5] * stream.linears[3](hidden))
        return torch.cat(out)


class Fused:
    """The same block on Triton kernels, but for attention. form: int8 or fp8."""

    def __init__(self, block: Block, form: str):
        self.block, self.size = block, block.size
        self.eight = form == "fp8"
        self.rows = RowFormat(FP8_TOP if self.eight else INT8_TOP)
        self.attention = torch.compile(self._attention) if self.size.device == "cuda" else self._attention
        self.weights = [[self._weight(linear, form) for linear in stream.linears] for stream in block.streams]

    def _weight(self, linear: nn.Linear, form: str) -> tuple[Codes, Tensor]:
        """-> codes and bias of a linear."""
        plan = LayerPlan("linear", tuple(linear.weight.shape), TensorPlan(form, "channel"))
        packed = layers.encode(linear.weight.detach().float(), plan)
        weight = packed["weight"].view(E4M3) if self.eight else packed["weight"]
        return Codes(weight, packed["scale"].reshape(-1)), linear.bias.detach()

    def product(self, x: Codes, linear: tuple[Codes, Tensor], gelu: bool = False) -> Tensor:
        weight, bias = linear
        return w8a8_gemm(x, weight, Epilogue(torch.bfloat16, bias, gelu=gelu))

    def added(self, x: Tensor, linear: tuple[Codes, Tensor], gate: Tensor, residual: Tensor) -> Tensor:
        """residual + gate * linear(x)."""
        end = launches.Gate(gate, residual, len(x))
        return launches.gated_gemm(quant_rows(x, self.rows), *linear, end)

    def normed(self, stream: Stream, x: Tensor, first: int) -> Codes:
        shift, scale = stream.modulation[first], stream.modulation[first + 1]
        modulation = launches.Modulation(scale, shift, len(x))
        return launches.adaln_quant(x.contiguous(), launches.Norm(), modulation, fp8=self.eight)

    def _attention(self, streams: list[Stream], qkvs: list[Tensor]) -> Tensor:
        """qkv (tokens, 3 width) of each stream -> (tokens, width), as the block computes it.

        Compiled on a card, because its norms and rotations are ten passes otherwise.
        """
        heads = [self.block.heads(stream, qkv) for stream, qkv in zip(streams, qkvs, strict=True)]
        return self.block.attention(torch.cat(heads, 1))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        parts, weights = self.block.parts(x), self.weights
        if self.block.single:
            ((stream, x),) = parts
            return self.single(stream, x, *weights[0])
        qkvs = [self.product(self.normed(s, part, 0), w[0]) for (s, part), w in zip(parts, weights, strict=True)]
        found = self.attention([stream for stream, _ in parts], qkvs).split([len(part) for _, part in parts])
        return torch.cat([self.rest(*part, w, mixed) for part, w, mixed in zip(parts, weights, found, strict=True)])

    def single(self, stream: Stream, x: Tensor, first: tuple[Codes, Tensor], second: tuple[Codes, Tensor]) -> Tensor:
        codes, (weight, bias), width = self.normed(stream, x, 0), first, 3 * self.size.width
        qkv, feed = (
            (Codes(weight.q[rows], weight.scale[rows]), bias[rows]) for rows in (slice(width), slice(width, None))
        )
        mixed = self.attention([stream], [self.product(codes, qkv)])
        both = torch.cat((mixed, self.product(codes, feed, gelu=True)), 1)
        return self.added(both, second, stream.modulation[2], x)

    def rest(self, stream: Stream, x: Tensor, weights: list[tuple[Codes, Tensor]], mixed: Tensor) -> Tensor:
        """The second half of a stream of a double block."""
        x = self.added(mixed, weights[1], stream.modulation[2], x.contiguous())
        hidden = self.product(self.normed(stream, x, 3), weights[2], gelu=True)
        return self.added(hidden, weights[3], stream.modulation[5], x)


def contenders(size: Size | None = None) -> Iterator[tuple[str, tuple[int, ...], int, dict[str, Callable]]]:
    """(name, shape, operations, runs) of both blocks; the first run is compiled bf16."""
    size = size or Size()
    for single in (True, False):
        block = Block(size, single).requires_grad_(False)
        x = torch.randn(size.tokens, size.width, device=size.device, dtype=torch.bfloat16)
        compiled = torch.compile(block) if size.device == "cuda" else block
        runs: dict[str, Callable] = {"bf16 compiled": lambda run=compiled, x=x: run(x)}
        for form in ("int8", "fp8"):
            runs[f"{form} fused"] = _later(lambda block=block, form=form: Fused(block, form), x)
        runs["torchao fp8 compiled"] = _later(lambda block=block: _torchao(block), x)
        yield "single" if single else "double", (size.tokens, size.width), _operations(size), runs


def _later(make: Callable[[], Callable], x: Tensor) -> Callable[[], Tensor]:
    """A run that makes what it runs on its first call, so that one that fails does not stop the others."""
    made = []

    def run() -> Tensor:
        if not made:
            made.append(make())
        return made[0](x)

    return run


def _operations(size: Size) -> int:
    """Of either block: 12 width^2 multiplications a token in products, and attention over all tokens."""
    return 2 * size.tokens * 12 * size.width**2 + 4 * size.tokens**2 * size.width


def _torchao(block: Block) -> Callable[[Tensor], Tensor]:
    """torchao's fp8 with a scale a row, compiled; raises when it is not installed."""
    import copy

    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    theirs = copy.deepcopy(block)
    quantize_(theirs, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return torch.compile(theirs)
