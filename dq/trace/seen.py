"""What a trace gives to the methods: one unit of the model at a time, and what its layers saw.

A unit is the smallest piece that is fitted at once: a transformer block, a ResNet block, or a single layer outside of
both. Two streams of inputs run through the units: `full`, as in the full-precision model, and `hat`, as they become
once the units before are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dq.layers import naming
from dq.plan import LayerPlan


@dataclass(frozen=True)
class Needs:
    """What a method wants recorded. Nothing else is.

    rows      input rows (tokens) sampled per linear over all calls; for convolutions crops of input maps, as many as
              hold about so many pixels and at least one of every call; 0 for none
    steps     `rows` are of each step that was recorded, not of all of them together
    between   tables have rows for the timesteps between recorded ones, too: buckets that saw nothing
    gram      second moments of the input, as matrices (columns, columns)
    absmax    largest magnitude per input channel, step bucket and guidance branch
    calls     the unit's own inputs and outputs can be read again (block reconstruction)
    hat       the quantized stream as well: errors of earlier units propagate
    """

    rows: int = 0
    steps: bool = False
    between: bool = False
    gram: bool = False
    absmax: bool = False
    calls: bool = False
    hat: bool = True


@dataclass
class LayerSeen:
    """Inputs of one layer over the calibration calls. Row order is the same in every field.

    x        sample under the full stream, in its dtype: (n, in) rows of a linear, (n, in, *crop) of a convolution
    hat      the same rows or crops under the quantized stream; x itself where the method does not ask for it
    bucket   (n,) int64: step bucket of each row or crop
    branch   (n,) int64: guidance branch, 0 conditional or unguided, 1 unconditional
    absmax   (buckets, 2, in) fp32: per step bucket and branch, over everything seen (full stream); 0 where unseen
    low, high  (buckets, 2) fp32: range of all values, likewise
    gram     (columns, columns) fp32: mean of hat^T hat over sampled rows (patches for a convolution: columns as in
             LayerPlan.columns, channel-major)
    source   name of the first layer of the unit that has the very same input tensor (itself if none before)
    phase    (n,) int64: phase of each row or crop by the plan's switches; None where nobody recorded it
    """

    x: torch.Tensor
    hat: torch.Tensor
    bucket: torch.Tensor
    branch: torch.Tensor
    absmax: torch.Tensor | None = None
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    source: str = ""
    phase: torch.Tensor | None = None


@dataclass
class Unit:
    """One fitted piece of the model.

    name    dotted name of the module
    module  the full-precision module itself (never changed by a method)
    layers  the planned layers inside, by full dotted name, in execution order
    """

    name: str
    module: nn.Module
    layers: dict[str, LayerPlan] = field(default_factory=dict)

    def layer(self, name: str) -> nn.Module:
        """The full-precision layer of a full dotted name."""
        return self.module if name == self.name else naming.at(self.module, name.removeprefix(f"{self.name}."))


@dataclass(frozen=True)
class UnitCall:
    """One call of a unit: inputs of the asked stream, output of the full-precision unit on the full stream."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any
    bucket: int
    phase: int = 0


@dataclass
class Seen:
    """What the layers of one unit saw.

    layers   by full dotted name; a planned layer that was never called is missing
    buckets  number of step buckets; `edges` are the model's timestep values between them, rising
    calls    -> iterator over the unit's calls, read from disk one at a time; stream "full" or "hat" (`Needs.calls`)
    seed     for whatever the method draws at random
    rising   timesteps rise along a run: the first bucket, not the last, is the noisiest
    """

    layers: dict[str, LayerSeen]
    buckets: int
    edges: tuple[float, ...]
    calls: Callable[[str], Iterator[UnitCall]]
    seed: int = 0
    rising: bool = False
