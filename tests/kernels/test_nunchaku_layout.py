"""Tensors as the nunchaku-lite operators read them: each element lies where the fragments of `mma` put it.

The formulas here are those of the PTX ISA (mma.m16n8k64 and m16n8k16, fragment of B) and of the operators' comments,
one element at a time; `dq.kernels.nunchaku.layout` moves whole tensors.
"""

from __future__ import annotations

import pytest
import torch

from dq import formats
from dq.kernels.nunchaku import layout

OUT, IN, RANK = 256, 384, 48
PAIRS = {name: (getattr(layout, name), getattr(layout, f"{name}_back")) for name in ("weight", "scale", "up", "down")}
DICE = torch.Generator().manual_seed(5)


def nibble_place(n: int, k: int) -> int:
    """Index of the code of weight[n, k] among all codes: a lane has two fragments of two registers of 8 codes."""
    block, n = divmod(n, 128)
    group, k = divmod(k, 64)
    tile, n = divmod(n, 16)
    lane = 4 * (n % 8) + (k % 32) // 8  # of mma.m16n8k64: column n of B is groupID, rows k begin at threadID * 8
    register = 2 * (n // 8) + k // 32
    return ((((block * (IN // 64) + group) * 8 + tile) * 32 + lane) * 4 + register) * 8 + k % 8


def scale_place(n: int, group: int, groups: int) -> int:
    """Index of scale[n, group]: lane 4 a + j has columns 16 a + 2 j, + 1, + 8, + 9 of the accumulators' fragment."""
    block, n = divmod(n, 128)
    lane, element = 4 * (n // 16) + n % 8 // 2, n % 2 + 2 * (n % 16 // 8)
    return ((block * groups + group) * 32 + lane) * 4 + element


def branch_place(n: int, k: int, tiles_inner: int, outer: int, inner: int) -> int:
    """Index of an element of a factor in tile (outer, inner): B of mma.m16n8k16, two fragments of two registers."""
    n, k = n % 16, k % 16
    lane, register = 4 * (n % 8) + k % 8 // 2, 2 * (n // 8) + k // 8
    return (((outer * tiles_inner + inner) * 32 + lane) * 4 + register) * 2 + k % 2


def test_every_code_of_a_weight_is_where_the_fragment_of_the_instruction_has_it():
    codes = torch.randint(-7, 8, (OUT, IN), generator=DICE, dtype=torch.int8)
    laid = layout.weight(formats.get("int4").pack(codes)).reshape(-1)
    nibbles = torch.stack([laid & 15, (laid >> 4) & 15], 1).reshape(-1)
    places = torch.tensor([[nibble_place(n, k) for k in range(IN)] for n in range(OUT)])
    assert torch.equal(nibbles[places], codes & 15) and places.unique().numel() == OUT * IN


def test_every_scale_is_where_the_lane_that_multiplies_by_it_reads():
    scale = torch.rand(OUT, IN // 64, generator=DICE)
    places = torch.tensor([[scale_place(n, g, IN // 64) for g in range(IN // 64)] for n in range(OUT)])
    assert torch.equal(layout.scale(scale).reshape(-1)[places], scale)
    bias = torch.rand(OUT, generator=DICE)
    assert torch.equal(layout.vector(bias)[[scale_place(n, 0, 1) for n in range(OUT)]], bias)


def test_both_factors_of_the_branch_lie_in_tiles_of_the_instruction():
    up, down = torch.rand(OUT, RANK, generator=DICE), torch.rand(RANK, IN, generator=DICE)
    places = [[branch_place(n, r, RANK // 16, n // 16, r // 16) for r in range(RANK)] for n in range(OUT)]
    assert torch.equal(layout.up(up).reshape(-1)[torch.tensor(places)], up)
    places = [[branch_place(r, k, RANK // 16, k // 16, r // 16) for k in range(IN)] for r in range(RANK)]
    assert torch.equal(layout.down(down).reshape(-1)[torch.tensor(places)], down)
    assert layout.down(down).shape == (IN, RANK), "as diffusers allocates it"


def test_every_code_of_a_weight_only_linear_is_where_the_operators_own_test_packs_it():
    codes = torch.randint(-8, 8, (8, 128), generator=DICE, dtype=torch.int8)
    laid = layout.words(codes)
    assert laid.shape == (2, 64) and laid.dtype is torch.int32
    for n in range(8):
        for k in range(128):
            c = k % 64
            word = laid[n // 4, k // 64 * 32 + n % 4 * 8 + c // 32 * 4 + c % 8 // 2]
            assert (int(word) >> (4 * (c % 32 // 8 + 4 * (c % 2)))) & 15 == codes[n, k] + 8
    assert torch.equal(layout.words_back(laid), codes)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sizes", [(128, 128, 16), (OUT, IN, RANK)])
def test_what_is_laid_comes_back_to_the_bit(name, sizes):
    out, inputs, rank = sizes
    made = {
        "weight": lambda: torch.randint(-128, 128, (out, inputs // 2), generator=DICE, dtype=torch.int8),
        "scale": lambda: torch.rand(out, inputs // 64, generator=DICE),
        "up": lambda: torch.rand(out, rank, generator=DICE).bfloat16(),
        "down": lambda: torch.rand(rank, inputs, generator=DICE).bfloat16(),
    }[name]()
    lay, back = PAIRS[name]
    laid = lay(made)
    assert torch.equal(back(laid), made) and laid.dtype == made.dtype and laid.is_contiguous()
    assert not torch.equal(laid.reshape(-1), made.reshape(-1)), "another order"
    assert torch.equal(layout.vector_back(layout.vector(made.reshape(-1)[:128])), made.reshape(-1)[:128])
