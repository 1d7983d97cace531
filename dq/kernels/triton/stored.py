"""What is made of weights as they are stored: products of few rows, rows rounded once more, sums that are kept."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dq.errors import DQError
from dq.kernels.triton import ops, packed
from dq.kernels.triton.ops import Codes

FEW = 16  # rows of a product with a weight that is read once, as it is stored
FEW_TILE = {"BM": FEW, "BN": 16, "BK": 256, "warps": 4, "stages": 3}


def _fake_few_rows(x, w, scale, **rest):
    return x.new_empty(x.shape[0], w.shape[0])


@ops.operator(_fake_few_rows)
def few_rows(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    *,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int,
    group: int = 0,
) -> Tensor:
    """x (M, K) float, M at most 16, with a weight of 8- or 4-bit codes (N, K) or (N, ceil(K / 2)) -> (M, N).

    scale, zero  (N, groups) for `group` columns each, or with group 0 one of the row, (N, 1)
    """
    x, (w, scale, zero, bias) = ops.rowed(x), ops.flat(w, scale, zero, bias)
    (m, k), out, c = x.shape, _fake_few_rows(x, w, scale), FEW_TILE
    if m > FEW:
        raise DQError(f"dq::triton_few_rows: got {m} rows, expected at most {FEW}; take a product for many")
    per_group = group or (0 if zero is None else k)
    if m:
        packed.few_rows[(-(-w.shape[0] // c["BN"]),)](
            x, w, scale, zero, bias, out, m, w.shape[0], k, w.shape[1], scale.shape[1], x.stride(0),
            bits, per_group, c["BM"], c["BN"], c["BK"], **ops.options(c),
        )  # fmt: skip
    return out


def rerounded(w: Tensor, scale: Tensor, k: int, group: int) -> Codes:
    """int4 weights with a scale a group (N, groups) -> int8 codes (N, k), a scale S a row: `reference.rerounded`.

    |difference| <= S / 2 for every weight, S = 8 / 127 of the row's largest group scale: at most 0.032 of that scale,
    where rounding to int4 had cost up to half of it.
    """
    row = (scale.amax(1, keepdim=True) * (8 / ops.INT8_TOP)).clamp(min=torch.finfo(torch.float32).tiny)
    return Codes(ops.w4_to_s8(w, k=k, times=scale / row, group=group), row.reshape(-1))


# weight -> (what it was when they were taken, sums)
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _state(*tensors: Tensor | None) -> tuple:
    """Changes whenever values do that were written by torch, and when other memory takes their place."""
    return tuple(None if t is None else (t._version, t.data_ptr(), t.device, t.shape) for t in tensors)


def sums(w: Tensor, *, k: int, bits: int, scale: Tensor | None = None, group: int = 0) -> Tensor:
    """`ops.weight_sums`, taken once for a weight until it or its scale changes; anew where nothing can be kept.

    Those are traced calls, whose graph must not hold them, CUDA graphs, whose memory is their own, and tensors of
    inference mode, which do not say that they changed.
    """
    given = {"k": k, "bits": bits, "scale": scale, "group": group}
    if not _keeps(w, scale):
        return ops.weight_sums(w, **given)
    state = (*_state(w, scale), k, bits, group)
    found = _kept.get(w)
    if found is None or found[0] != state:
        found = state, ops.weight_sums(w, **given)
        _kept[w] = found
    return found[1]


def _keeps(w: Tensor, scale: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or type(w) not in (Tensor, torch.nn.Parameter):
        return False
    if w.is_inference() or (scale is not None and scale.is_inference()) or torch.is_inference_mode_enabled():
        return False
    return not (w.is_cuda and torch.cuda.is_current_stream_capturing())
