"""Whether what the layers of a model give stays within what calibration can work with; if not, which is first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from dq.errors import DQError
from dq.layers import kind_of

LARGEST = 1e12  # squares of larger values, summed over rows and columns, leave fp32


@contextmanager
def watched(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """DQError at the end of the block if the models' layers gave NaN, Inf or values beyond LARGEST; names the first.

    models  by component name, "" or "model" for a bare one. The largest values stay on their device until the end.
    """
    tops: dict[tuple[str, str], torch.Tensor] = {}

    def watch(key: tuple[str, str]):
        def look(module, args, output):
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
                top = torch.linalg.vector_norm(output.detach().flatten(), torch.inf).float()
                tops[key] = top if key not in tops else torch.maximum(tops[key], top)  # NaN stays

        return look

    with ExitStack() as stack:
        for part, model in models.items():
            for name, module in model.named_modules():
                if kind_of(module) is not None:
                    stack.callback(module.register_forward_hook(watch((part, name))).remove)
        yield
    for (part, name), top in tops.items():
        if not float(top) <= LARGEST:
            raise DQError(_told(part, name, models[part].get_submodule(name), float(top)))


def _told(part: str, name: str, module: nn.Module, top: float) -> str:
    where = f"layer {name!r}" + (f" of {part}" if part not in ("", "model") else "")
    for key, value in module.named_parameters(recurse=False):
        if not value.is_meta and not bool(value.isfinite().all()):
            return f"{where}: its {key} holds NaN or Inf; mend or reload the model before calibrating"
    found = f"values up to {top:.3g}" if top < torch.inf else "NaN or Inf"
    return (
        f"{where} gave {found} in calibration, expected values below {LARGEST:.0e}; "
        "look at its inputs, or run the model in another dtype"
    )
