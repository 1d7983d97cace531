"""DoRA on packed layers: it reads the base layer's whole weight in every call, and gets it decoded.

    y = m / |W + s B A| * (W + s B A) x + bias          m (out,), norms over each row (arXiv 2402.09353)

What peft computes from `base_layer.weight` is left to peft; it is shown a full-precision layer in the packed one's
place. That costs the memory and time of one decoded weight a call. A DoRA is no low-rank sum, so it cannot be fused.
"""

from __future__ import annotations

from typing import Any

from dq.layers import PACKED, naming

PACKED_TYPES = tuple(PACKED.values())
STANDS_FOR = "_stands_for"  # on a stand-in for a packed layer: that layer


class OnDecoded:
    """A variant of peft's that reads the base layer's weight, run on the decoded weight of a packed layer."""

    def __init__(self, variant: Any):
        self.variant = variant

    def init(self, module: Any, **kwargs) -> None:
        self.variant.init(_Shown(module), **kwargs)

    def forward(self, module: Any, **kwargs):
        return self.variant.forward(_Shown(module), **kwargs)


class _Shown:
    """An adapter whose base layer looks like a full-precision one; all else is the adapter's own."""

    def __init__(self, adapter: Any):
        object.__setattr__(self, "_adapter", adapter)

    def __getattr__(self, name: str):
        return getattr(self._adapter, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._adapter, name, value)

    def get_base_layer(self):
        base = naming.inner(self._adapter)
        base = vars(base).get(STANDS_FOR, base)
        return base.dense() if isinstance(base, PACKED_TYPES) else base


def reads_weights(variant: Any) -> bool:
    """Whether a variant of an adapter is a DoRA."""
    return type(variant).__name__.startswith("Dora")
