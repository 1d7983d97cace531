"""Mixed precision under a budget: sensitivity and cost are measured once, then every budget is one integer program.

    minimise sum over layers of E[layer, choice]   under bytes, ms and mean bits

What was measured is a JSON (`Search.to_dict`): it can be kept, looked at (`dq.charts`) and solved again for other
budgets. The plan that comes out is an ordinary plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch

from dq.budget import allocate
from dq.budget.allocate import Item
from dq.budget.choices import Choice, act_bits, label, thirds, weight_bytes
from dq.budget.limits import OWN, THIRDS, Budget
from dq.budget.predictions import BUCKETS
from dq.errors import DQError
from dq.plan import LayerPlan, Plan, TensorPlan

SLACK = 1e-9  # of a limit
MIB = 2**20
NEVER = 1e18  # a cost that no limit allows


@dataclass
class Measured:
    """One layer: what it may become; errors (choices, thirds + 1), bytes and ms by choice; ms empty if untimed.

    products  multiplications of a call with an input that is rounded, 0 where it is not, or where nobody counted
    """

    choices: tuple[Choice, ...]
    errors: np.ndarray
    bytes: list[int]
    ms: list[float]
    weights: int
    products: int = 0

    @property
    def harm(self) -> np.ndarray:
        """(choices,) over all steps together."""
        return self.errors[:, -1]

    def by_thirds(self) -> Measured:
        """The same with other input formats in each third of the steps.

        Errors of an input are new in every step, so that those of the thirds add up; what they add to those of the
        weight, which counts steps together, is told by choices that differ in the input's format alone.
        """
        place = {choice: index for index, choice in enumerate(self.choices)}
        choices = thirds(self.choices)
        rows = [[place[each] for each in (choice.phases if choice else [None])] for choice in choices]
        rows = [row if len(row) == BUCKETS else row * BUCKETS for row in rows]
        parts = np.array([[self.errors[each, third] for third, each in enumerate(row)] for row in rows])
        firsts = self.errors[[row[0] for row in rows]]
        whole = firsts[:, -1] + (parts - firsts[:, :-1]).sum(1)
        return replace(
            self,
            choices=choices,
            errors=np.concatenate([parts, np.maximum(whole, 0)[:, None]], 1),
            bytes=[self.bytes[row[0]] for row in rows],
            ms=[sum(self.ms[each] for each in row) / len(row) for row in rows] if self.ms else [],
        )


@dataclass
class Part:
    """One denoiser: its layers, and what a call of it takes beside them, in ms, times the calls per step."""

    layers: dict[str, Measured]
    fixed_ms: float = 0.0
    calls: float = 1.0


@dataclass
class Search:
    """What was measured of all denoisers of a target.

    fixed_bytes  by scope: bytes beside the planned layers' weights
    trust        by metric: rank correlation of predicted and measured errors over plans that no fit has seen
    runs         whole denoising runs that sensitivity was measured on; 0 where it was single calls
    """

    recipe: str
    metric: str
    parts: dict[str, Part]
    fixed_bytes: dict[str, int] = field(default_factory=dict)
    trust: dict[str, float] = field(default_factory=dict)
    runs: int = 0

    def rows(self) -> list[tuple[str, str, Measured]]:
        """(part, layer, what was measured) in order."""
        return [(part, name, row) for part, found in self.parts.items() for name, row in found.layers.items()]

    def choose(self, budget: Budget) -> Chosen:
        """The least harmful plan within the budget. DQError with the nearest figure that can be reached."""
        limits, costs, fixed = self._limits(budget)
        items = self._items(budget.tie, costs)
        try:
            found = allocate.solve(items, _bounds(limits, fixed))
        except allocate.Infeasible as refusal:
            raise DQError(self._refusal(refusal, limits, fixed)) from None
        return self._spread(items, found, budget.tie)

    def greedy(self, budget: Budget) -> Chosen:
        """The same by raising the most sensitive layers to the most exact format first (ViDiT-Q), to compare with."""
        items, bounds = self._rounded(budget)
        return self._spread(items, allocate.greedy(items, bounds), "")

    def random(self, budget: Budget, seed: int) -> Chosen:
        """Random formats that fill the budget, to compare with."""
        items, bounds = self._rounded(budget)
        return self._spread(items, allocate.drawn(items, bounds, seed), "")

    def _rounded(self, budget: Budget) -> tuple[list[Item], list[float]]:
        """Items in which no layer may stay in full precision, and the limits."""
        limits, costs, fixed = self._limits(budget)
        for (part, name), values in ((key, values) for cost in costs for key, values in cost.items()):
            kept = [choice is None for choice in self.parts[part].layers[name].choices]
            values[np.array(kept)] = NEVER
        return self._items("", costs), _bounds(limits, fixed)

    def curve(self, of: str = "bytes", points: int = 24) -> list[Chosen]:
        """Plans from the smallest (of "ms": fastest) to the most exact."""
        costs = [self._costs(of, "denoiser")]
        items = self._items("", costs)
        return [self._spread(items, plan, "") for plan in allocate.curve(items, [np.inf], 0, points)]

    # what a plan costs

    def bytes_of(self, chosen: Chosen, scope: str = "denoiser") -> int:
        """Predicted bytes of a scope under a plan."""
        return self.fixed_bytes[scope] + sum(row.bytes[chosen[part][name]] for part, name, row in self.rows())

    def ms_of(self, chosen: Chosen) -> float:
        """Predicted milliseconds of a step, of the slowest denoiser if they take turns."""
        return max(self._ms(part, chosen[part]) for part in self.parts)

    def bits_of(self, chosen: Chosen) -> float:
        """Mean bits per weight, scales and branches included."""
        rows = self.rows()
        return (
            8 * sum(row.bytes[chosen[part][name]] for part, name, row in rows) / sum(row.weights for *_, row in rows)
        )

    def sqnr_db(self, chosen: Chosen) -> float:
        """Predicted SQNR of the denoiser's prediction or, by the metric "trajectory", of the pictures."""
        harm = sum(float(row.harm[chosen[part][name]]) for part, name, row in self.rows())
        return float("inf") if harm <= 0 else float(-10 * np.log10(harm))

    def act_bits_of(self, chosen: Chosen) -> float:
        """Mean bits of the inputs that are rounded, over all multiplications and steps."""
        total = max(sum(row.products for *_, row in self.rows()), 1)
        return sum(act_bits(row.choices[chosen[p][n]]) * row.products for p, n, row in self.rows()) / total

    @property
    def timed(self) -> bool:
        return all(row.ms for *_, row in self.rows())

    def _ms(self, part: str, chosen: Mapping[str, int]) -> float:
        found = self.parts[part]
        return found.calls * (found.fixed_ms + sum(row.ms[chosen[name]] for name, row in found.layers.items()))

    def _limits(self, budget: Budget) -> tuple[dict[str, float], list[dict], list[float]]:
        """Limits by name, the costs they are on by (part, layer), and what is spent whatever is chosen."""
        limits, costs, fixed = {}, [], []
        if OWN in (budget.bits, budget.act_bits):
            raise DQError("budget: bits 'own' are settled where a recipe is applied; expected numbers here")
        if budget.bytes is not None:
            limits["bytes"] = float(budget.bytes)
            costs.append(self._costs("bytes", budget.scope))
            fixed.append(float(self.fixed_bytes[budget.scope]))
        if budget.bits is not None:
            limits["bits"] = budget.bits
            count = sum(row.weights for *_, row in self.rows())
            costs.append({key: 8 * value / count for key, value in self._costs("bytes", budget.scope).items()})
            fixed.append(0.0)
        if budget.act_bits is not None:
            limits["act_bits"] = budget.act_bits
            total = max(sum(row.products for *_, row in self.rows()), 1)
            bits = {(p, n): np.array([act_bits(each) for each in row.choices]) for p, n, row in self.rows()}
            costs.append({(p, n): bits[p, n] * row.products / total for p, n, row in self.rows()})
            fixed.append(0.0)
        if budget.ms_per_step is not None:
            for part, found in self.parts.items():
                limits[f"ms_per_step{f' of {part}' if part else ''}"] = budget.ms_per_step
                own = self._costs("ms", budget.scope)
                costs.append({key: value if key[0] == part else 0 * value for key, value in own.items()})
                fixed.append(found.calls * found.fixed_ms)
        over = 2 * next(iter(limits.values()))  # of NEVER the solver's scale would suffer
        for part, name, row in self.rows() if budget.protect else ():
            costs[0][part, name][_narrowed(row.choices, budget.protect)] += over
        return limits, costs, fixed

    def _costs(self, of: str, scope: str) -> dict[tuple[str, str], np.ndarray]:
        if of == "ms":
            return {(part, n): self.parts[part].calls * np.array(row.ms) for part, n, row in self.rows()}
        return {(part, name): np.array(row.bytes, float) for part, name, row in self.rows()}

    def _items(self, tie: str, costs: Sequence[Mapping]) -> list[Item]:
        items: dict[str, Item] = {}
        for part, name, row in self.rows():
            key = tied(part, name, row, tie)
            own = np.stack([cost[part, name] for cost in costs])
            before = items.get(key)
            sums = (row.harm, own) if before is None else (before.errors + row.harm, before.costs + own)
            items[key] = Item(key, *sums)
        return list(items.values())

    def _spread(self, items: Sequence[Item], found: Sequence[int], tie: str) -> Chosen:
        by_key = {item.name: choice for item, choice in zip(items, found, strict=True)}
        chosen: Chosen = {part: {} for part in self.parts}
        for part, name, row in self.rows():
            chosen[part][name] = by_key[tied(part, name, row, tie)]
        return chosen

    def _refusal(self, refusal: allocate.Infeasible, limits: Mapping[str, float], fixed: Sequence[float]) -> str:
        texts = []
        for (name, limit), least, base in zip(limits.items(), refusal.least, fixed, strict=True):
            if least + base > limit or not refusal.alone:
                texts.append(f"{name} is {_figure(name, limit)}, the least possible is {_figure(name, least + base)}")
        together = "" if refusal.alone else "the limits cannot be met together; each alone: "
        return f"budget: {together}{'; '.join(texts)} (recipe {self.recipe!r}); raise it"

    # as JSON

    def to_dict(self) -> dict:
        parts = {}
        for part, found in self.parts.items():
            layers = {
                name: {
                    "choices": [None if choice is None else choice.to_dict() for choice in row.choices],
                    "errors": row.errors.tolist(),
                    "bytes": row.bytes,
                    "ms": row.ms,
                    "weights": row.weights,
                    "products": row.products,
                }
                for name, row in found.layers.items()
            }
            parts[part] = {"layers": layers, "fixed_ms": found.fixed_ms, "calls": found.calls}
        return {**vars(self), "parts": parts}

    @classmethod
    def from_dict(cls, data: dict) -> Search:
        parts = {}
        for part, found in data["parts"].items():
            layers = {}
            for name, row in found["layers"].items():
                choices = tuple(row and LayerPlan.from_dict(name, row) for row in row["choices"])
                own = (np.array(row["errors"]), row["bytes"], row["ms"], row["weights"], row["products"])
                layers[name] = Measured(choices, *own)
            parts[part] = Part(layers, found["fixed_ms"], found["calls"])
        return cls(**{**data, "parts": parts})


Chosen = dict[str, dict[str, int]]  # by part and layer: the number of the choice


def _narrowed(choices: Sequence[Choice], protect: Sequence[str]) -> np.ndarray:
    """(choices,) whether an input has fewer bits than its layer offers in one of these thirds of the run."""
    known = [() if choice is None else _acts(choice) for choice in choices]
    offered = max((act.spec.bits for acts in known for act in acts), default=0)
    places = [THIRDS.index(third) for third in protect]
    return np.array([any(acts and acts[third].spec.bits < offered for third in places) for acts in known], bool)


def _acts(choice: LayerPlan) -> tuple[TensorPlan, ...]:
    """Input formats of a choice by third, none where it is not rounded."""
    if choice.act is None:
        return ()
    return (choice.act, *choice.late) if choice.late else (choice.act,) * BUCKETS


def tied(part: str, name: str, row: Measured, tie: str) -> str:
    """The decision a layer belongs to: its own, or with tie "kind" that of its namesakes in all blocks."""
    if tie != "kind":
        return f"{part}/{name}"
    return f"{part}/{re.sub('[0-9]+', '#', name)} {' | '.join(map(str, row.choices))}"


def applied(base: Plan, found: Part, chosen: Mapping[str, int], note: str) -> Plan:
    """The base plan with every layer as chosen; layers that stay in full precision are kept, with the reason."""
    layers, kept = {}, dict(base.kept)
    for name, plan in base.layers.items():
        choice = found.layers[name].choices[chosen[name]] if name in found.layers else plan
        if choice is None:
            kept[name] = f"budget: too sensitive for {note}"
        else:
            layers[name] = replace(choice, reason=plan.reason)
    return replace(base, layers=layers, kept=kept)


def plans(search: Search, base: Mapping[str, Plan], chosen: Chosen, note: str) -> dict[str, Plan]:
    """By part: the plan with every layer as chosen; `note` names the budget."""
    return {part: applied(base[part], found, chosen[part], note) for part, found in search.parts.items()}


def summary(search: Search, chosen: Chosen, budget: Budget) -> list[str]:
    """Lines for the report."""
    counts: dict[str, int] = {}
    for part, name, row in search.rows():
        text = label(row.choices[chosen[part][name]])
        counts[text] = counts.get(text, 0) + 1
    used = [f"{search.bytes_of(chosen, budget.scope) / MIB:.2f} MiB of the {budget.scope}"]
    used += [f"{search.bits_of(chosen):.2f} bits per weight"]
    used += [f"{search.act_bits_of(chosen):.2f} bits per input"] if budget.act_bits is not None else []
    used += [f"{search.ms_of(chosen):.1f} ms per step"] if search.timed else []
    trust = ", ".join(f"{metric} {value:.2f}" for metric, value in search.trust.items())
    lines = [f"budget {budget}: predicted {', '.join(used)}, SQNR {search.sqnr_db(chosen):.1f} dB"]
    lines.append(f"sensitivity: {search.metric}" + (f", {search.runs} runs" if search.runs else ""))
    lines.append("choices: " + ", ".join(f"{text} ({count})" for text, count in sorted(counts.items())))
    return lines + ([f"rank correlation with measured errors of plans not fitted to: {trust}"] if trust else [])


def measured(
    plan: Plan,
    menus: Mapping[str, Sequence[Choice]],
    errors: Mapping[str, np.ndarray],
    ms: Mapping[str, Sequence[float]],
    dtype: torch.dtype,
    extra: int = 0,
    products: Mapping[str, int] | None = None,
) -> dict[str, Measured]:
    """Rows of one model. A layer without errors (never called) keeps its plan's own choice.

    extra  bytes per input channel that fitting may add to a layer (smoothing); products: multiplications of a call
    """
    rows = {}
    for name, choices in menus.items():
        weights = prod(choices[-1].shape)
        if name not in errors:
            choices = (plan.layers[name],)
        found = errors.get(name, np.zeros((len(choices), BUCKETS + 1)))
        own = [spent(choice, dtype, extra, weights) for choice in choices]
        times = list(ms.get(name, ()))[: len(choices)]
        count = (products or {}).get(name, 0) if plan.layers[name].act is not None else 0
        rows[name] = Measured(tuple(choices), found, own, times, weights, count)
    return rows


def _bounds(limits: Mapping[str, float], fixed: Sequence[float]) -> list[float]:
    """What is left for the choices; a limit that they just meet is met in whatever order their costs are summed."""
    return [limit * (1 + SLACK) - base for limit, base in zip(limits.values(), fixed, strict=True)]


def spent(choice: Choice, dtype: torch.dtype, extra: int, elements: int = 0) -> int:
    """Bytes of a choice and what fitting may add, `extra` per input channel; of `elements` weights of a kept layer."""
    inputs = 0 if choice is None or choice.kind == "stack" or choice.act is None else choice.shape[1]
    return weight_bytes(choice, dtype, elements) + extra * inputs


def _figure(name: str, value: float) -> str:
    return f"{value:.0f} ({value / MIB:.2f} MiB)" if name == "bytes" else f"{value:.3g}"
