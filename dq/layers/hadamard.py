"""Hadamard matrices of (nearly) any order, and the block-wise rotation of a layer's input channels with them.

    x' = x R,  R = blockdiag(H, ..., H) / sqrt(n),  H H^T = n I,  H in {-1, 1}^(n x n)

Orders are built, never listed: powers of 4 from the regular 4 x 4 matrix (Kronecker powers keep equal row sums, so
that a constant row does not become one spike), other powers of 2 by Sylvester, and order q + 1 or 2 (q + 1) from the
quadratic residues of a prime q by Paley (1933); Kronecker products of these give the rest.
"""

from __future__ import annotations

from functools import cache

import torch

from dq.errors import DQError

REGULAR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def orders(width: int, most: int = 0) -> list[int]:
    """Block orders above 1 that divide `width` and have a construction, rising; at most `most` if given."""
    found = [n for n in range(2, width + 1) if width % n == 0 and _factors(n) is not None]
    return [n for n in found if not most or n <= most]


@cache
def hadamard(order: int) -> torch.Tensor:
    """fp32 (order, order), orthogonal. DQError when there is no construction for the order."""
    factors = _factors(order)
    if factors is None:
        raise DQError(f"rotation: no Hadamard matrix of order {order} is built here; choose 2, 4 or another order")
    # kept for good, so it must not depend on who asks first: not in inference mode, not on the meta device
    with torch.inference_mode(False), torch.device("cpu"):
        matrix = torch.ones(1, 1, dtype=torch.float32)
        for factor in factors:
            matrix = torch.kron(matrix, _base(factor).float())
        return matrix / order**0.5


@cache
def placed(order: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`hadamard(order)` on a device in a dtype: one for all layers there, neither copied nor cast again by a call."""
    with torch.inference_mode(False):
        return hadamard(order).to(device, dtype)


def exists(order: int) -> bool:
    """Whether a Hadamard matrix of this order is built here."""
    return _factors(order) is not None


def rotate(
    x: torch.Tensor, order: int, dim: int = -1, inverse: bool = False, matrix: torch.Tensor | None = None
) -> torch.Tensor:
    """x times R (or its transpose) along the channels `dim`, in x's dtype; their number is a multiple of `order`.

    matrix  hadamard(order) where the caller keeps it (see `placed`), so that a compiled graph need not build it
    """
    matrix = (hadamard(order) if matrix is None else matrix).to(x.device, x.dtype)
    rows = x.movedim(dim, -1)
    blocks = rows.reshape(*rows.shape[:-1], -1, order) @ (matrix.t() if inverse else matrix)
    return blocks.reshape(rows.shape).movedim(-1, dim)


@cache
def _factors(order: int) -> tuple[int, ...] | None:
    """Orders of base matrices whose Kronecker product has this order, None if there is none."""
    if order <= 1:
        return () if order == 1 else None
    power = order & -order
    if power == order:
        exponent = order.bit_length() - 1
        return (4,) * (exponent // 2) + (2,) * (exponent % 2)
    for base in range(12, order + 1, 4):
        if order % base == 0 and base & (base - 1) and _paley(base) is not None:
            rest = _factors(order // base)
            if rest is not None:
                return (*rest, base)
    return None


def _paley(order: int) -> int | None:
    """The prime that gives a Paley matrix of this order: q = order - 1 = 3 mod 4, or order / 2 - 1 = 1 mod 4."""
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return order - 1
    return order // 2 - 1 if _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1 else None


def _is_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))


def _base(order: int) -> torch.Tensor:
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if order == 4:
        return torch.tensor(REGULAR, dtype=torch.float32)
    q = _paley(order)
    assert q is not None, order  # `hadamard` asks for orders that exist
    residues = {(i * i) % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)])
    index = torch.arange(q)
    jacobsthal = character[(index[:, None] - index) % q]
    conference = torch.zeros(q + 1, q + 1)
    conference[1:, 1:] = jacobsthal
    conference[0, 1:] = 1
    conference[1:, 0] = 1 if q % 4 == 1 else -1
    if q % 4 == 3:
        return conference + torch.eye(q + 1)
    pair, one = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(conference, pair) + torch.kron(torch.eye(q + 1), one)
