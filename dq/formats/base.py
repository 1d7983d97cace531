"""What a number format is: scales, codes, packing, the class each format fills in. Plain torch, any device.

    x̂ = (code_value(q) − z) · step        x, q: (rows, K); step, z: one value per scale block

`step` is the stored scale, or for micro formats the product of block scale and tensor scale. A block is the part of a
row that shares one scale: the tensor, the row, or `size` neighbours along K (the last group of a row may be shorter).
code_value is fixed by the format, or a table that is stored for each row of scales.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

TWO_LEVEL = "expected two-level scales with symmetric integers of at most 4 bits, such as int4"
SCALE_FLOOR = 1e-12  # smallest fitted fp32 scale: rows of zeros keep a positive scale and decode to exact zeros


class FormatError(ValueError):
    """Wrong use of a number format. One line: what, got, expected, what to do."""


@dataclass(frozen=True)
class Granularity:
    """Which elements of a (rows, K) matrix share a scale: tensor | channel | token | group of `size` along K.

    `channel` (weights) and `token` (activations) both mean one scale per row. `two_level`, written `group:64+channel`:
    the scale of a group is a small whole number times the scale of its row.
    """

    kind: str
    size: int | None = None
    two_level: bool = False

    def __post_init__(self):
        if self.kind not in ("tensor", "channel", "token", "group"):
            raise FormatError(f"granularity: got {self.kind!r}, expected tensor, channel, token or group:<size>")
        if (self.kind == "group") != (self.size is not None) or (self.size is not None and self.size < 1):
            raise FormatError(f"granularity: got {self.kind!r}, size {self.size}; expected e.g. 'group:64' or 'token'")
        if self.two_level and self.kind != "group":
            raise FormatError(f"granularity: got '{self.kind}+channel', expected groups: e.g. 'group:64+channel'")

    @classmethod
    def parse(cls, text: str) -> "Granularity":
        """Read "tensor", "channel", "token", "group:64" or "group:64+channel". Raises FormatError on anything else."""
        first = str(text).removesuffix("+channel")
        kind, colon, size = first.partition(":")
        if colon and not size.isdecimal():
            raise FormatError(f"granularity: got {text!r}, expected a whole number after the colon, e.g. 'group:64'")
        return cls(kind, int(size) if colon else None, first != str(text))

    def __str__(self) -> str:
        plain = self.kind if self.size is None else f"{self.kind}:{self.size}"
        return f"{plain}+channel" if self.two_level else plain

    def width(self, k: int) -> int:
        """Number of neighbours along K that share a scale."""
        return k if self.size is None else self.size

    def scale_shape(self, rows: int, k: int) -> tuple[int, int]:
        """Shape of the scale of a (rows, k) matrix: (1, 1), (rows, 1) or (rows, ceil(k / size)).

        Of two-level scales: of the multipliers; the scales of rows are (rows, 1).
        """
        return (1 if self.kind == "tensor" else rows, -(-k // self.width(k)))


class Scales(NamedTuple):
    """What `fit` returns and `encode(x, granularity, *scales)` takes; fields as in `Encoded`."""

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    scale_global: torch.Tensor | None = None
    table: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Encoded:
    """A quantized matrix, not yet packed.

    codes: int8 (rows, K / span). scale: fp32 (1, 1) | (rows, 1) | (rows, ceil(K/size)); for micro formats the stored
    bytes (int8 view of e4m3 or e8m0 codes) of that shape, for two-level granularities the int8 multipliers. zero:
    shaped as scale, int8 of affine integers, fp32 of formats with an offset, of no others. scale_global: fp32 (1,), or
    (rows, 1) where the caller gave one per row, of nvfp4; (rows, 1) of two-level granularities. table: int8 (rows of
    scale, table_width), of formats with tables: rising values of a row's codes, or a codebook.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    scale_global: torch.Tensor | None = None
    table: torch.Tensor | None = None


def check_finite(x: torch.Tensor, what: str) -> torch.Tensor:
    """Return x, or raise FormatError naming `what` and the number of NaN/Inf values (waits for the device)."""
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        raise FormatError(f"{what}: got {bad} non-finite values of {x.numel()}, expected none; mend or keep it")
    return x


def block_view(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """x (rows, K) as scale blocks (rows, n, width), zero-padded at the end of each row where K is ragged."""
    rows, k = x.shape
    width = granularity.width(k)
    n = -(-k // width)
    return (F.pad(x, (0, n * width - k)) if n * width != k else x).reshape(rows, n, width)


def block_range(x: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value per scale block, fp32, shaped as the scale. NaN and Inf come through."""
    if x.shape[0] == 0:
        empty = x.new_zeros(granularity.scale_shape(*x.shape), dtype=torch.float32)
        return empty, empty
    blocks = block_view(x, granularity)
    low, high = blocks.amin(-1), blocks.amax(-1)  # aminmax over a dimension is 20 times slower
    if granularity.kind == "tensor":
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low.float(), high.float()


def block_absmax(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Largest magnitude per scale block, fp32, shaped as the scale. NaN and Inf come through."""
    low, high = block_range(x, granularity)
    return torch.maximum(high.abs(), low.abs())  # abs: not −0, which has another e4m3 byte than 0


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int8 (rows, k) -> int8 (rows, ceil(k·bits/8)): per row a little-endian bit stream, spare bits zero.

    Element i takes stream bits [i·bits, (i+1)·bits); stream bit j is bit j % 8 of byte j // 8.
    """
    if bits == 8:
        return codes
    rows, k = codes.shape
    per = 8 // bits if 8 % bits == 0 else 8  # elements per word; a word is a whole number of bytes
    n = -(-k // per)
    lanes = F.pad(codes, (0, n * per - k)).reshape(rows, n, per)
    kind = torch.int8 if 8 % bits == 0 else torch.int64
    word = torch.zeros((rows, n), dtype=kind, device=codes.device)
    for i in range(per):
        word |= (lanes[..., i].to(kind) & ((1 << bits) - 1)) << (bits * i)
    if kind is torch.int8:
        return word
    out = torch.stack([(word >> (8 * j)).to(torch.int8) for j in range(bits)], dim=-1)
    return out.reshape(rows, n * bits)[:, : -(-k * bits // 8)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, k: int, signed: bool) -> torch.Tensor:
    """Inverse of `pack_bits`: int8 (rows, ceil(k·bits/8)) -> codes int8 (rows, k), sign-extended if `signed`."""
    if bits == 8:
        return packed
    rows, spare = packed.shape[0], 8 - bits
    if 8 % bits == 0:
        lanes = [packed << (spare - bits * i) for i in range(8 // bits)]
    else:
        n = -(-k // 8)
        groups = F.pad(packed, (0, n * bits - packed.shape[1])).reshape(rows, n, bits)
        word = torch.zeros((rows, n), dtype=torch.int64, device=packed.device)
        for j in range(bits):
            word |= (groups[..., j].to(torch.int64) & 0xFF) << (8 * j)
        lanes = [((word >> (bits * i)) << spare).to(torch.int8) for i in range(8)]
    lanes = [lane >> spare for lane in lanes]  # arithmetic shift: copies the sign bit down
    out = torch.stack(lanes, dim=-1)
    out = out.reshape(rows, out.shape[1] * out.shape[2])[:, :k].contiguous()
    return out if signed else out & ((1 << bits) - 1)


@dataclass(frozen=True)
class Format(ABC):
    """One number format. Instances are frozen and hashable; all arithmetic is in fp32.

    name: as in `names()`. bits: per code, scales not counted. granularity: the default; the only one if `fixed`.
    """

    name: str
    bits: int
    granularity: Granularity
    fixed: ClassVar[bool] = False  # True: only the default granularity exists (micro formats)
    signed: ClassVar[bool] = True  # codes are two's complement; False: raw bit patterns
    affine: ClassVar[bool] = False  # has a zero point
    offset: ClassVar[bool] = False  # has a smallest value in its place: x̂ = value · step + zero
    tabled: ClassVar[bool] = False  # each row of scales has its own values, in a stored table; for weights
    scale_bytes: ClassVar[int] = 4  # per block
    global_bytes: ClassVar[int] = 0  # per matrix

    @property
    def span(self) -> int:
        """Neighbours along K that a code stands for."""
        return 1

    @property
    def bits_per_weight(self) -> float:
        """Scales and tables not counted."""
        return self.bits / self.span

    @property
    def table_width(self) -> int:
        """Bytes of the table of a row of scales, 0 without one."""
        return 2**self.bits * self.span if self.tabled else 0

    @property
    def most_multiplier(self) -> int:
        """Largest multiplier of a group under a two-level granularity; 0: the format has none."""
        return 0

    @abstractmethod
    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """Scales of x (rows, K) that cover its range: absmax, or min-max with 0 inside for affine integers."""

    @abstractmethod
    def codes_of(self, units: torch.Tensor) -> torch.Tensor:
        """Nearest codes (int8) of fp32 values in units of the step, ties to even, saturating."""

    @abstractmethod
    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        """fp32 values of int8 codes, in units of the step."""

    @abstractmethod
    def snap(self, units: torch.Tensor) -> torch.Tensor:
        """values_of(codes_of(units)), without going through codes."""

    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """Values beyond these, in units of the step, are clipped: the range plus half a spacing at each end."""

    @abstractmethod
    def grid(self) -> torch.Tensor:
        """Every representable value in units of the step: fp32, 1-d, sorted, no duplicates; of tables 2-d."""

    def of(self, table: torch.Tensor | None) -> "Format":
        """The format of rows that have a table of values; itself where values need none, or for the default one."""
        return self

    def step(self, scale: torch.Tensor, scale_global: torch.Tensor | None = None) -> torch.Tensor:
        """The fp32 multiplier of each block, shaped as the scale."""
        return scale

    @torch.no_grad()
    def encode(self, x, granularity=None, scale=None, zero=None, scale_global=None, table=None) -> Encoded:
        """Quantize x (rows, K). Scales not given are fitted; a given scale is used as it is (it may broadcast).

        With a given scale, an affine format fits only the zero point if that is missing. NaN and Inf are not looked
        for (`check_finite` does): with fitted scales their whole block decodes to NaN or Inf, given scales lose them.
        Raises FormatError on a wrong shape, dtype or granularity. Not differentiable: see `fake`.
        """
        granularity = self._resolve(granularity)
        x = self._check(x)
        scales = self._scales(x, granularity, Scales(scale, zero, scale_global, table))
        units = self._units(x, granularity, scales)
        if self.affine and scales.zero is not None:
            units = units.round_().add_(scales.zero[..., None])
        codes = self.of(scales.table).codes_of(units)
        return Encoded(self._rows(codes, (len(x), x.shape[1] // self.span)), *scales)

    def decode(self, e: Encoded, granularity=None) -> torch.Tensor:
        """The fp32 matrix (rows, K) that `e` stands for: (value − zero) · step, one rounding."""
        granularity = self._resolve(granularity)
        shape = granularity.scale_shape(*e.codes.shape)
        if e.scale.shape != shape:
            got = tuple(e.scale.shape)
            raise FormatError(f"{self.name}: decode got a scale of shape {got}, expected {shape} for {granularity}")
        values = self.of(e.table).values_of(block_view(e.codes, granularity))
        if self.affine and e.zero is not None:
            values = values.sub_(e.zero[..., None])
        rows, count = e.codes.shape
        values = values.mul_(self.step(e.scale, e.scale_global)[..., None])
        if self.offset and e.zero is not None:
            values = values.add_(e.zero[..., None])
        return self._rows(values, (rows, count * self.span))

    def fake(self, x, granularity=None, scale=None, zero=None, scale_global=None, table=None) -> torch.Tensor:
        """decode(encode(x)) in x's dtype and shape (..., K); leading dimensions are flattened to rows.

        Gradient: straight through, zero where x lies outside `limits()` (as in torch's fake-quantize). A given scale
        that requires grad receives x̂/s − x/s inside and x̂/s outside (LSQ, arXiv 1902.08153); fitted scales are
        constants.
        """
        granularity = self._resolve(granularity)
        flat = self._check(x.reshape(-1, x.shape[-1]))
        scales = self._scales(flat.detach(), granularity, Scales(scale, zero, scale_global, table))
        form = self.of(scales.table)
        with torch.no_grad():
            units = self._units(flat, granularity, scales)
            shift = scales.zero[..., None].float() if self.affine and scales.zero is not None else 0.0
            values = form.snap(units.round() + shift).sub_(shift) if self.affine else form.snap(units)
            out = values * self.step(scales.scale, scales.scale_global)[..., None]
            out = out + scales.zero[..., None] if self.offset and scales.zero is not None else out
        if torch.is_grad_enabled() and (x.requires_grad or scales.scale.requires_grad):
            low, high = form.limits()
            inside = (units >= low - shift) & (units <= high - shift)
            carrier = block_view(flat, granularity)
            out = out + torch.where(inside, carrier - carrier.detach(), 0.0)
            if scales.scale.requires_grad:
                slope = values - torch.where(inside, units, 0.0)
                out = out + (scales.scale - scales.scale.detach())[..., None] * slope
        return self._rows(out, flat.shape).to(x.dtype).reshape(x.shape)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes int8 (rows, k) -> dense rows int8 (rows, ceil(k·bits/8)), see `pack_bits`; 8 bits: as they are."""
        if codes.dim() != 2 or codes.dtype is not torch.int8:
            raise FormatError(f"{self.name}: pack got {codes.dtype} {tuple(codes.shape)}, expected int8 (rows, k)")
        return pack_bits(codes, self.bits)

    def unpack(self, packed: torch.Tensor, k: int) -> torch.Tensor:
        """Inverse of `pack` for k weights a row: int8 (rows, row_bytes(k)) -> codes int8 (rows, k / span)."""
        width = self.row_bytes(k)
        if packed.dim() != 2 or packed.dtype is not torch.int8 or packed.shape[1] != width:
            got = f"{packed.dtype} {tuple(packed.shape)}"
            raise FormatError(f"{self.name}: unpack to k={k} got {got}, expected int8 (rows, {width}); check k")
        return unpack_bits(packed, self.bits, k // self.span, self.signed)

    def row_bytes(self, k: int) -> int:
        """Bytes of the codes of k weights of a row."""
        return -(-(k // self.span) * self.bits // 8)

    def packed_bytes(self, rows: int, k: int, granularity=None) -> int:
        """Exact bytes of a (rows, k) matrix: packed codes, scales, zero points, tensor scale, tables."""
        granularity = self._resolve(granularity)
        n_rows, n_blocks = granularity.scale_shape(rows, k)
        codes = rows * self.row_bytes(k) + n_rows * self.table_width
        if granularity.two_level:
            return codes + n_rows * (n_blocks + 4)
        per_block = self.scale_bytes + (1 if self.affine else 4 if self.offset else 0)
        return codes + n_rows * n_blocks * per_block + self.global_bytes

    def _resolve(self, granularity) -> Granularity:
        """None means the default; text is parsed. FormatError if the format has no such granularity."""
        if granularity is None:
            return self.granularity
        if isinstance(granularity, str):
            granularity = Granularity.parse(granularity)
        if self.fixed and granularity != self.granularity:
            raise FormatError(f"{self.name}: got granularity {granularity}, expected its only one, {self.granularity}")
        if granularity.two_level and not self.most_multiplier:
            raise FormatError(f"{self.name}: got granularity {granularity}, {TWO_LEVEL}")
        return granularity

    def _check(self, x: torch.Tensor) -> torch.Tensor:
        """x in fp32; FormatError unless it is a matrix of floats with K > 0."""
        if x.dim() != 2 or not x.is_floating_point() or x.shape[1] == 0:
            got = f"{x.dtype} {tuple(x.shape)}"
            raise FormatError(f"{self.name}: got {got}, expected a float matrix (rows, K); reshape or cast it first")
        if x.shape[1] % self.span:
            raise FormatError(f"{self.name}: got rows of {x.shape[1]} weights, expected a multiple of {self.span}")
        return x.float()

    def _scales(self, x, granularity: Granularity, given: Scales) -> Scales:
        """Given scales brought to their canonical shape, the missing ones fitted."""
        if given.zero is not None and not (self.affine or self.offset):
            raise FormatError(f"{self.name}: got a zero point, expected none; use an affine format such as 'int4a'")
        if given.scale_global is not None and not (self.global_bytes or granularity.two_level):
            raise FormatError(f"{self.name}: got a scale_global, expected none; only two-level formats have one")
        if given.table is not None and not self.tabled:
            raise FormatError(f"{self.name}: got a table, expected none; only formats such as 'lut4' have one")
        if given.scale is None:
            if given.table is not None:
                raise FormatError(f"{self.name}: got a table alone, expected its scale with it; pass e.scale")
            return self.fit(x, granularity, given.scale_global)
        shape = granularity.scale_shape(*x.shape)
        try:
            scale = torch.as_tensor(given.scale, device=x.device).expand(shape).contiguous()
        except RuntimeError:
            got = tuple(torch.as_tensor(given.scale).shape)
            raise FormatError(f"{self.name}: got a scale of shape {got}, expected {shape} for {granularity}") from None
        return self._given(x, granularity, scale, given)

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        """Given scales in the form `Encoded` holds them. x: fp32 (rows, K); scale: already of its canonical shape."""
        return Scales(scale.float())

    def _units(self, x, granularity: Granularity, scales: Scales) -> torch.Tensor:
        """x fp32 in units of the step, as fresh blocks (rows, n, width). A block whose step is 0 becomes zeros."""
        step = self.step(scales.scale, scales.scale_global)
        step = step.masked_fill(step == 0, torch.inf)
        return block_view(x, granularity) / step[..., None]

    def _rows(self, blocks: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Blocks (rows, n, width) back to (rows, K), padding cut off."""
        return blocks.reshape(shape[0], blocks.shape[1] * blocks.shape[2])[:, : shape[1]].contiguous()
