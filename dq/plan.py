"""What each layer becomes: `LayerPlan` per layer, `Plan` per model, `Recipe` as the wish that leads to a plan.

A plan is JSON that a person can read, edit and diff. It names everything that loading and running need: layer names,
shapes, formats, the denoiser's timestep argument and the compute dtype. It holds no tensors. Reading one needs
no torch until it is asked what a format is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dq.disk import read_json
from dq.errors import DQError, naming, nearest
from dq.surroundings import Correction

if TYPE_CHECKING:
    import torch

    from dq import formats

PLAN_VERSION = 1
ATTENTION = ("", "int8")
STATUS = ("stable", "experimental")
SCALES = ("dynamic", "static", "table")
ROLES = ("time", "edge", "block")
KINDS = ("linear", "conv1d", "conv2d", "conv3d", "stack")
COMPUTE = ("float32", "bfloat16", "float16", "float64")
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


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.

    shape   of the full-precision weight: (out, in) linear, (out, in / groups, *kernel) conv, (experts, in, out) stack
    act     None keeps activations in the compute dtype (weight-only). Dynamic scales never cross batch entries: a
            convolution's `tensor` is one scale per sample, its `token` one per pixel (pointwise convolutions only)
    smooth  a vector multiplies the input (its inverse is folded into the weight)
    rotate  order of the Hadamard blocks that turn the (smoothed) input channels, 0 for none; folded into the weight
    permute  a stored order puts the (smoothed, rotated) input's channels in other places; folded into the weight, and
            splits are counted in it
    rank    columns of the low-rank branch y += up @ (down @ x)
    splits  input channels at which the input is cut; each part has its own activation and weight scales
    steps   rows of the activation scale table (1 unless act.scale is "table")
    role    where the layer stands: "time" (sees one token per sample: modulation, projections of the timestep), "edge"
            (embedder or final layer) or "block"
    start   the output for one first token that comes again in every call (a text's start token) is stored, exact
    """

    kind: str
    shape: tuple[int, ...]
    weight: TensorPlan
    act: TensorPlan | None = None
    smooth: bool = False
    rotate: int = 0
    permute: bool = False
    rank: int = 0
    splits: tuple[int, ...] = ()
    steps: int = 1
    start: bool = False
    role: str = "block"
    reason: str = ""

    @property
    def rows(self) -> int:
        """Rows of the weight as a matrix (rows, columns): output channels, times experts for a stack."""
        return self.shape[0] * self.shape[2] if self.kind == "stack" else self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix: input features (times kernel size for a convolution)."""
        return self.shape[1] if self.kind == "stack" else prod(self.shape[1:])

    @property
    def pointwise(self) -> bool:
        """Whether this is a convolution that looks at one pixel at a time."""
        return self.kind.startswith("conv") and prod(self.shape[2:]) == 1

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Column ranges [start, stop) of the weight matrix that have scales of their own (one unless split)."""
        taps = 1 if self.kind in ("linear", "stack") else prod(self.shape[2:])
        edges = [0, *(split * taps for split in self.splits), self.columns]
        return list(pairwise(edges))

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed weight, scales and low-rank branch (16-bit factors); bias not counted."""
        spec, grain = self.weight.spec, self.weight.grain
        widths = [stop - start for start, stop in self.parts]
        codes = [self.rows * spec.row_bytes(width) for width in (self.columns, *widths)]
        scales = sum(spec.packed_bytes(self.rows, width, grain) for width in widths) - sum(codes[1:])
        inputs = self.shape[1]
        vectors = 4 * inputs * (self.smooth + self.permute)
        return codes[0] + scales + 2 * self.rank * (self.rows + self.columns) + vectors

    def check(self, name: str) -> None:
        """Raise DQError, naming the layer, when the fields contradict each other."""
        if self.kind not in KINDS:
            raise DQError(f"layer {name!r}: kind is {self.kind!r}, {nearest(self.kind, KINDS)}")
        if self.role not in ROLES:
            raise DQError(f"layer {name!r}: role is {self.role!r}, {nearest(self.role, ROLES)}")
        inside = all(0 < split < self.shape[1] for split in self.splits)
        if not inside or list(self.splits) != sorted(set(self.splits)):
            raise DQError(f"layer {name!r}: splits {self.splits} must rise strictly inside its {self.shape[1]} inputs")
        if self.kind == "stack" and (self.act or self.smooth or self.rotate or self.rank or self.splits):
            raise DQError(f"layer {name!r}: stacked experts are weight-only; leave only their weight format")
        if self.rotate and any(split % self.rotate for split in (*self.splits, self.shape[1])):
            cuts = f"{self.shape[1]} inputs" + (f" split at {self.splits}" if self.splits else "")
            raise DQError(f"layer {name!r}: rotate is {self.rotate}, expected a divisor of its {cuts}")
        span = self.weight.spec.span
        if any((stop - first) % span for first, stop in self.parts):
            got = f"layer {name!r}: {self.weight.format} has a code for {span} weights of a row"
            raise DQError(f"{got}, expected parts of a multiple of {span} columns, got {self.parts}")
        if self.permute and self.act is None:
            raise DQError(f"layer {name!r}: permute is for rounded activations, this layer has none; leave it out")
        if self.start and self.kind != "linear":
            raise DQError(f"layer {name!r}: start is for linears, this is a {self.kind}; leave it out")
        if self.act and self.act.grain.two_level:
            got = f"layer {name!r}: activation granularity {self.act.granularity!r}"
            raise DQError(f"{got}, expected one level of scales; two are for weights")
        if self.act and self.act.spec.tabled:
            raise DQError(f"layer {name!r}: activation format {self.act.format!r}, expected one without stored tables")
        if self.act and self.act.clip != 1:
            from dq.formats.integer import Integer

            if self.kind != "linear" or self.act.scale != "dynamic" or not isinstance(self.act.spec, Integer):
                got = f"layer {name!r}: activation {self.act} of a {self.kind} covers {self.act.clip:g} of its range"
                raise DQError(f"{got}, expected all of it; less is for integers under dynamic scales in linears")
        if self.act and self.act.scale == "dynamic":
            fits = ("token", "group") if self.kind == "linear" else ("tensor", "token")[: 1 + self.pointwise]
            if self.act.grain.kind not in fits:
                got = f"layer {name!r}: dynamic activation granularity {self.act.granularity!r} of a {self.kind}"
                raise DQError(f"{got} with weight {self.shape}, expected {' or '.join(fits)}")

    def to_dict(self) -> dict:
        """JSON form; fields at their default are left out."""
        row: dict = {"kind": self.kind, "shape": list(self.shape), "weight": str(self.weight)}
        row.update({"act": str(self.act)} if self.act else {})
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name not in ("kind", "shape", "weight", "act") and value != item.default:
                row[item.name] = list(value) if isinstance(value, tuple) else value
        return row

    @classmethod
    def from_dict(cls, name: str, row: dict, checked: bool = True) -> LayerPlan:
        """Inverse of `to_dict`; whatever is wrong raises DQError naming the layer. `checked` as in `Plan`."""
        from dq import schema

        schema.check("layer", row, f"layer {name!r} of the plan")
        return cls._built(name, row, checked)

    @classmethod
    def _built(cls, name: str, row: dict, checked: bool) -> LayerPlan:
        values: dict[str, Any] = dict(row, shape=tuple(row["shape"]), splits=tuple(row.get("splits", ())))
        act = row.get("act")
        try:
            values["weight"] = TensorPlan.parse(row["weight"], checked)
            values["act"] = TensorPlan.parse(act, checked) if act else None
        except DQError as error:
            raise DQError(f"layer {name!r}: {error}") from None
        plan = cls(**values)
        if checked:
            plan.check(name)
        return plan


@dataclass
class Plan:
    """A plan for one model: layers to quantize, layers kept and why, and where the timestep comes in.

    timestep  name of the forward argument that carries the timestep, None if there is none
    edges     rising step-bucket edges in the model's own timestep units; empty when no layer has a table
    attention "int8": products of attention in bytes where a kernel has them; "": as exact as the compute dtype
    sampler   corrections of the scheduler's steps, at most one of a kind for a scheduler and number of steps
    """

    layers: dict[str, LayerPlan]
    kept: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    family: str = ""
    timestep: str | None = None
    edges: tuple[float, ...] = ()
    compute_dtype: str | None = None
    attention: str = ""
    sampler: tuple[Correction, ...] = ()
    needs_calibration: ClassVar[bool] = False  # as of a Recipe: every layer is decided

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype as torch knows it, fp32 without one. DQError for a name that is none."""
        return compute_dtype(self.compute_dtype)

    def to_dict(self) -> dict:
        return {
            "version": PLAN_VERSION,
            "recipe": self.recipe,
            "family": self.family,
            "compute_dtype": self.compute_dtype,
            "timestep": self.timestep,
            "edges": list(self.edges),
            **({"attention": self.attention} if self.attention else {}),
            **({"sampler": [each.to_dict() for each in self.sampler]} if self.sampler else {}),
            "layers": {name: plan.to_dict() for name, plan in self.layers.items()},
            "kept": dict(self.kept),
        }

    @classmethod
    def from_dict(cls, data: dict, checked: bool = True, what: str = "plan") -> Plan:
        """Inverse of `to_dict`. DQError, beginning with `what`, for plans of a newer version and whatever is wrong.

        Without `checked` nobody asks whether the formats exist and fit their layers, which needs torch: a plan to be
        shown, not to be loaded by.
        """
        from dq import schema

        if not isinstance(data, dict):
            raise DQError(f"{what} is a {type(data).__name__}, expected a JSON object")
        version = data.get("version")
        if type(version) is not int or not 1 <= version <= PLAN_VERSION:
            newer = type(version) is int and version > PLAN_VERSION
            advice = "it was written by a newer dq, upgrade with `pip install -U dq-diffusion`" if newer else _ANEW
            raise DQError(f"{what} version: got {schema.shown(version)}, expected at most {PLAN_VERSION}; {advice}")
        values: dict[str, Any] = {key: value for key, value in data.items() if key != "version"}
        schema.check("plan", values, what)
        values["layers"] = {name: LayerPlan._built(name, row, checked) for name, row in data["layers"].items()}
        values["edges"] = tuple(data.get("edges", ()))
        values["sampler"] = tuple(Correction.from_dict(each) for each in data.get("sampler", ()))
        plan = cls(**values)
        plan.check()
        return plan

    def check(self) -> None:
        """DQError when layers and step buckets contradict each other."""
        if self.edges and not all(low < high for low, high in pairwise(self.edges)):
            raise DQError(f"plan: edges {list(self.edges[:4])} ... must rise; {_ANEW}")
        keys = [(each.kind, each.scheduler, each.steps) for each in self.sampler]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            kind, scheduler, steps = twice
            raise DQError(f"plan: sampler has {kind!r} for {scheduler} in {steps} steps twice; leave one out")
        for name, layer in self.layers.items():
            wanted = len(self.edges) + 1 if layer.act is not None and layer.act.scale == "table" else 1
            if layer.steps != wanted:
                got = f"layer {name!r}: steps is {layer.steps}, its activation {layer.act}, the plan has"
                raise DQError(f"{got} {len(self.edges)} edges; expected steps to be {wanted}")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan JSON; DQError says what is wrong with the file."""
        with naming(path):
            return cls.from_dict(read_json(path))


@dataclass(frozen=True)
class Recipe:
    """A wish, before it meets a model: which formats for which kind of layer.

    linear, conv       (weight, activation or None) for layers inside blocks
    modulation         weight of linears that see one token per sample (adaLN, time projections); weight-only
    edge               weight of embedders and final layers that are too big to keep; weight-only
    keep               anchored regular expressions of layers left in full precision, added to the family's
    attention          as in Plan
    sampler            file of dq/around that finds corrections of the scheduler's steps, "" for none
    method             file of dq/methods that fits the layers to calibration data, "" for none
    options            arguments of the method
    status             "experimental": emulated, or without rows of results; docs/recipes.md has the rule. A fact about
                       dq and not part of the wish: neither saved nor compared
    """

    name: str
    linear: tuple[str, str | None]
    conv: tuple[str, str | None]
    modulation: str = "int8/channel"
    edge: str = "int8/channel"
    keep: tuple[str, ...] = ()
    attention: str = ""
    sampler: str = ""
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    status: str = field(default="stable", compare=False)

    @property
    def needs_calibration(self) -> bool:
        return bool(self.method or self.sampler)

    def to_dict(self) -> dict:
        """JSON form, without the status."""
        wish = {key: value for key, value in vars(self).items() if key != "status" and (value or key != "sampler")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in wish.items()}

    @classmethod
    def from_dict(cls, data: dict) -> Recipe:
        """Inverse of `to_dict`. DQError for unknown fields, wrong types and formats that do not exist."""
        from dq import schema

        name = data.get("name") if isinstance(data, dict) else None
        schema.check("recipe", data, "recipe" if name is None else f"recipe {schema.shown(name)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        recipe = cls(**values)
        for text in (*recipe.linear, *recipe.conv, recipe.modulation, recipe.edge):
            if text is not None:
                TensorPlan.parse(text)
        return recipe


@dataclass(frozen=True)
class Keeping:
    """A wish to keep the codes that a file or another library has of layers, and to round no weight.

    act  what activations of layers in blocks are rounded to, None to leave them in floating point
    """

    name: str
    act: str | None = None
    keep: tuple[str, ...] = ()
    needs_calibration: ClassVar[bool] = False


def compute_dtype(name: str | None) -> torch.dtype:
    """The torch dtype of a name of COMPUTE, fp32 for None. DQError for any other name."""
    import torch

    if name is not None and name not in COMPUTE:
        raise DQError(f"compute dtype is {str(name)[:100]!r}, {nearest(str(name)[:100], COMPUTE)}")
    return getattr(torch, name or "float32")


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


_ANEW = "write it or make the plan anew"


@lru_cache(4096)
def _parsed(text: str, checked: bool) -> TensorPlan:
    return TensorPlan._parse(text, checked)


@cache
def _spec(name: str) -> formats.Format:
    from dq import formats

    return formats.get(name)
