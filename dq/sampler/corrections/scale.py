"""Q-Sched's: factors of the model's output and of the sample, before a step. arXiv 2509.01624, section 3.

    step(c_eps[k] e, t_k, c_x[k] x)      in place of step(e, t_k, x), e the model's output, x the sample

Factors of 1 leave every bit as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def before(
    values: Mapping[str, torch.Tensor], output: torch.Tensor, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and sample times their factors, in their own dtypes."""
    return output * values["output"], sample * values["sample"]


def line(values: Mapping) -> str:
    """The factors, as `dq.explain` shows them."""
    rows = (" ".join(f"{value:.3f}" for value in values[name]) for name in ("output", "sample"))
    return "output times {}, sample times {}".format(*rows)
