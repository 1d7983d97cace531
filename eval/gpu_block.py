"""A single and a double block of FLUX with random weights: a model's own arithmetic in bf16, and fused 8-bit kernels.

    single   [q k v | m] = W1 n,  y = x + g W2 [attention(q, k, v) | gelu(m)]           n = (1 + a) norm(x) + b
    double   two streams (picture, text) with weights of their own, attention over both, then a feed-forward each

x (tokens, width); a, b, g one row; q and k pass RMSNorm and rotary embedding. Fused: norm, modulation and quantization
in one kernel, GELU, gate and residual in the products, rotary embedding and quantization of heads in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq import layers
from dq.plan import LayerPlan, TensorPlan

LOG2_E = 1.4426950408889634


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
    """The same block on Triton kernels. form: int8 or fp8; attention: "int8" (values in fp16), "fp8" or "torch"."""

    def __init__(self, block: Block, form: str, attention: str):
        from dq.kernels.triton import ops

        self.block, self.size, self.ops = block, block.size, ops
        self.eight, self.kind = form == "fp8", attention
        self.codes = [[self._codes(linear, form) for linear in stream.linears] for stream in block.streams]

    def _codes(self, linear: nn.Linear, form: str) -> tuple[Tensor, Tensor, Tensor]:
        plan = LayerPlan("linear", tuple(linear.weight.shape), TensorPlan(form, "channel"))
        packed = layers.encode(linear.weight.detach().float(), plan)
        weight = packed["weight"].view(self.ops.E4M3) if self.eight else packed["weight"]
        return weight, packed["scale"].reshape(-1), linear.bias.detach()

    def product(self, q: Tensor, s: Tensor, codes, gelu: bool = False, gate=None, residual=None) -> Tensor:
        weight, scale, bias = codes
        ends = (*[None] * 4, bias, None, None, gate, residual, q.shape[0])
        return self.ops.w8a8_gemm(q, weight, s, scale, *ends, gelu, torch.bfloat16)

    def normed(self, stream: Stream, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        shift, scale = stream.modulation[first], stream.modulation[first + 1]
        rest = (len(x), 1e-6, False, self.eight, 0, False)
        return self.ops.adaln_quant(x, None, None, scale, shift, None, *rest)[:2]

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top = 448 if self.eight else 127
        return self.ops.quant_rows(x, None, None, top, 0, 0, self.eight, False, False, 0.0, False)[:2]

    def attention(self, streams: list[Stream], qkvs: list[Tensor]) -> Tensor:
        """qkv (tokens, 3 width) of each stream -> (tokens, width)."""
        if self.kind == "torch":
            block = self.block
            heads = [block.heads(stream, qkv) for stream, qkv in zip(streams, qkvs, strict=True)]
            return block.attention(torch.cat(heads, 1))
        ops, stream = self.ops, streams[0]  # one norm weight for both streams: a bench needs no second launch
        qkv = qkvs[0] if len(qkvs) == 1 else torch.cat(qkvs)
        q, k, v = qkv[None].unflatten(-1, (3, self.size.heads, self.size.head)).unbind(2)
        turn = (self.block.cos, self.block.sin)
        mean = ops.k_mean(k, stream.k_norm, *turn, False, 1e-6)
        factor = LOG2_E * self.size.head**-0.5
        q8, sq = ops.qk_norm_rope_quant(q, stream.q_norm, *turn, None, False, 1e-6, factor)
        k8, sk = ops.qk_norm_rope_quant(k, stream.k_norm, *turn, mean, False, 1e-6, 1.0)
        values, sv = ops.v_fp8(v) if self.kind == "fp8" else (v[0].transpose(0, 1).half().contiguous(), None)
        return ops.attn_i8(q8, k8, values, sq, sk, sv, self.size.heads, torch.bfloat16)[0].flatten(1)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        parts, codes, width = self.block.parts(x), self.codes, self.size.width
        if self.block.single:
            ((stream, x),) = parts
            q, s = self.normed(stream, x, 0)
            weight, scale, bias = codes[0][0]
            ins = [
                tuple(t[rows] for t in (weight, scale, bias)) for rows in (slice(3 * width), slice(3 * width, None))
            ]
            mixed = self.attention([stream], [self.product(q, s, ins[0])])
            both = torch.cat((mixed, self.product(q, s, ins[1], gelu=True)), 1)
            return self.product(*self.rounded(both), codes[0][1], gate=stream.modulation[2], residual=x)
        qkvs = [self.product(*self.normed(s, part, 0), c[0]) for (s, part), c in zip(parts, codes, strict=True)]
        found = self.attention([stream for stream, _ in parts], qkvs).split([len(part) for _, part in parts])
        return torch.cat([self.rest(*part, c, mixed) for part, c, mixed in zip(parts, codes, found, strict=True)])

    def rest(self, stream: Stream, x: Tensor, codes: list, mixed: Tensor) -> Tensor:
        """The second half of a stream of a double block."""
        x = self.product(*self.rounded(mixed), codes[1], gate=stream.modulation[2], residual=x.contiguous())
        hidden = self.product(*self.normed(stream, x, 3), codes[2], gelu=True)
        return self.product(*self.rounded(hidden), codes[3], gate=stream.modulation[5], residual=x)


def contenders(size: Size | None = None) -> Iterator[tuple[str, tuple[int, ...], int, dict[str, Callable]]]:
    """(name, shape, operations, runs) of both blocks; the first run is compiled bf16."""
    size = size or Size()
    for single in (True, False):
        block = Block(size, single).requires_grad_(False)
        x = torch.randn(size.tokens, size.width, device=size.device, dtype=torch.bfloat16)
        compiled = torch.compile(block) if size.device == "cuda" else block
        runs: dict[str, Callable] = {"bf16 compiled": lambda run=compiled, x=x: run(x)}
        kinds = [("int8", "torch"), ("int8", "int8"), ("int8", "fp8"), ("fp8", "torch"), ("fp8", "fp8")]
        for form, attention in kinds:
            name = f"{form} fused, {attention} attention"
            runs[name] = _later(lambda block=block, form=form, attention=attention: Fused(block, form, attention), x)
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
