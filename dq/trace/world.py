"""The processes that share one piece of work."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> PartialState:
    """Rank, number and barrier of the processes that share work; alone unless accelerate or torchrun started several.

    One state for the whole process: the first call makes it. Whoever waits for the first process does so for days, as
    that one may fit, search or score for long.
    """
    from accelerate import PartialState  # here: it takes its time, and most runs need it late or never

    # without cpu=True, accelerate takes several processes without GPUs for one
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
