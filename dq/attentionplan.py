"""What the attention of one module is rounded to, in words, and what recipes ask of it.

    o = softmax(q k^T scale + mask) v

Reading these needs no torch until it is asked what a format is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dq.errors import DQError, nearest

# what shares a scale: a token; 128 queries or 64 keys; those that one thread of a GPU's tile holds; all of a head
QUERY_GRAINS = ("token", "block", "thread", "tensor")
VALUE_GRAINS = ("channel", "tensor")
SMOOTH = ("", "k", "q", "qk")
LOG = re.compile(r"log([2-8])/(0?\.\d{1,6}|[12](\.\d{1,6})?)\Z")
LINEAR = re.compile(r"uint([2-8])\Z")


@dataclass(frozen=True)
class AttentionPlan:
    """Formats of one module's attention; "" leaves a tensor in floating point.

    q, k    format and what shares a scale, one of QUERY_GRAINS: "int4/thread". Scales never cross heads or samples
    v       likewise, one of VALUE_GRAINS: "fp8/channel"
    p       of e^(score - m), m the largest score of a row's tile of keys: "uint8", codes 0 to 255 for 0 to 1; "fp8";
            "log4/0.5", 2^(-0.5 n) of 4-bit codes n, the last of which is 0
    smooth  "k": the mean key is taken off, which moves every score of a row alike; "q": so is the mean of 128 queries,
            whose products with the keys are added in floating point; "qk": both
    start   the first key, a text's start token, is kept apart, in floating point; of a wish: in attention to a text
    reason  text for people, not compared
    """

    q: str = ""
    k: str = ""
    p: str = ""
    v: str = ""
    smooth: str = ""
    start: bool = False
    reason: str = field(default="", compare=False)

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded."""
        return bool(self.q or self.k or self.p or self.v)

    def __str__(self) -> str:
        """One line, without the reason: `q int4/thread, k int4/thread, p fp8, v fp8/channel, q and k smoothed`."""
        said = [f"{name} {text}" for name in "qkpv" if (text := getattr(self, name))]
        said += [f"{' and '.join(self.smooth)} smoothed"] if self.smooth else []
        return ", ".join([*said, *["first key apart"] * self.start]) or "in floating point"

    def to_dict(self) -> dict:
        """JSON form; fields at their default are left out."""
        values = ((each.name, getattr(self, each.name), each.default) for each in dataclasses.fields(self))
        return {name: value for name, value, default in values if value != default}

    def check(self, name: str) -> None:
        """DQError, naming the module, for formats that do not exist or do not fit."""
        place = f"attention of {name!r}"
        if self.smooth not in SMOOTH:
            raise DQError(f"{place}: smooth is {self.smooth!r}, {nearest(self.smooth, SMOOTH)}")
        for key, grains in (("q", QUERY_GRAINS), ("k", QUERY_GRAINS), ("v", VALUE_GRAINS)):
            if text := getattr(self, key):
                _check_tensor(f"{place}: {key} is {text!r}", text, grains)
        if self.p and self.p != "fp8" and not LOG.match(self.p) and not LINEAR.match(self.p):
            raise DQError(f"{place}: p is {self.p!r}, expected uint2 to uint8, fp8, or a logarithm as log4/0.5")


def _check_tensor(got: str, text: str, grains: tuple[str, ...]) -> None:
    from dq import formats

    form, _, grain = text.partition("/")
    if grain not in grains:
        raise DQError(f"{got}, expected a format and one of {', '.join(grains)}, as int8/{grains[0]}")
    try:
        spec = formats.get(form)
    except ValueError as error:
        raise DQError(f"{got}: {error}") from None
    if spec.fixed or spec.affine or spec.offset or spec.tabled:
        raise DQError(f"{got}, expected a format of one symmetric scale, as int8, int4 or fp8")


@dataclass(frozen=True)
class Wish:
    """What a recipe asks of attention: what a module may become, in order of preference.

    least  cosine similarity to full precision that a module's output must have in every calibration call, as well as
           without rounding else; None: the choice of the best. Without data the first choice is taken
    source whose idea it is
    """

    choices: tuple[AttentionPlan, ...]
    source: str
    least: float | None = None


INT8 = AttentionPlan("int8/token", "int8/token", "uint8", "int8/channel", "k")  # what dq's CPU kernels multiply
_PLAIN = replace(INT8, smooth="")
_LOGS = ("log4/0.5", *(f"log4/{q / 37:.4f}" for q in range(7, 38, 3)))
_SAGE2 = AttentionPlan("int4/thread", "int4/thread", "fp8", "fp8/channel", "qk")
WISHES: Mapping[str, Wish] = {
    "int8": Wish((INT8,), "SageAttention (Zhang et al., arXiv 2410.02367)", 0.998),
    "sage2": Wish(
        (_SAGE2, replace(_SAGE2, q="int8/thread", k="int8/thread", smooth="k")),
        "SageAttention2 (Zhang et al., arXiv 2411.10958)",
        0.998,
    ),
    "dgq": Wish((replace(_PLAIN, p="log8/1", start=True),), "DGQ (arXiv 2501.04304)"),
    "qdiffusion": Wish((_PLAIN,), "Q-Diffusion (arXiv 2302.04304) and TFMQ-DM (arXiv 2311.16503)"),
    # the base is 2^(q / 37); RepQ-ViT's (arXiv 2212.08254) is the square root of 2
    "adalog": Wish(tuple(replace(_PLAIN, p=p) for p in _LOGS), "AdaLog (arXiv 2407.12951)"),
}
