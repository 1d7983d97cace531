"""Vectors of a codebook: one code for `span` neighbours of a row. VQ4DiT, arXiv 2408.17131; VPTQ, arXiv 2409.17066.

    x̂[r, span·i : span·(i + 1)] = book[code[r, i]] · s     codes: (rows, K / span); book: (2^b, span); s: fp32 (1, 1)

b / span bits a weight, and the codebook. A name is vqNxS: N entries of S values, so that vq256x4 takes 2 bits and
vq64x2 takes 3. One codebook serves the whole matrix. Entries are whole numbers of −127 … 127 in units of s = max|book|
/ 127, where the papers have 16-bit floats: half the bytes, an 8-bit product takes them as they come, and layers of
tiny-pixart lose less than 0.01 dB. Where nobody gives a codebook k-means (Lloyd, from a k-means++ start) finds one for
the matrix's own vectors.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, FormatError, Granularity, Scales

TOP = 127  # largest value of an entry
ROUNDS = 25  # of Lloyd's iteration, at most
SAMPLE = 64  # vectors an entry that k-means looks at, at most
CHUNK = 2**22  # distances held at once


def kmeans(vectors: torch.Tensor, count: int, weights: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """-> entries fp32 (count, span) of little sum h (v − entry)² over vectors fp32 (n, span), each at its nearest one.

    weights (n, span): h, 1 where not given. An entry that loses its vectors goes to the vector that is worst off.
    At most SAMPLE vectors an entry are looked at, drawn by `seed`; the result depends on nothing else.
    """
    weights = torch.ones_like(vectors) if weights is None else weights
    generator = torch.Generator().manual_seed(seed)
    if len(vectors) > SAMPLE * count:
        drawn = torch.randperm(len(vectors), generator=generator)[: SAMPLE * count].to(vectors.device)
        vectors, weights = vectors[drawn], weights[drawn]
    entries, before = _spread(vectors, count, weights, generator), None
    for _ in range(ROUNDS):
        codes, far = nearest(vectors, entries, weights)
        if before is not None and torch.equal(codes, before):
            break
        entries, before = _centred(vectors, entries, weights, codes, far), codes
    return entries


def _spread(vectors: torch.Tensor, count: int, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each entry is a vector, drawn by its distance from those before."""
    chances = torch.rand(count, generator=generator, dtype=torch.float64).to(vectors.device)
    picked = vectors.new_zeros((count, vectors.shape[1]))
    far = weights.sum(1)
    for i in range(count):
        total = far.double().cumsum(0)
        if float(total[-1]) <= 0:  # every vector has an entry: the rest stays 0
            break
        drawn = torch.searchsorted(total, chances[i] * total[-1]).clamp(max=len(vectors) - 1)
        picked[i] = vectors[drawn]
        gap = ((vectors - picked[i]).square_() * weights).sum(1)
        far = gap if i == 0 else torch.minimum(far, gap)
    return picked


def nearest(
    vectors: torch.Tensor, entries: torch.Tensor, weights: torch.Tensor | None = None, count: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the `count` nearest entries of vectors (n, span), int64 (n, count), and sum h (v − entry)²; (n,) for 1.

    Without weights distances are taken entry by entry, so that a vector that is an entry is its own nearest.
    """
    codes, gaps = [], []
    size = max(1, CHUNK // len(entries))
    for first in range(0, len(vectors), size):
        part = vectors[first : first + size]
        if weights is None:
            gap = torch.cdist(part, entries, compute_mode="donot_use_mm_for_euclid_dist").square_()
        else:
            h = weights[first : first + size]
            gap = torch.addmm((h * part.square()).sum(1, keepdim=True), h * part, entries.t(), alpha=-2)
            gap = gap.addmm_(h, entries.square().t()).clamp_(min=0)
        found = gap.min(1) if count == 1 else gap.topk(count, dim=1, largest=False)
        codes.append(found.indices)
        gaps.append(found.values)
    return torch.cat(codes), torch.cat(gaps)


def _centred(vectors, entries, weights, codes, far) -> torch.Tensor:
    """Each entry at the weighted mean of its vectors."""
    total = torch.zeros_like(entries).index_add_(0, codes, weights * vectors)
    mass = torch.zeros_like(entries).index_add_(0, codes, weights)
    empty = torch.bincount(codes, minlength=len(entries)) == 0
    made = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), entries)
    lost = min(int(empty.sum()), len(vectors))
    if lost:
        made[empty.nonzero()[:lost, 0]] = vectors[far.topk(lost).indices]
    return made


@dataclass(frozen=True, eq=False)
class Codebook(Format):
    """One codebook a matrix, for weights. entries: that of the matrix at hand, int8 (1, count · length)."""

    length: int
    entries: torch.Tensor | None = None
    fixed: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    tabled: ClassVar[bool] = True

    @property
    def span(self) -> int:
        return self.length

    @property
    def count(self) -> int:
        """Number of entries."""
        return 2**self.bits

    def of(self, table: torch.Tensor | None) -> "Codebook":
        return self if table is None else replace(self, entries=table)

    def stored(self, entries: torch.Tensor) -> Scales:
        """Entries fp32 (count, span) as they are stored; `book` is the inverse."""
        scale = (entries.abs().amax() / TOP).clamp_(min=SCALE_FLOOR).reshape(1, 1)
        return Scales(scale, table=(entries / scale).round_().to(torch.int8).reshape(1, -1))

    def book(self, scales: Scales) -> torch.Tensor:
        """fp32 (count, span): what the codes stand for."""
        return self.of(scales.table).entry_units() * scales.scale

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """A codebook for the vectors of x."""
        self._resolve(granularity)
        return self.stored(kmeans(self._check(x).reshape(-1, self.span), self.count))

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        shape = (1, self.table_width)
        if given.table is None:
            raise FormatError(f"{self.name}: got a scale alone, expected its codebook with it; pass e.table")
        if given.table.dtype is not torch.int8 or given.table.shape != shape:
            got = f"a {given.table.dtype} codebook {tuple(given.table.shape)}"
            raise FormatError(f"{self.name}: got {got}, expected int8 {shape}")
        return Scales(scale.float(), table=given.table)

    def entry_units(self) -> torch.Tensor:
        """fp32 (count, span), in units of the scale."""
        if self.entries is None:
            raise FormatError(f"{self.name}: its values stand in a codebook of the layer, not in the format")
        return self.entries.float().reshape(-1, self.span)

    def codes_of(self, units: torch.Tensor) -> torch.Tensor:
        codes, _ = nearest(units.reshape(-1, self.span), self.entry_units())
        return codes.to(torch.int8).reshape(*units.shape[:-1], -1)

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        picked = codes.reshape(-1).to(torch.int32) & (self.count - 1)
        return self.entry_units().index_select(0, picked).reshape(*codes.shape[:-1], -1)

    def snap(self, units: torch.Tensor) -> torch.Tensor:
        return self.values_of(self.codes_of(units))

    def limits(self) -> tuple[float, float]:
        return -torch.inf, torch.inf

    def grid(self) -> torch.Tensor:
        raise FormatError(f"{self.name}: codes stand for {self.span} weights at once, expected a format with one each")


def parse(name: str) -> Codebook | None:
    """vqNxS with N entries, a power of two from 2 to 256, of S values; None if the name is not of this kind."""
    match = re.fullmatch(r"vq(\d{1,4})x(\d{1,3})", str(name))
    if match is None:
        return None
    count, span = int(match[1]), int(match[2])
    bits = count.bit_length() - 1
    if not 1 <= bits <= 8 or count != 2**bits or not 1 <= span <= 64:
        raise FormatError(f"format: got {name!r}, expected 2, 4, 8 ... 256 entries of 1 to 64 values, such as vq256x4")
    return Codebook(name, bits, Granularity("tensor"), span)


FORMATS: dict[str, Format] = {}  # every name has parameters
