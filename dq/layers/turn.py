"""Which of its two formats the input of one layer takes in the running step, where a rule decides that.

Stands in the place of the layer's clock: what `dq.layers.clock` tells all layers alike is here one layer's own.
"""

from __future__ import annotations

import torch


class Turn:
    """0 for the first format of a layer, 1 for the late one; `phase` is the same as a tensor (1,), for traced code."""

    def __init__(self, now: int = 0):
        self.phase = torch.zeros(1, dtype=torch.long)
        self.set(now)

    def set(self, now: int) -> None:
        """Choose a format from now on."""
        self.now = now
        self.phase.fill_(now)

    def phase_on(self, device: torch.device) -> torch.Tensor:
        """The phase tensor on `device`."""
        return self.phase if self.phase.device == device else self.phase.to(device)
