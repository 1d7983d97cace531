"""What a quantized pipeline may cost: the limits behind `dq.quantize(..., budget=dq.Budget(...))`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from dq.errors import DQError, nearest
from dq.plan import Keeping, Plan, Recipe

SCOPES = ("denoiser", "pipeline", "peak")
METRICS = ("trajectory", "prediction", "output", "sampled")
TIES = ("", "kind")
THIRDS = ("early", "middle", "late")
LIMITS = ("bytes", "ms_per_step", "bits", "act_bits")
OWN = "own"


@dataclass(frozen=True)
class Budget:
    """Limits that mixed precision stays under; at least one of the first four. Raises DQError at once.

    bytes        of all parameters of the scope, or with scope "peak" of a whole call
    ms_per_step  milliseconds of all denoiser calls of one step, by times measured on this machine
    bits         mean bits per weight of the layers that can be quantized, scales and branches included; "own": as many
                 as the recipe itself gives, spent where they count
    act_bits     mean bits of the inputs of layers that round them, over all multiplications and all steps of a run; an
                 input that is not rounded counts 16; "own": as many as the recipe's own inputs have
    thirds       a layer may round its input to another format in each third of the steps
    protect      with `thirds`: "early", "middle", "late", in which inputs have the most bits that their layers offer
    scope        what `bytes` counts: "denoiser" (all denoisers of the pipeline), "pipeline", or "peak": parameters of
                 the pipeline and the most that one call of a denoiser holds beside them
    tie          "kind": layers of one name get one choice in all blocks; "": every layer its own
    metric       how a choice's harm is measured: "trajectory" (gradients of the pictures through the whole run;
                 for bare models that of "prediction"), "prediction" (gradients of single denoiser calls), "output"
                 (the prediction with one layer quantized at a time), "sampled" (regression on random plans)
    runs         of the pipeline that "trajectory" is measured on, at most; fewer begin after eight minutes
    checks       random plans that predictions are checked on, for the report; 0: none
    """

    bytes: int | None = None
    ms_per_step: float | None = None
    bits: float | str | None = None
    act_bits: float | str | None = None
    thirds: bool = False
    protect: tuple[str, ...] = ()
    scope: str = "denoiser"
    metric: str = "trajectory"
    tie: str = ""
    runs: int = 64  # hard runs are few: at 6 bits tiny-pixart gained 0.2 dB from 16 runs, 1.7 from 64
    checks: int = 8

    def __post_init__(self):
        given = {name: getattr(self, name) for name in LIMITS}
        if all(value is None for value in given.values()):
            raise DQError("budget: got no limit, expected bytes=, ms_per_step=, bits= or act_bits=")
        for name, value in given.items():
            if value == OWN and name in ("bits", "act_bits"):
                continue
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf
            ):
                raise DQError(f"budget: {name} is {value!r}, expected a number above 0")
        if self.scope not in SCOPES:
            raise DQError(f"budget: scope is {self.scope!r}, {nearest(str(self.scope), SCOPES)}")
        if self.tie not in TIES:
            raise DQError(f"budget: tie is {self.tie!r}, {nearest(str(self.tie), TIES)}")
        if self.metric not in METRICS:
            raise DQError(f"budget: metric is {self.metric!r}, {nearest(str(self.metric), METRICS)}")
        for name, least in (("runs", 1), ("checks", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DQError(f"budget: {name} is {value!r}, expected a whole number of at least {least}")
        unknown = [third for third in self.protect if third not in THIRDS]
        if isinstance(self.protect, str) or unknown:
            got = f"budget: protect is {self.protect!r}"
            raise DQError(f"{got}, expected a list of {', '.join(map(repr, THIRDS))}")
        if self.protect and not self.thirds:
            raise DQError(f"budget: protect={list(self.protect)} needs formats by thirds; pass thirds=True")
        if self.thirds and self.metric == "output":
            raise DQError("budget: metric 'output' tells no thirds of a run apart; expected another one for thirds")

    def __str__(self) -> str:
        texts = []
        if self.bytes is not None:
            texts.append(f"{self.bytes / 2**20:.1f} MiB of the {self.scope}")
        if self.ms_per_step is not None:
            texts.append(f"{self.ms_per_step:g} ms per step")
        if self.bits is not None:
            texts.append(f"{_number(self.bits)} bits per weight")
        if self.act_bits is not None:
            texts.append(f"{_number(self.act_bits)} bits per input")
        return ", ".join(texts)


def _number(value: float | str) -> str:
    return "the recipe's own" if value == OWN else f"{value:g}"


def check(budget, wanted: Recipe | Plan | Keeping, bare: bool) -> None:
    """DQError for a budget that is none, or that a recipe or (`bare`) a model without parts cannot have."""
    if isinstance(budget, Mapping) and bare:
        raise DQError("budget: got limits by denoiser for a model, which has none; expected one dq.Budget")
    for own in budget.values() if isinstance(budget, Mapping) else [budget]:
        if not isinstance(own, Budget):
            raise DQError(f"budget is {own!r}, expected dq.Budget(bytes=...), (ms_per_step=...) or (bits=...)")
        if own.thirds and getattr(wanted, "late", ()):
            got = f"budget: thirds choose formats along the run, {wanted.name!r} has late ones of its own"
            raise DQError(f"{got}; leave one of them out")
    if isinstance(wanted, Keeping):
        raise DQError(f"budget: recipe {wanted.name!r} keeps the codes there are; expected one that rounds anew")
    if isinstance(wanted, Plan):
        raise DQError(
            "budget: got a plan, in which every layer is decided; expected a recipe, which names the choices"
        )
