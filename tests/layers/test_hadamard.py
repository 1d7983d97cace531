"""Hadamard rotations: orthogonal in every order that is built, flat where promised, block-wise, undone exactly."""

from __future__ import annotations

import pytest
import torch

from dq.errors import DQError
from dq.layers import hadamard

ORDERS = (2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 60, 64, 76, 80, 104, 128, 144, 256, 320, 1152)
REFUSED = (3, 5, 6, 7, 10, 18, 30, 92, 116, 1154, -4)


@pytest.mark.parametrize("order", ORDERS)
def test_a_matrix_is_orthogonal_with_entries_of_one_size(order):
    matrix = hadamard.hadamard(order)
    assert matrix.shape == (order, order) and matrix.dtype == torch.float32
    assert (matrix @ matrix.t() - torch.eye(order)).abs().max() < 1e-5
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_powers_of_four_keep_a_constant_row_flat(order):
    assert torch.allclose(hadamard.rotate(torch.ones(3, order), order), torch.ones(3, order), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [4, 12, 64, 128])
def test_a_spike_is_spread_evenly_over_its_block(order):
    spike = torch.zeros(1, order)
    spike[0, 1] = 5.0
    assert torch.allclose(hadamard.rotate(spike, order).abs(), torch.full((1, order), 5.0 / order**0.5))


@pytest.mark.parametrize("order", REFUSED)
def test_orders_without_a_construction_are_refused(order):
    with pytest.raises(
        DQError, match=rf"^rotation: no Hadamard matrix of order {order} is built here; choose [^\n]*$"
    ):
        hadamard.hadamard(order)


@pytest.mark.parametrize("width", [64, 72, 92, 115, 320, 1152])
def test_listed_orders_divide_the_width_and_can_all_be_built(width):
    found = hadamard.orders(width)
    assert found == sorted(set(found)) and all(width % order == 0 and order > 1 for order in found)
    for order in range(2, width + 1):
        if width % order == 0 and order not in found:
            with pytest.raises(DQError):
                hadamard.hadamard(order)
    assert all(hadamard.hadamard(order).shape == (order, order) for order in found)
    assert hadamard.orders(width, 16) == [order for order in found if order <= 16]


def test_known_orders_of_known_widths():
    assert hadamard.orders(320, 128) == [2, 4, 8, 16, 20, 32, 40, 64, 80]
    assert hadamard.orders(7) == [] and hadamard.orders(1) == []


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("order", [2, 4, 12])
def test_a_rotation_is_undone_along_every_dimension(order, dim):
    x = torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(order))
    turned = hadamard.rotate(x, order, dim)
    assert turned.shape == x.shape and (turned - x).abs().max() > 0.5
    assert torch.allclose(hadamard.rotate(turned, order, dim, inverse=True), x, rtol=0, atol=2e-6)
    assert torch.allclose(turned.norm(dim=dim), x.norm(dim=dim), rtol=1e-5)
    expected = hadamard.rotate(x.movedim(dim, -1), order).movedim(-1, dim)
    assert torch.equal(turned, expected)


@pytest.mark.parametrize("order", [4, 12, 20])
def test_a_rotation_is_the_same_matrix_in_every_block_of_channels(order):
    x = torch.randn(5, 3 * order, generator=torch.Generator().manual_seed(0))
    whole = torch.block_diag(*[hadamard.hadamard(order)] * 3)
    assert torch.allclose(hadamard.rotate(x, order), x @ whole, atol=1e-5)
    assert torch.allclose(hadamard.rotate(x, order, inverse=True), x @ whole.t(), atol=1e-5)
    changed = x.clone()
    changed[:, order : 2 * order] += 1
    gap = hadamard.rotate(changed, order) != hadamard.rotate(x, order)
    assert gap[:, order : 2 * order].any() and not gap[:, :order].any() and not gap[:, 2 * order :].any()


def test_inputs_and_weights_rotated_alike_keep_their_product():
    make = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 48, generator=make), torch.randn(5, 48, generator=make)
    for order in hadamard.orders(48):  # most of these matrices are not symmetric
        product = hadamard.rotate(x, order) @ hadamard.rotate(weight, order).t()
        assert torch.allclose(product, x @ weight.t(), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_the_input_stays(dtype):
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = hadamard.rotate(x, 16)
    assert turned.dtype == dtype
    assert torch.allclose(turned.float(), hadamard.rotate(x.float(), 16), atol=8 * torch.finfo(dtype).eps + 1e-6)
