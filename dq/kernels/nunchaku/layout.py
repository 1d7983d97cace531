"""The order in which diffusers' nunchaku-lite operators read a 4-bit linear: fragments of `mma` instructions.

A warp multiplies by mma.m16n8k64 (int4) and mma.m16n8k16 (low-rank branch): lane l = 4 i + j of it holds the elements
of output i and of inputs next to each other that begin at a multiple of j (PTX ISA, "Matrix fragments for mma"). Two
such products side by side make a tile of 16 outputs, 8 tiles a block of 128, and what a lane reads lies together:

    weight   (out / 128, in / 64, tile, i, j, half, part) of words of 8 codes
                                                           out = 128 b + 16 tile + 8 half + i
                                                           in  = 64 g + 32 part + 8 j + code of the word
    scale    (out / 128, in / 64, tile, j, half, pair)     out = 128 b + 16 tile + 8 half + 2 j + pair
    bias, smoothing (out / 128, tile, j, half, pair)       as the scale
    branch   (out / 16, in / 16, i, j, half, part, pair)   out = 16 a + 8 half + i, in = 16 c + 8 part + 2 j + pair;
             of `down` the tiles of the rank are inner, so that it is (in / 16, rank / 16, ...)

All of them are permutations, undone to the bit; weights move as words of 32 bits. The weight-only product of few rows
(`words`) has an order of its own: 4 outputs take turns, and codes lie as its bit tricks unpack them.
Sources: the PTX ISA, the comments of the operators' sources, and their own test of the weight-only product.
"""

from __future__ import annotations

import torch

GROUP = 64  # columns that share a scale, of weights and of activations
BLOCK = 128  # sizes of a linear are multiples of it: the operators of diffusers get no padded tensors
TILE = 16  # the rank is a multiple of it
ROWS = 4  # outputs whose weight-only codes take turns
ZERO = 8  # what is added to a signed code to store it unsigned


def weight(packed: torch.Tensor) -> torch.Tensor:
    """dq's int8 (out, in / 2) -> int8 (out / 128, in / 64, 8, 8, 4, 16), a permutation of words of 8 codes."""
    out, half = packed.shape
    words = packed.contiguous().view(torch.int32).reshape(out // BLOCK, 8, 2, 8, 2 * half // GROUP, 2, 4)
    ordered = words.permute(0, 4, 1, 3, 6, 2, 5).contiguous()
    return ordered.view(torch.int8).reshape(*ordered.shape[:5], 16)


def weight_back(laid: torch.Tensor) -> torch.Tensor:
    """Inverse of `weight`."""
    blocks, groups = laid.shape[:2]
    words = laid.contiguous().view(torch.int32).reshape(blocks, groups, 8, 8, 4, 2, 2)
    rows = words.permute(0, 2, 5, 3, 1, 6, 4).reshape(blocks * BLOCK, groups * GROUP // 8)
    return rows.contiguous().view(torch.int8)


def scale(rows: torch.Tensor) -> torch.Tensor:
    """(out, groups), of a vector (out, 1) -> (out / 128, groups, 8, 4, 2, 2), a permutation."""
    out, groups = rows.shape
    return rows.reshape(out // BLOCK, 8, 2, 4, 2, groups).permute(0, 5, 1, 3, 2, 4).contiguous()


def scale_back(laid: torch.Tensor) -> torch.Tensor:
    """Inverse of `scale`."""
    blocks, groups = laid.shape[:2]
    return laid.permute(0, 2, 4, 3, 5, 1).reshape(blocks * BLOCK, groups).contiguous()


def vector(values: torch.Tensor) -> torch.Tensor:
    """(out,) -> (out,): a bias, or a smoothing of inputs."""
    return scale(values[:, None]).reshape(-1)


def vector_back(laid: torch.Tensor) -> torch.Tensor:
    """Inverse of `vector`."""
    return scale_back(laid.reshape(-1, 1, 8, 4, 2, 2))[:, 0]


def _tiles(factor: torch.Tensor) -> torch.Tensor:
    """(rows, columns) -> (rows / 16, columns / 16, i, j, half, part, pair)."""
    rows, columns = factor.shape
    return factor.reshape(rows // TILE, 2, 8, columns // TILE, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6)


def _tiles_back(tiles: torch.Tensor) -> torch.Tensor:
    """Inverse of `_tiles`."""
    rows, columns = tiles.shape[:2]
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(rows * TILE, columns * TILE).contiguous()


def _as_tiles(laid: torch.Tensor) -> torch.Tensor:
    rows, columns = laid.shape
    return laid.reshape(rows // TILE, columns // TILE, 8, 4, 2, 2, 2)


def up(factor: torch.Tensor) -> torch.Tensor:
    """(out, rank) -> (out, rank), a permutation."""
    return _tiles(factor).reshape(factor.shape).contiguous()


def up_back(laid: torch.Tensor) -> torch.Tensor:
    """Inverse of `up`."""
    return _tiles_back(_as_tiles(laid))


def down(factor: torch.Tensor) -> torch.Tensor:
    """(rank, in) -> (in, rank), a permutation."""
    return _tiles(factor).transpose(0, 1).reshape(factor.shape[::-1]).contiguous()


def down_back(laid: torch.Tensor) -> torch.Tensor:
    """Inverse of `down`."""
    return _tiles_back(_as_tiles(laid).transpose(0, 1))


def words(codes: torch.Tensor) -> torch.Tensor:
    """Signed codes int8 (out, in) in -8 ... 7 -> int32 (out / 4, in / 2) of the weight-only product.

    Word w of a row's group of 64 has the columns 32 (w // 4) + 8 a + 2 (w % 4) + e in its bits 4 (a + 4 e) and up.
    """
    out, inputs = codes.shape
    lanes = (codes.int() + ZERO).reshape(out, inputs // GROUP, 2, 4, 4, 2).permute(0, 1, 2, 4, 5, 3)
    shifts = torch.arange(0, 32, 4, device=codes.device)
    whole = (lanes.reshape(out, inputs // GROUP, 8, 8).long() << shifts).sum(-1)
    whole = torch.where(whole >= 2**31, whole - 2**32, whole).int()
    turns = whole.reshape(out // ROWS, ROWS, inputs // GROUP, 8).transpose(1, 2)
    return turns.reshape(out // ROWS, inputs // 2).contiguous()


def words_back(laid: torch.Tensor) -> torch.Tensor:
    """Inverse of `words`."""
    out, inputs = laid.shape[0] * ROWS, laid.shape[1] * 2
    rows = laid.reshape(out // ROWS, inputs // GROUP, ROWS, 8).transpose(1, 2).reshape(out, inputs // GROUP, 8, 1)
    lanes = (rows >> torch.arange(0, 32, 4, device=laid.device)) & 15
    codes = lanes.reshape(out, inputs // GROUP, 2, 4, 2, 4).permute(0, 1, 2, 5, 3, 4).reshape(out, inputs)
    return (codes - ZERO).to(torch.int8)
