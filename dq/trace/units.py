"""Which pieces of a model are fitted one after another, in which order they run, and which outputs feed which inputs.

One real run of the model counts how often every block and layer is called. A second run, with every unit replaced by a
stub that returns zeros, follows where the stubs' outputs flow: each tensor carries the set of units it was made from,
through every operation between the units. Both look at calls with unlike arguments separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dq.families import Family
from dq.layers import kind_of, naming
from dq.plan import Plan
from dq.trace.classes import storable
from dq.trace.seen import Unit


@storable("hollow")
class Hollow(NamedTuple):
    """What a tensor looked like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Hollow:
        return cls(tuple(tensor.shape), tensor.dtype, str(tensor.device))

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@storable("laid")
class Laid(NamedTuple):
    """A tensor whose dimensions lie in another order in memory, turned to lie in line: sums must run as they did."""

    value: torch.Tensor
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> torch.Tensor | Laid:
        order = tuple(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim)))
        in_line = tensor.is_contiguous() or order == tuple(range(tensor.dim()))
        return tensor if in_line else cls(tensor.permute(order), order)

    def restored(self) -> torch.Tensor:
        return self.value.permute([self.order.index(dim) for dim in range(len(self.order))])


def map_tree(tree: Any, change: Callable, leaf: type = torch.Tensor) -> Any:
    """The same nested tuples, lists, dicts and model outputs with every `leaf` in them changed."""
    if isinstance(tree, leaf):
        return change(tree)
    if isinstance(tree, dict):
        values = {key: map_tree(value, change, leaf) for key, value in tree.items()}
        return values if type(tree) is dict else type(tree)(**values)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(value, change, leaf) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_tree(value, change, leaf) for value in tree)
    return tree


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Every tensor of a tree, in order."""
    found: list[torch.Tensor] = []
    map_tree(tree, lambda tensor: found.append(tensor) or tensor)
    return found


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Run modules by other functions for a while; hooks stay, and so does a forward that offloading had put there."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@dataclass
class Layout:
    """The units of a model in execution order.

    unfit    layers that no unit can hold, and why
    outputs  per unit: its output with every tensor as a Hollow, as in the first call that reached it
    feeds    per unit: indices of the earlier units whose outputs its inputs are made from
    ends     likewise for the model's output
    """

    units: list[Unit]
    unfit: dict[str, str]
    outputs: list[Any] = field(default_factory=list)
    feeds: list[frozenset[int]] = field(default_factory=list)
    ends: frozenset[int] = frozenset()

    def last_use(self, index: int) -> int:
        """The last unit whose inputs need the output of unit `index`; the number of units if the model's end does."""
        if index in self.ends:
            return len(self.units)
        return max((later for later, sources in enumerate(self.feeds) if index in sources), default=index)


@torch.no_grad()
def find(model: nn.Module, plan: Plan, family: Family, calls: Sequence[tuple[tuple, dict]]) -> Layout:
    """Lay out the units of a model by running it on some calls (args, kwargs), one of every kind."""
    blocks = list(candidates(model, family))
    named = {*blocks, *(name for name, layer in plan.layers.items() if layer.kind != "stack")}
    runs = [_count(model, named, call) for call in calls]
    units, unfit = _choose(model, plan, blocks, runs)
    outputs = [next(run.outputs[unit.name] for run in runs if unit.name in run.outputs) for unit in units]
    layout = Layout(units, unfit, outputs, [frozenset()] * len(units))
    for call in calls:
        feeds, ends = _flow(model, units, outputs, call)
        layout.feeds = [old | new for old, new in zip(layout.feeds, feeds, strict=True)]
        layout.ends |= ends
    return layout


def candidates(model: nn.Module, family: Family) -> Iterator[str]:
    """Names of the blocks a model is made of; a U-Net's down block falls into ResNet and transformer blocks."""
    taken: list[str] = []
    for name in family.blocks:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        for block in _expand(name, module):
            if not any(block == other or block.startswith(f"{other}.") for other in taken):
                taken.append(block)
                yield block


def _expand(name: str, module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        if _layers_in(module) >= 2 * len(module):
            for key, child in module.named_children():
                yield from _expand(f"{name}.{key}", child)
        return
    inner = list(_block_lists(name, module))
    if inner and 2 * sum(_layers_in(part) for _, part in inner) > _layers_in(module):
        for key, part in inner:
            yield from _expand(key, part)
    elif _layers_in(module):
        yield name


def _block_lists(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost lists of blocks inside a module; experts are no blocks, they share the tokens between them."""
    for key, child in module.named_children():
        path = f"{name}.{key}"
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            if "expert" not in key and len(child) and _layers_in(child) >= 2 * len(child):
                yield path, child
        else:
            yield from _block_lists(path, child)


def _layers_in(module: nn.Module) -> int:
    return sum(kind_of(layer) is not None for _, layer in naming.named(module))


def kind(value: Any) -> Any:
    """Equal for calls that take the same way through a model: same arguments given, same structure, same flags."""
    if isinstance(value, torch.Tensor):
        return value.dim()
    if isinstance(value, dict):
        return {key: kind(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [kind(part) for part in value]
    return value if value is None or isinstance(value, bool | str) else type(value).__name__


@dataclass
class _Run:
    """Names in the order of their (first) call, how often each was called, and what the outputs looked like."""

    counts: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


def _count(model: nn.Module, named: set[str], call: tuple[tuple, dict]) -> _Run:
    found = _Run()

    def counting(name: str, module: nn.Module) -> Callable:
        forward = module.forward

        def counted(*args, **kwargs):
            found.counts[name] = found.counts.get(name, 0) + 1
            output = forward(*args, **kwargs)
            found.outputs.setdefault(name, map_tree(output, Hollow.of))
            return output

        return counted

    modules = {naming.at(model, name): name for name in sorted(named)}
    with replaced({module: counting(name, module) for module, name in modules.items()}):
        model(*call[0], **call[1])
    return found


def _owner(name: str, blocks: Iterable[str]) -> str | None:
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)


def _choose(model: nn.Module, plan: Plan, blocks: list[str], runs: list[_Run]) -> tuple[list[Unit], dict[str, str]]:
    """Blocks called once, and layers outside of them called once, in execution order; the rest with the reason."""
    units = {name: Unit(name, model.get_submodule(name)) for name in blocks if _most(runs, name) == 1}
    order = _order(runs)
    unfit: dict[str, str] = {}
    for name in sorted(plan.layers, key=lambda name: order.get(name, len(order))):
        most = _most(runs, name)
        owner = _owner(name, units)
        if plan.layers[name].kind == "stack":
            unfit[name] = "stacked experts are rounded without calibration"
        elif owner is not None:
            units[owner].layers[name] = plan.layers[name]
        elif most == 1:
            units[name] = Unit(name, naming.at(model, name), {name: plan.layers[name]})
        else:
            unfit[name] = f"called {most} times per model call" if most else "never called"
    return sorted(units.values(), key=lambda unit: order[unit.name]), unfit


def _most(runs: list[_Run], name: str) -> int:
    return max(run.counts.get(name, 0) for run in runs)


def _order(runs: list[_Run]) -> dict[str, int]:
    """Rank of every called name. A name that the first run did not call stands behind the one called before it."""
    names: list[str] = []
    for run in runs:
        place = 0
        for name in run.counts:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    return {name: rank for rank, name in enumerate(names)}


def _flow(
    model: nn.Module, units: list[Unit], outputs: list[Any], call: tuple[tuple, dict]
) -> tuple[list[frozenset[int]], frozenset[int]]:
    """-> (per unit: the units its inputs are made from; the same for the model's output), for one call."""
    feeds = [frozenset()] * len(units)
    marks = _Marks()

    def stub(index: int) -> Callable:
        def forward(*args, **kwargs):
            feeds[index] |= marks.on((args, kwargs))
            output = map_tree(outputs[index], Hollow.zeros, Hollow)
            marks.put(output, frozenset({index}))
            return output

        return forward

    try:
        with replaced({unit.module: stub(index) for index, unit in enumerate(units)}), marks:
            ends = marks.on(model(*call[0], **call[1]))
    except Exception:  # zeros led the model astray: anything may feed anything
        return [frozenset(range(index)) for index in range(len(units))], frozenset(range(len(units)))
    return feeds, ends


class _Marks(TorchDispatchMode):
    """Follows marked tensors through every operation: what is made from a marked tensor is marked alike.

    Marks sit on storages, so that views and writing in place are followed as well. Once a marked value has been read
    into Python, it may decide anything: from then on everything is marked with it.
    """

    def __init__(self):
        super().__init__()
        self.marks: dict[int, frozenset[int]] = {}
        self.alive: list[torch.Tensor] = []  # a marked storage must not be freed: its address would be used again
        self.everywhere: frozenset[int] = frozenset()

    def on(self, tree: Any) -> frozenset[int]:
        found = [self.marks.get(tensor.untyped_storage()._cdata, frozenset()) for tensor in tensors_in(tree)]
        return self.everywhere.union(*found)

    def put(self, tree: Any, marks: frozenset[int]) -> bool:
        tensors = tensors_in(tree)
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self.marks[key] = self.marks.get(key, frozenset()) | marks
            self.alive.append(tensor)
        return bool(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        marks = self.on((args, kwargs))
        if marks and not self.put(output, marks):  # writing in place gives the tensor written to
            self.everywhere |= marks
        return output
