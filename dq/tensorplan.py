"""What one tensor is rounded to, in words. Reading one needs no torch until it is asked what a format is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from dq.errors import DQError, nearest

if TYPE_CHECKING:
    from dq import formats

SCALES = ("dynamic", "static", "table")
MOST_SHIFT = 1e9
MOST_GROUP = 2**20  # values that share a scale, in any format


@dataclass(frozen=True)
class TensorPlan:
    """Format and granularity of one tensor, written `int4/group:64`. Activations also say where scales come from.

    scale  "dynamic" (measured per call), "static" (one stored scale) or "table" (one stored scale per step)
    shift  fixed value added to an activation before it is quantized and folded out again (one-sided, post-GELU inputs)
    clip   share of a measured range that codes cover, at most 1; what lies beyond saturates
    """

    format: str
    granularity: str
    scale: str = "dynamic"
    shift: float = 0.0
    clip: float = 1.0

    @classmethod
    def parse(cls, text: str, checked: bool = True) -> TensorPlan:
        """Read `format[/granularity[/scale[/shift[/clip]]]]`; without `checked`, any name is taken as it is."""
        return _parsed(text, checked)

    @classmethod
    def _parse(cls, text: str, checked: bool) -> TensorPlan:
        head, *rest = text.split("/")
        try:
            name, granularity = _known(head, rest[0] if rest else None) if checked else (head, (*rest, "default")[0])
            shift, clip = (float(rest[k]) if len(rest) > k else default for k, default in ((2, 0.0), (3, 1.0)))
        except ValueError as error:
            raise DQError(f"tensor plan {text!r}: {error}") from None
        scale = rest[1] if len(rest) > 1 else "dynamic"
        if scale not in SCALES:
            raise DQError(f"tensor plan {text!r}: scale is {scale!r}, {nearest(scale, SCALES)}")
        if not abs(shift) < MOST_SHIFT or not 0 < clip <= 1 or len(rest) > 4:
            limits = "shift finite, clip above 0 and at most 1"
            raise DQError(f"tensor plan {text!r}: expected format/granularity/scale/shift/clip, {limits}")
        return cls(name, granularity, scale, shift, clip)

    def __str__(self) -> str:
        tail = [self.scale, f"{self.shift:g}", f"{self.clip:g}"]
        said = 3 if self.clip != 1 else 2 if self.shift else int(self.scale != "dynamic")
        return "/".join([self.format, self.granularity, *tail[:said]])

    @property
    def spec(self) -> formats.Format:
        return _spec(self.format)

    @property
    def grain(self) -> formats.Granularity:
        from dq import formats

        return formats.Granularity.parse(self.granularity)


def _known(form: str, granularity: str | None) -> tuple[str, str]:
    """Names of a format and of a granularity, by default the format's own. ValueError for those that do not exist."""
    from dq import formats
    from dq.formats.base import TWO_LEVEL

    spec = formats.get(form)
    grain = spec.granularity if granularity is None else formats.Granularity.parse(granularity)
    if spec.fixed and grain != spec.granularity:
        raise ValueError(f"granularity: got {grain}, expected {spec.granularity}, the only one of {spec.name}")
    if grain.two_level and not spec.most_multiplier:
        raise ValueError(f"granularity: got {grain} of {spec.name}, {TWO_LEVEL}")
    if (grain.size or 0) > MOST_GROUP:
        raise ValueError(f"granularity: got a group of more than {MOST_GROUP} values, expected for example group:64")
    return spec.name, str(grain)


@lru_cache(4096)
def _parsed(text: str, checked: bool) -> TensorPlan:
    return TensorPlan._parse(text, checked)


@cache
def _spec(name: str) -> formats.Format:
    from dq import formats

    return formats.get(name)
