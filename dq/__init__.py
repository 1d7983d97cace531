"""dq: quantization for diffusers image and video pipelines.

`import dq` registers the "dq" quantization config with diffusers, transformers and peft, now where they are imported,
else when they are. It imports none of them, nor torch; the names below import what they need when first used.
"""

from __future__ import annotations

import importlib

from dq.host import register
from dq.version import __version__

_HOMES = {
    "quantize": "api",
    "explain": "api",
    "dequantize": "api",
    "recipes": "api",
    "Calibration": "trace.calibration",
    "Budget": "budget.limits",
    "Tune": "fit.tune",
    "Report": "report",
    "set_backend": "api",
    "set_sampler": "around.adding",
    "set_cache": "around.adding",
    "set_route": "around.adding",
    "correct": "around.adding",
    "save": "host.store",
    "load": "host.store",
    "from_file": "bridges.loading",
    "DQConfig": "host.config",
    "DQError": "errors",
    "Plan": "plan",
    "LayerPlan": "plan",
    "TensorPlan": "plan",
    "Recipe": "plan",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'dq' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dq.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register.register()
