"""Planning: a wish (Recipe), a model and its family become a Plan.

Layers inside blocks get the recipe's formats. Linears that see one token per sample are weight-only: quantizing their
activations saves nothing and costs the most. Embedders and final layers are kept, smallest first, as long as all kept
ones together stay under KEPT_SHARE of the weights; larger ones are weight-only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod

from torch import nn

from dq import families
from dq.attentionplan import WISHES
from dq.errors import DQError, nearest
from dq.families import Family, generic, readers
from dq.layers import PLAIN, attending, forward_replaced, kind_of, naming
from dq.plan import Keeping, LayerPlan, Plan, Recipe, TensorPlan

KEPT_SHARE = 0.04  # most of the weights that may stay in full precision at the edges of the model
# linears over patches of pictures
PIXELS = r"(.*\.)?\w*(patch|vision|pixel)_?(emb|proj)\w*(\.(linear|proj|projection|\d+))?$"
FEWEST_COLUMNS = 16  # a row shorter than this gains little from 8 bits next to its own scale


@dataclass(frozen=True)
class _Weight:
    """One weight dq can quantize, as planning sees it. shape as in LayerPlan."""

    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    pixelwise: bool = False  # a convolution that maps each pixel by itself: kernel and stride 1, no padding

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[1] if self.kind == "stack" else prod(self.shape[1:])


def make_plan(model: nn.Module, recipe: Recipe, keep: Sequence[str] = ()) -> Plan:
    """Plan a data-free recipe for a model, which may be on the meta device.

    keep  patterns matched from the start of layer names: left in full precision
    Raises DQError when a pattern matches no layer, or the model has no layer dq can quantize.
    """
    recipe.check()
    family = families.of(model)
    weights = dict(_weights(model))
    if not weights:
        raise DQError(f"{type(model).__name__} has no linear, convolution or expert weights; pass a denoiser")
    kept = _replaced(model) | _match_keeps(weights, (*recipe.keep, *keep)) | _unpackable(model, weights)
    roles = {name: _role(family, name) for name in weights if name not in kept}
    kept |= _keep_edges(weights, roles)
    layers = {}
    for name in weights:
        if name not in kept:
            decided = _layer_plan(recipe, roles[name], weights[name])
            (kept if isinstance(decided, str) else layers)[name] = decided
    wish = WISHES.get(recipe.attention)
    rounded = {} if wish is None else attending.planned(model, wish.choices[0])
    return Plan(layers, kept, recipe.name, family.name, family.timestep, attention=rounded, cache=recipe.cache)


def keeping_plan(model: nn.Module, recipe: Keeping, found: Mapping[str, LayerPlan], keep: Sequence[str] = ()) -> Plan:
    """Plan a model whose layers keep the codes that a file or another library has of them.

    found  the plan under which each layer's codes are dq's; of layers in blocks activations are rounded as the recipe
           says, all others stay in floating point
    """
    family, weights = families.of(model), dict(_weights(model))
    kept = _replaced(model) | _match_keeps(weights, (*recipe.keep, *keep)) | _unpackable(model, weights)
    act = None if recipe.act is None else TensorPlan.parse(recipe.act)
    layers = {}
    for name, weight in weights.items():
        if name in kept:
            continue
        if name not in found or weight.kind != found[name].kind:
            kept[name] = "no codes of it that dq has a format for"
            continue
        role = _role(family, name)
        rounded = act if role == "block" and found[name].act is None else found[name].act
        stands = {"modulation": "time", "time": "time", "edge": "edge"}.get(role, "block")
        layers[name] = replace(found[name], shape=weight.shape, act=rounded, role=stands)
    return Plan(layers, kept, recipe.name, family.name, family.timestep)


def _replaced(model: nn.Module) -> dict[str, str]:
    """Layers that somebody made run by another forward, which a packed layer would not."""
    reason = "its forward was replaced on this model"
    plain = tuple(PLAIN.values())
    return {n: reason for n, layer in naming.named(model) if isinstance(layer, plain) and forward_replaced(layer)}


def _weights(model: nn.Module) -> Iterator[tuple[str, _Weight]]:
    """Name and description of every weight dq can quantize, in model order; stacks by their Parameter's name."""
    for name, module in naming.named(model):
        kind = kind_of(module)
        if kind is not None:
            groups, pixelwise = getattr(module, "groups", 1), kind != "linear" and _is_pixelwise(module)
            yield name, _Weight(kind, tuple(module.weight.shape), groups, pixelwise)
        elif "Expert" in type(module).__name__:
            for key, value in module.named_parameters(recurse=False):
                if value.dim() == 3 and value.is_floating_point():
                    yield f"{name}.{key}".lstrip("."), _Weight("stack", tuple(value.shape))


def _unpackable(model: nn.Module, weights: dict[str, _Weight]) -> dict[str, str]:
    """Layers that are kept because of what stands around them, with the reason."""
    read, tied, first = readers.read_directly(model), _tied(model), _first(model)
    kept = dict.fromkeys(_computed(model), "its weight is computed from other tensors")
    for name, weight in weights.items():
        module = None if weight.kind == "stack" else naming.at(model, name)
        if name in tied:
            kept[name] = f"its weight is also that of {tied[name]!r}"
        elif name in read:
            kept[name] = "its weight is read without calling it"
        elif name in first:
            kept[name] = "a model's dtype is read off its first parameter"
        elif module is not None and _takes_pixels(name, module):
            kept[name] = "embedding of pixels"
    return kept


def _first(model: nn.Module) -> set[str]:
    """Layers that hold the first parameter of the model, or of a model in it, and no bias of the compute dtype."""
    found = set()
    for name, part in naming.named(model):
        if part is model or hasattr(type(part), "dtype"):
            own = next(((key, layer) for key, layer in naming.named(part) if _holds(layer)), None)
            if own is not None and getattr(own[1], "bias", None) is None:
                found.add(".".join(filter(None, (name, own[0]))))
    return found


def _holds(layer: nn.Module) -> bool:
    return any(value is not None for value in layer._parameters.values())


def _computed(model: nn.Module) -> list[str]:
    """Linears and convolutions without a weight of their own: of weight_norm, spectral_norm and parametrizations."""
    kinds = tuple(PLAIN.values())
    return [name for name, part in naming.named(model) if isinstance(part, kinds) and "weight" not in part._parameters]


def _tied(model: nn.Module) -> dict[str, str]:
    """Modules whose weight is that of another one, with the other's name; transformers ties only after loading."""
    owners: dict[int, list[str]] = {}
    for name, module in naming.named(model):
        for value in module._parameters.values():
            if value is not None and name not in owners.setdefault(id(value), []):
                owners[id(value)].append(name)
    found = {name: names[name == names[0]] for names in owners.values() if len(names) > 1 for name in names}
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        target, source = (key.removesuffix(".weight") for key in pair)
        found |= {target: source, source: target}
    return found


def _takes_pixels(name: str, module: nn.Module) -> bool:
    """A convolution over three channels, or a linear over patches of 3 t p p values that is named an embedding."""
    if not isinstance(module, nn.Linear):
        return module.in_channels == 3  # pyright: ignore[reportReturnType]
    frames = (module.in_features / 3 / count for count in (1, 2) if module.in_features % (3 * count) == 0)
    return re.match(PIXELS, name) is not None and any(isqrt(int(size)) ** 2 == size for size in frames)


def _any_match(patterns: Sequence[str], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _match_keeps(found: dict, patterns: Sequence[str]) -> dict[str, str]:
    kept = {}
    for pattern in patterns:
        try:
            hits = [name for name in found if re.match(pattern, name)]
        except re.error as error:
            raise DQError(f"keep pattern {pattern!r} is not a regular expression: {error}") from None
        if not hits:
            raise DQError(f"keep pattern {pattern!r} matches no layer (from its start), {nearest(pattern, found)}")
        kept |= dict.fromkeys(hits, f"kept by pattern {pattern!r}")
    return kept


def _role(family: Family, name: str) -> str:
    """What a layer is: "keep", "time", "modulation", "weight_only", "edge" or "block"."""
    if _any_match((*family.keep, *generic.KEEP), name):
        return "keep"
    inside = any(name.startswith(f"{block}.") or name == block for block in family.blocks)
    if not inside and _any_match(generic.TIME_EMBEDDER, name):
        return "time"
    if _any_match((*family.modulation, *generic.MODULATION), name):
        return "modulation"
    if _any_match(family.weight_only, name):
        return "weight_only"
    return "block" if inside else "edge"


def _keep_edges(weights: dict[str, _Weight], roles: dict[str, str]) -> dict[str, str]:
    """Layers kept for their role: routing, time embedders, and the smallest edges within KEPT_SHARE of all weights."""
    reasons = {"keep": "routing, or named by the family", "time": "timestep embedder"}
    kept = {name: reasons[role] for name, role in roles.items() if role in reasons}
    room = KEPT_SHARE * sum(weight.elements for weight in weights.values())
    edges = [name for name, role in roles.items() if role == "edge"]
    for name in sorted(edges, key=lambda name: weights[name].elements):
        room -= weights[name].elements
        if room < 0:
            break
        kept[name] = "embedder or final layer"
    return kept


def _layer_plan(recipe: Recipe, role: str, weight: _Weight) -> LayerPlan | str:
    """The LayerPlan of one layer, or the reason why it stays in full precision."""

    def only(text: str, reason: str, stands: str = "block") -> LayerPlan:
        form = TensorPlan.parse(text)
        return LayerPlan(weight.kind, weight.shape, form, role=stands, reason=f"{reason}: weight-only")

    if weight.groups > 1:
        return only(recipe.edge, "grouped convolution")
    if weight.columns < FEWEST_COLUMNS:
        return f"rows of {weight.columns} weights are too short to gain from quantization"
    if weight.kind == "stack":
        return only(recipe.linear[0], "stacked experts")
    if role == "modulation" and weight.kind == "linear":
        return only(recipe.modulation, "one token per sample", "time")
    if role == "edge":
        return only(recipe.edge, "large embedder or final layer", "edge")
    form, act = recipe.linear if weight.kind == "linear" else recipe.conv
    if role == "weight_only" and act:
        return only(form, "sensitive activations, named by the family")
    plan = LayerPlan(weight.kind, weight.shape, TensorPlan.parse(form), TensorPlan.parse(act) if act else None)
    return _per_pixel(plan) if weight.pixelwise and act else plan


def _is_pixelwise(module: nn.Module) -> bool:
    sizes = (*module.kernel_size, *module.stride, module.groups)
    return all(size == 1 for size in sizes) and not any(module._reversed_padding_repeated_twice)


def _per_pixel(plan: LayerPlan) -> LayerPlan:
    """A pointwise convolution is a linear over channels: one activation scale per pixel instead of one per sample."""
    return replace(plan, act=replace(plan.act, granularity="token"))
