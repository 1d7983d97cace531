"""Every CPU level that the processor has, for tests that run their kernels on each."""

from __future__ import annotations

import pytest
import torch

from dq.kernels.cpu import library, ops


def levels():
    """Those that run here, up to the one that serves."""
    mask, top = library.library().dq_cpu_levels() if library.library() else 0, library.LEVELS.index(library.level())
    return [name for i, name in enumerate(library.LEVELS[: top + 1]) if i and mask >> i & 1]


@pytest.fixture(scope="module", params=levels())
def level(request):
    """Every kernel of a test runs on each level that the processor has."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ops, "level", lambda: request.param)
    yield request.param
    patch.undo()


each_level = pytest.mark.usefixtures("level")


def generator(seed):
    return torch.Generator().manual_seed(seed)
