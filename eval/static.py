"""Kernels by rank, where figures must not depend on what some machine measured as fastest."""

from __future__ import annotations

import os

from dq.kernels.choice import VARIABLE


def kernels_by_rank() -> None:
    """Unless the environment says otherwise; before the first model is loaded."""
    os.environ.setdefault(VARIABLE, "static")
