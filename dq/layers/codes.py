"""What `layer.weight` of a packed layer is to other code: its int8 bytes, which tell the dtype the layer computes in.

Host libraries cast a layer's inputs to the dtype of its weight: pixels cast to int8 are lost. The layer's Parameter
itself stays an ordinary int8 one (`layer._parameters["weight"]`, `parameters()`, `state_dict()`): compilers, loaders
and offloading hooks take its dtype for that of its bytes.
"""

from __future__ import annotations

import torch


class Codes(torch.Tensor):
    """The bytes of a packed weight, shared with its Parameter; arithmetic, `data` and `detach` give int8 tensors.

    told    the compute dtype of the layer
    stored  the Parameter, which has what others wrote on it
    """

    told: torch.dtype
    stored: torch.nn.Parameter
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.told

    def is_floating_point(self) -> bool:
        return True

    def __getattr__(self, name: str):
        return getattr(vars(self)["stored"], name)

    def __reduce_ex__(self, protocol):
        return of, (self.stored, self.told)


def of(stored: torch.nn.Parameter, told: torch.dtype) -> Codes:
    """The int8 bytes `stored` of any shape, telling the dtype `told`."""
    made = torch.Tensor._make_subclass(Codes, stored.detach())
    made.told, made.stored = told, stored
    return made
