"""What each layer becomes: `LayerPlan` per layer, `Plan` per model, `Recipe` as the wish that leads to a plan.

A plan is JSON that a person can read, edit and diff. It names everything that loading and running need: layer names,
shapes, formats, the denoiser's timestep argument and the compute dtype. It holds no tensors. Reading one needs
no torch until it is asked what a format is.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dq.attentionplan import WISHES, AttentionPlan
from dq.disk import read_json
from dq.errors import DQError, naming, nearest
from dq.surroundings import Correction
from dq.tensorplan import TensorPlan as TensorPlan

if TYPE_CHECKING:
    import torch

PLAN_VERSION = 1
ATTENTION = ("", *WISHES)
STATUS = ("stable", "experimental")
ROLES = ("time", "edge", "block")
KINDS = ("linear", "conv1d", "conv2d", "conv3d", "stack")
COMPUTE = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.

    shape   of the full-precision weight: (out, in) linear, (out, in / groups, *kernel) conv, (experts, in, out) stack
    act     None keeps activations in the compute dtype (weight-only). Dynamic scales never cross batch entries: a
            convolution's `tensor` is one scale per sample, its `token` one per pixel (pointwise convolutions only)
    smooth  a vector multiplies the input (its inverse is folded into the weight)
    rotate  order of the Hadamard blocks that turn the (smoothed) input channels, 0 for none; folded into the weight
    permute a stored order of the (smoothed, rotated) input's channels, folded into the weight; splits count in it
    rank    columns of the low-rank branch y += up @ (down @ x)
    splits  input channels at which the input is cut; each part has its own activation and weight scales
    steps   rows of the activation scale table (1 unless act.scale is "table")
    role    where the layer stands: "time" (sees one token per sample: modulation, projections of the timestep), "edge"
            (embedder or final layer) or "block"
    start   the output for one first token that comes again in every call (a text's start token) is stored, exact
    late    activation formats of the later phases of a run, one for each switch; under a plan's `route` one, by a rule
    route   (slope, offset) of it: relative error that `act` makes at the output, by the block's last relative change
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
    late: tuple[TensorPlan, ...] = ()
    route: tuple[float, ...] = ()
    role: str = "block"
    reason: str = ""

    @property
    def phases(self) -> list[LayerPlan]:
        """What the layer is in each phase of a run, without later ones; one where nothing switches."""
        if not self.late:
            return [self]
        return [replace(self, act=act, late=(), route=()) for act in (self.act, *self.late)]

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
        if self.late and self.act is None:
            raise DQError(f"layer {name!r}: late is for rounded activations, this layer has none; leave it out")
        if self.route and (len(self.route), len(self.late)) != (2, 1):
            got = f"layer {name!r}: route {list(self.route[:4])} with {len(self.late)} late formats"
            raise DQError(f"{got}, expected a slope and an offset, and the one format that they decide on")
        stored = next((act for act in (self.act, *self.late) if act and act.scale != "dynamic"), None)
        if self.late and stored:
            got = f"layer {name!r}: activation {stored} in one phase of several"
            raise DQError(f"{got}, expected dynamic scales; stored ones are for one format in all steps")
        for act in (self.act, *self.late):
            if act is not None:
                self._check_act(name, act)

    def _check_act(self, name: str, act: TensorPlan) -> None:
        if act.grain.two_level:
            got = f"layer {name!r}: activation granularity {act.granularity!r}"
            raise DQError(f"{got}, expected one level of scales; two are for weights")
        if act.spec.tabled:
            raise DQError(f"layer {name!r}: activation format {act.format!r}, expected one without stored tables")
        if act.clip != 1:
            from dq.formats.integer import Integer

            if self.kind != "linear" or act.scale != "dynamic" or not isinstance(act.spec, Integer):
                got = f"layer {name!r}: activation {act} of a {self.kind} covers {act.clip:g} of its range"
                raise DQError(f"{got}, expected all of it; less is for integers under dynamic scales in linears")
        if act.scale == "dynamic":
            fits = ("token", "group") if self.kind == "linear" else ("tensor", "token")[: 1 + self.pointwise]
            if act.grain.kind not in fits:
                got = f"layer {name!r}: dynamic activation granularity {act.granularity!r} of a {self.kind}"
                raise DQError(f"{got} with weight {self.shape}, expected {' or '.join(fits)}")

    def to_dict(self) -> dict:
        """JSON form; fields at their default are left out."""
        row: dict = {"kind": self.kind, "shape": list(self.shape), "weight": str(self.weight)}
        row.update({"act": str(self.act)} if self.act else {})
        row.update({"late": [str(act) for act in self.late]} if self.late else {})
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name not in ("kind", "shape", "weight", "act", "late") and value != item.default:
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
        values["route"] = tuple(row.get("route", ()))
        act = row.get("act")
        try:
            values["weight"] = TensorPlan.parse(row["weight"], checked)
            values["act"] = TensorPlan.parse(act, checked) if act else None
            values["late"] = tuple(TensorPlan.parse(text, checked) for text in row.get("late", ()))
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
    switch    timesteps, in the model's own units and in the order of a run, at each of which the next phase begins: of
              333.5 all steps with t < 333.5 are late; empty when no layer has late formats
    rising    timesteps rise along a run: of a switch 0.7 all steps with t >= 0.7 are late
    attention what attention is rounded to, by module; of those not named, nothing
    sampler   corrections of the scheduler's steps, at most one of a kind for a scheduler and number of steps
    cache     `kind:value` of dq/sampler/caches: what of a step serves the next ones, "" for nothing
    route     error from which on a layer's rule takes its late format, None where nothing is decided while it runs
    """

    layers: dict[str, LayerPlan]
    kept: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    family: str = ""
    timestep: str | None = None
    edges: tuple[float, ...] = ()
    compute_dtype: str | None = None
    attention: dict[str, AttentionPlan] = field(default_factory=dict)
    sampler: tuple[Correction, ...] = ()
    switch: tuple[float, ...] = ()
    rising: bool = False
    cache: str = ""
    route: float | None = None
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
            **({"attention": {k: each.to_dict() for k, each in self.attention.items()}} if self.attention else {}),
            **({"cache": self.cache} if self.cache else {}),
            **({"sampler": [each.to_dict() for each in self.sampler]} if self.sampler else {}),
            **({"switch": list(self.switch)} if self.switch else {}),
            **({"rising": True} if self.rising else {}),
            **({} if self.route is None else {"route": self.route}),
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
        values |= {key: tuple(data.get(key, ())) for key in ("edges", "switch")}
        values["attention"] = {name: AttentionPlan(**row) for name, row in data.get("attention", {}).items()}
        values["sampler"] = tuple(Correction.from_dict(each) for each in data.get("sampler", ()))
        plan = cls(**values)
        plan.check()
        for name, each in plan.attention.items() if checked else ():
            each.check(name)
        return plan

    def check(self) -> None:
        """DQError when layers, step buckets and switches contradict each other."""
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
        self._check_switch()

    def _check_switch(self) -> None:
        order = self.switch if self.rising else self.switch[::-1]
        if not all(0 < low < high for low, high in pairwise((*order, math.inf))):
            got = f"plan: switch {list(self.switch[:4])} is outside of a schedule whose timesteps "
            raise DQError(f"{got}{'rise' if self.rising else 'fall'}: expected values above 0 in that order")
        late = {name: layer for name, layer in self.layers.items() if layer.late}
        if self.switch and not late:
            raise DQError(f"plan: switch {list(self.switch[:4])}, but no layer has late formats; leave it out")
        if self.route is not None and self.switch:
            got = f"plan: switch {list(self.switch[:4])} and route {self.route:g}"
            raise DQError(f"{got}, expected one of them; leave one out")
        for name, layer in late.items():
            if bool(layer.route) != (self.route is not None):
                said = "no route" if self.route is None else f"route {self.route:g}"
                raise DQError(f"layer {name!r}: route {list(layer.route[:4])}, the plan has {said}; {_ANEW}")
            if self.route is None and len(layer.late) != len(self.switch):
                got = f"layer {name!r}: late has {len(layer.late)} formats, the plan {len(self.switch)} switches"
                raise DQError(f"{got}; expected one format for each")
        if late and self.timestep is None:
            raise DQError(
                f"layer {next(iter(late))!r}: late needs the plan's timestep, the forward argument to switch by"
            )

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
    attention          one of ATTENTION: what attention is rounded to, "" for nothing
    cache              as in Plan
    sampler            file of dq/around that finds corrections of the scheduler's steps, "" for none
    late               activation formats of linears that round activations, for later phases of a run
    switch             shares of a run's steps, rising, after which each of them begins
    route              mean bits of activations under a rule that takes late formats after a block changed much, or 0
    method             file of dq/methods that fits the layers to calibration data, "" for none
    options            arguments of the method
    status             "experimental": emulated, or without rows (docs/recipes.md); neither saved nor compared
    """

    name: str
    linear: tuple[str, str | None]
    conv: tuple[str, str | None]
    modulation: str = "int8/channel"
    edge: str = "int8/channel"
    keep: tuple[str, ...] = ()
    attention: str = ""
    cache: str = ""
    sampler: str = ""
    late: tuple[str, ...] = ()
    switch: tuple[float, ...] = ()
    route: float = 0.0
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    status: str = field(default="stable", compare=False)

    @property
    def needs_calibration(self) -> bool:
        return bool(self.method or self.sampler)

    def to_dict(self) -> dict:
        """JSON form, without the status."""
        left = {"status", *(key for key in ("sampler", "cache", "route") if not getattr(self, key))}
        wish = {key: value for key, value in vars(self).items() if key not in left}
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
        for text in (*recipe.linear, *recipe.conv, recipe.modulation, recipe.edge, *recipe.late):
            if text is not None:
                TensorPlan.parse(text)
        recipe.check()
        return recipe

    def check(self) -> None:
        """DQError when late formats and what they need contradict each other."""
        shares = (0.0, *self.switch, 1.0)
        if not all(low < high for low, high in pairwise(shares)):
            got = f"recipe {self.name!r}: switch {list(self.switch[:4])} is outside of the schedule"
            raise DQError(f"{got}, expected rising shares of the steps between 0 and 1")
        if self.route:
            return self._check_route()
        if len(self.late) != len(self.switch):
            got = f"recipe {self.name!r}: {len(self.late)} late formats, {len(self.switch)} switches"
            raise DQError(f"{got}; expected one format for each")
        if self.late and not self.method:
            raise DQError(f"recipe {self.name!r}: late formats need a schedule to be calibrated on; name a method")
        if self.late and self.linear[1] is None:
            raise DQError(
                f"recipe {self.name!r}: late is for rounded activations, its linears have none; leave it out"
            )

    def _check_route(self) -> None:
        if self.switch or len(self.late) != 1 or not self.method:
            got = f"recipe {self.name!r}: route with {len(self.late)} late formats, {len(self.switch)} switches"
            raise DQError(f"{got} and method {self.method!r}; expected one format, no switch, and a method")
        first = self.linear[1]
        low, high = (0 if text is None else TensorPlan.parse(text).spec.bits for text in (first, self.late[0]))
        if not 0 < low <= self.route <= high:
            got = f"recipe {self.name!r}: route is {self.route:g} bits, inputs of linears are {first or 'not rounded'}"
            raise DQError(f"{got}, or {self.late[0]} by the rule; expected a mean between the bits of two formats")


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


_ANEW = "write it or make the plan anew"
