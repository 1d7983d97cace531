"""The verbs: quantize = plan -> validate -> (capture -> fit) -> pack -> swap -> mark; explain; dequantize.

Quantizing is a transaction: every layer of every component is packed before the first one is swapped, so a failure
leaves the target as it was.
"""

from __future__ import annotations

import copy
import dis
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dq import cookbook, explaining, fusions, kernels, layers, planning
from dq.around import adding
from dq.bridges import adopting
from dq.bridges.stored import Stored
from dq.errors import DQError, nearest
from dq.fit import tune as tuning
from dq.host import mark, peft, ready, scheduling
from dq.layers import PackedStack, naming, packed_layers, parameter_bytes, serving
from dq.model import check_fit, install, to_dense
from dq.plan import Keeping, LayerPlan, Plan, Recipe
from dq.report import Report

EMPTY = {"RESUME", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "NOP"}  # what a function that does nothing is made of
BUDGET_SAMPLES = 40  # denoiser inputs recorded for a budget when the user names no calibration
DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder", "denoiser", "model", "dit")


def quantize(
    target,
    recipe: str | Path | Recipe | Plan | Keeping,
    *,
    calibration=None,
    budget=None,
    components: Mapping[str, str | Path | Recipe | Plan | None] | None = None,
    keep: Sequence[str] | str | None = None,
    tune=None,
    progress: bool = True,
) -> Report:
    """Quantize a pipeline's denoisers, or one model, in place.

    target       DiffusionPipeline (every denoiser in it) or an nn.Module (on the meta device: shapes only)
    recipe       a name from `dq.recipes()`, a Recipe, a Plan, or the path of a plan or recipe JSON; of a model with
                 layers of diffusers' GGUF quantizer also "stored", which keeps their codes, and "stored-int8", which
                 rounds activations to 8 bits as well (layers of another library, torchao's too, are decoded otherwise)
    calibration  for recipes of a method and for budgets: a dq.Calibration, or a function that runs a bare model as its
                 user does; a budget of a data-free recipe takes dq's own prompts where it gets none. With rounded
                 attention: modules that cannot bear it on these calls are left as they are
    budget       a dq.Budget: the recipe then names the choices, and each layer gets one by its measured sensitivity;
                 or one for each denoiser, {"transformer": dq.Budget(bits=6), "transformer_2": dq.Budget(bits=4)}
    components   further parts of a pipeline and their data-free recipes, e.g. {"text_encoder_2": "int8-weight"}; a
                 denoiser named here gets this recipe instead, or with None stays as it is: {"transformer_2": None}
    keep         patterns, matched from the start of layer names, left in full precision
    tune         a dq.Tune: the quantized denoisers then learn from the full-precision ones, on the calibration's
                 prompts or, for data-free recipes without one, on dq's own; bytes and kernels stay
    Raises DQError for wrong use; the target is then as it was.
    """
    start, target = time.perf_counter(), ready.unwrapped(target)
    wanted = cookbook.for_file(recipe)
    budget = _own_budget(wanted) if budget is None else budget
    tune = tuning.wished(wanted, tune)
    calibration = _resolve(target, wanted, calibration, budget, tune)
    models = _chosen_parts(target, wanted, components or {})
    keep, runs = (keep,) if isinstance(keep, str) else tuple(keep or ()), calibration is not None or budget is not None
    with adopting.opened({part: model for part, (model, _) in models.items()}, runs) as theirs:
        job = _Job(target, wanted, calibration, budget, tune, keep, progress, theirs)
        return _quantized(models, job, start)


@dataclass(frozen=True)
class _Job:
    """What `quantize` was asked for. theirs: weights of other libraries' layers, by component and layer."""

    target: Any
    wanted: Recipe | Plan | Keeping
    calibration: Any
    budget: Any
    tune: Any
    keep: tuple[str, ...]
    progress: bool
    theirs: adopting.Opened


def _quantized(models: dict, job: _Job, start: float) -> Report:
    target, wanted, calibration, budget, progress = job.target, job.wanted, job.calibration, job.budget, job.progress
    search = adding.prepared(target, wanted, calibration)
    plans = _plan_all(models, job.keep, budget is not None or job.tune is not None, job.theirs)
    ready.refuse_switches(target, plans)
    around = search and not (wanted.method or wanted.attention)  # pyright: ignore[reportAttributeAccessIssue]
    work = None if around else _stages(models, plans, job)
    with ready.eager():
        packed, errors, notes = ({}, {}, []) if work is None else work.done()
    models = {part: entry for part, entry in models.items() if part in plans}
    for part, (model, _) in models.items():
        if part not in packed:
            packed[part], errors[part] = _pack_all(part, model, plans[part], progress, job.theirs.get(part, {}))
    tuned = {} if work is None or job.tune is None else work.tuned(job.tune, packed, errors, notes)
    before, rows = parameter_bytes(*(model for model, _ in models.values())), []
    for part, (model, _) in models.items():
        rows += explaining.planned_rows(part, model, plans[part], packed[part], errors)
    notes = notes + adding.added(target, search, models, partial(_put_all, models, plans, packed))
    after, rows = parameter_bytes(*(model for model, _ in models.values())), explaining.with_kernels(rows, models)
    seconds, notes = time.perf_counter() - start, notes + explaining.step_notes(plans)
    more = (getattr(work, "candidates", None), ready.is_empty(models), tuned)
    return Report(rows, before, after, seconds, wanted.name, notes, *more)


def _stages(models: Mapping, plans: dict[str, Plan], job: _Job):
    """What runs on data, None where nothing does."""
    if job.calibration is None and job.budget is None:
        return None
    from dq import stages

    wanted: Any = job.wanted
    mine = {part: model for part, (model, recipe) in models.items() if recipe is wanted}
    return stages.Stages(job.target, mine, plans, wanted, job.calibration, job.budget, job.progress)


def explore(target, recipe: str | Recipe, calibration=None, *, wish=None, keep=(), progress: bool = True):
    """Measure what a budget would choose from, and change nothing.

    wish  sensing.Wish: the metric, and whether layers are timed
    -> (search.Search, plan of the recipe by part). Raises DQError as `quantize` does.
    """
    from dq import stages
    from dq.budget import sensing
    from dq.budget.limits import Budget

    wanted, wish, target = cookbook.get(recipe), wish or sensing.Wish(), ready.unwrapped(target)
    calibration = _resolve(target, wanted, calibration, Budget(bits=16, metric=wish.metric))
    if calibration is None:
        raise DQError("a bare model needs data to be measured; pass calibration=a function that runs it")
    models = find_denoisers(target)
    plans = _plan_all({part: (model, wanted) for part, model in models.items()}, tuple(keep), True)
    with ready.eager():
        found = stages.Stages(target, models, plans, wanted, calibration, None, progress).explored(wish)  # pyright: ignore[reportArgumentType]
    return found, plans


def recipes() -> list[str]:
    """Names of all recipes, the data-free ones first."""
    return cookbook.names()


def explain(target) -> Report:
    """Layer, plan, kernel, its speed, and why no faster kernel serves it, for every quantized layer of a target.

    Layers that never ran are measured first as in a typical call: a few seconds, once for a machine.
    Raises DQError when nothing in the target is quantized.
    """
    models = _quantized_models(target)
    rows = []
    for part, model in models.items():
        plan = mark.plan_of(model)
        for name, layer in packed_layers(model).items():
            rows.append(explaining.row(part, name, layer.plan, parameter_bytes(layer), None, layer.plan.reason))
        kept = plan.kept if plan is not None else {}
        rows += [explaining.kept_row(part, model, name, reason) for name, reason in kept.items()]
        explaining.measure(model)
    before = sum(explaining.dense_bytes(model) for model in models.values())
    recipe = ", ".join(dict.fromkeys(mark.plan_of(model).recipe for model in models.values()))
    plans = {part: mark.plan_of(model) for part, model in models.items()}
    report = Report(explaining.with_kernels(rows, models), before, parameter_bytes(*models.values()), 0.0, recipe)
    known = {part: plan for part, plan in plans.items() if plan is not None}
    report.notes += explaining.step_notes(known) + scheduling.lines(target, scheduling.found_in(plans.values()))
    for part, model in models.items():
        lines = [*scheduling.model_lines(model, plans[part]), *fusions.notes(model), *explaining.speed_notes(model)]
        report.notes += [f"{part or 'model'}: {line}" for line in lines]
    return report


def dequantize(target) -> None:
    """Turn packed layers back into ordinary ones, in place, with the rounded weights they stand for.

    Raises DQError when nothing in the target is quantized.
    """
    for model in _quantized_models(target).values():
        to_dense(model)
        mark.unmark(model)
    scheduling.release(target)


def set_backend(name: str, target=None) -> None:
    """Choose who runs packed layers: "auto", the best kernel backend that accepts a layer, or one backend by name.

    target  a quantized pipeline or model, which keeps the choice whatever the default is; None: the default of all
            models without a choice of their own
    Layers that the backend refuses run on `reference`; `dq.explain` says why. Raises DQError for an unknown name, and
    for a target in which nothing is quantized.
    """
    kernels.known(name)
    if target is None:
        kernels.select(name)
        serving.choose_again()
        return
    for model in _quantized_models(target).values():
        for layer in packed_layers(model).values():
            if not isinstance(layer, PackedStack):
                layer.backend = name
                layer.bind(layer.weight.device)
        fusions.set_backend(model, name)


def find_denoisers(target) -> dict[str, nn.Module]:
    """Denoisers of a pipeline by component name; a bare model is one denoiser under the name "".

    Raises DQError when the target is neither, or a pipeline without one.
    """
    parts = ready.parts_of(target)
    found = parts if "" in parts else {name: part for name, part in parts.items() if _is_denoiser(name, part)}
    found = {name: part for name, part in found.items() if not _is_within_another(name, found)}
    if not found:
        names = ", ".join(target.components)
        raise DQError(f"{type(target).__name__} has no denoiser among {names}; pass the model itself")
    return found


def _is_within_another(name: str, parts: Mapping[str, nn.Module]) -> bool:
    """Whether all layers of a part belong to another one, which runs them; of two equal parts the later one is."""
    own, names = set(map(id, _layers_of(parts[name]))), list(parts)
    for other, part in parts.items():
        theirs = set(map(id, _layers_of(part)))
        if other != name and own <= theirs and (own != theirs or names.index(other) < names.index(name)):
            return True
    return False


def _layers_of(part: nn.Module) -> list[nn.Module]:
    return [module for module in part.modules() if layers.kind_of(module) is not None or module._parameters]


def _does_nothing(part: nn.Module) -> bool:
    """Whether a part only holds weights for another one, as a motion adapter does: its forward is empty."""
    code = getattr(type(part).forward, "__code__", None)
    return code is not None and {step.opname for step in dis.get_instructions(code)} <= EMPTY


def _is_denoiser(name: str, part: nn.Module) -> bool:
    home = type(part).__module__
    if _does_nothing(part):
        return False
    if home.startswith("diffusers."):
        return home.startswith(("diffusers.models.transformers", "diffusers.models.unets"))
    return name in DENOISERS and not home.startswith("transformers.")


def _chosen_parts(target, wanted: Recipe | Plan | Keeping, components: Mapping) -> dict[str, tuple[nn.Module, Any]]:
    """Models to quantize and by what: denoisers by `wanted`, unless components names another recipe or None."""
    found = {name: (model, wanted) for name, model in find_denoisers(target).items()}
    found |= _named_components(target, components)
    chosen = {name: (model, recipe) for name, (model, recipe) in found.items() if recipe is not None}
    if not chosen:
        raise DQError(f"components leaves every part of {type(target).__name__} as it is; give one of them a recipe")
    if wanted.needs_calibration and not any(recipe is wanted for _, recipe in chosen.values()):
        raise DQError(
            f"components leaves no denoiser to {wanted.name!r}; take one out of it, or name a data-free recipe"
        )
    return chosen


def _named_components(target, components: Mapping) -> dict[str, tuple[nn.Module, Recipe | Plan | None]]:
    if components and isinstance(target, nn.Module):
        raise DQError("components is for pipelines; got a bare model: call dq.quantize on each model instead")
    found, parts = {}, ready.parts_of(target) if components else {}
    for name, recipe in components.items():
        part = parts.get(name)
        if part is None:
            raise DQError(f"component {name!r} is not a model of {type(target).__name__}, {nearest(name, parts)}")
        wanted = None if recipe is None else cookbook.get(recipe)
        if wanted is not None and wanted.needs_calibration:
            raise DQError(f"component {name!r}: {wanted.name!r} needs calibration; components take data-free recipes")
        found[name] = (part, wanted)
    return found


def _resolve(target, wanted: Recipe | Plan | Keeping, calibration, budget, tune=None):
    """The Calibration a recipe is fitted with, None for a data-free one. DQError when the two do not go together."""
    name = wanted.name
    if budget is not None:
        from dq.budget import limits

        limits.check(budget, wanted, isinstance(target, nn.Module))
    attends = isinstance(wanted, Recipe) and wanted.attention and calibration is not None  # chosen on data then
    if not wanted.needs_calibration and not attends:
        return _for_data_free(target, name, calibration, budget, tune)
    from dq import methods
    from dq.trace import calibration as capturing

    assert isinstance(wanted, Recipe), "the others need none"
    if wanted.method and wanted.method not in methods.files():
        raise DQError(
            f"recipe {name!r}: method {wanted.method!r} is unknown, {nearest(wanted.method, methods.files())}"
        )
    if calibration is None:
        hint = "dq.Calibration(prompts=...)" if not isinstance(target, nn.Module) else "a function that runs the model"
        raise DQError(f"recipe {name!r} needs calibration data; pass calibration={hint}")
    return capturing.resolve(calibration)


def _own_budget(wanted: Recipe | Plan | Keeping):
    """The budget that a recipe brings along: methods of mixed precision name their mean bits, and how they look."""
    if not isinstance(wanted, Recipe) or "bits" not in wanted.options:
        return None
    from dq.budget.limits import Budget

    named = ("bits", "metric", "act_bits", "thirds", "runs", "checks")
    return Budget(**{key: wanted.options[key] for key in named if key in wanted.options})


def _for_data_free(target, name: str, calibration, budget, tune):
    """The Calibration of a data-free recipe's budget or tuning; None without them, and for budgets of bare models."""
    if budget is None and tune is None:
        if calibration is not None:
            raise DQError(f"recipe {name!r} is data-free; leave calibration=None")
        return None
    from dq.trace import calibration as capturing

    if calibration is not None:
        return capturing.resolve(calibration)
    if not isinstance(target, nn.Module):
        return capturing.Calibration(samples=BUDGET_SAMPLES)
    if tune is not None:
        raise DQError("tune: a bare model needs runs to learn from; pass calibration=a function that runs it")
    assert budget is not None, "one of them was given"
    needs = budget.ms_per_step is not None or budget.act_bits is not None or budget.thirds or budget.scope == "peak"
    if needs or budget.metric not in ("trajectory", "prediction"):
        raise DQError(
            "budget: of a bare model only bytes and bits go without data; pass calibration=a function that runs it"
        )
    return None


def _plan_all(models: Mapping, keep, measured: bool = False, theirs: adopting.Opened | None = None) -> dict[str, Plan]:
    """A checked plan per model; everything that can be refused is refused here, before any work.

    measured  whether layers are tried out on data, whatever their recipe says
    theirs    weights of other libraries' layers, whose modules are empty
    """
    plans = {}
    for part, (model, wanted) in models.items():
        if packed_layers(model):
            first = next(iter(packed_layers(model)))
            raise DQError(
                f"{part or type(model).__name__} is already quantized (layer {first!r}); call dq.dequantize first"
            )
        peft.refuse_unfit(part or type(model).__name__, model, measured or wanted.needs_calibration)
        ready.refuse_hidden_weights(part, model)
        if isinstance(wanted, Plan) and keep:
            raise DQError(f"keep={list(keep)} goes with a recipe, got a plan; take the layers out of the plan instead")
        aside = (theirs or {}).get(part, {})
        if isinstance(wanted, Keeping):
            plan = _keeping(part, model, wanted, keep, aside)
        else:
            plan = planning.make_plan(model, wanted, keep) if isinstance(wanted, Recipe) else copy.deepcopy(wanted)
        check_fit(model, plan)
        ready.refuse_unreadable_weights(part, model, plan, aside)
        plan.compute_dtype = str(_compute_dtype(model)).removeprefix("torch.")
        plans[part] = plan
    return plans


def _keeping(part: str, model: nn.Module, wanted: Keeping, keep, aside: Mapping[str, Stored]) -> Plan:
    plan = planning.keeping_plan(model, wanted, adopting.kept(aside), keep)
    if not plan.layers:
        what = part or type(model).__name__
        raise DQError(
            f"recipe {wanted.name!r}: {what} has no codes that dq has a format for; name a recipe, e.g. int8"
        )
    return plan


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype of most of the model's weights: some classes keep single layers in fp32."""
    sizes: Counter[torch.dtype] = Counter()
    for value in filter(torch.is_floating_point, model.parameters()):
        sizes[value.dtype] += value.numel()
    return max(sizes, key=sizes.get, default=torch.float32)


def _pack_all(
    part: str, model: nn.Module, plan: Plan, progress: bool, aside: Mapping[str, Stored]
) -> tuple[dict, dict]:
    """Pack every planned layer beside the model, which stays untouched; -> layers and weight SQNR in dB by name."""
    packed, errors, dtype, keeps = {}, {}, plan.dtype, plan.recipe in cookbook.KEEPING
    bar = tqdm(plan.layers.items(), desc=f"quantize {part or type(model).__name__}", disable=not progress, delay=2)
    for name, layer_plan in bar:
        if name in aside:
            packed[name] = adopting.pack(name, naming.at(model, name), aside[name], layer_plan, keeps, dtype)
            errors[name] = None if keeps else explaining.sqnr_db(aside[name].dense(), packed[name].dense_weight())
            continue
        weight, source = _weight_of(model, name, layer_plan)
        if layer_plan.kind == "stack":
            packed[name] = layers.pack_stack(name, weight, layer_plan, dtype)
        else:
            packed[name] = layers.pack(name, source, layer_plan, dtype)
        errors[name] = explaining.sqnr_db(weight, packed[name].dense_weight())
    return packed, errors


def _put_all(models: Mapping, plans: Mapping[str, Plan], packed: Mapping[str, dict]) -> dict[str, dict]:
    """Swap every layer, then mark the models. A layer that two models share is one layer afterwards as well.

    -> by part: the layers that stood there before.
    """
    originals = {part: {name: _standing(model, name) for name in packed[part]} for part, (model, _) in models.items()}
    done: dict[int, nn.Module] = {}
    for part, (model, _) in models.items():
        mine = dict(packed[part])
        for name, layer in packed[part].items():
            if layer.plan.kind != "stack":
                mine[name] = done.setdefault(id(naming.at(model, name)), layer)
                plans[part].layers[name] = mine[name].plan
        install(model, mine)
    for part, (model, _) in models.items():
        mark.mark(model, plans[part])
    return originals


def _standing(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    owner, key = naming.place(model, name)
    return owner._parameters[key] if key in owner._parameters else owner._modules[key]  # pyright: ignore[reportReturnType]


def _weight_of(model: nn.Module, name: str, plan: LayerPlan) -> tuple[torch.Tensor, nn.Module | None]:
    if plan.kind == "stack":
        return model.get_parameter(name), None
    module = naming.at(model, name)
    return module.weight, module


def _quantized_models(target) -> dict[str, nn.Module]:
    found = {name: part for name, part in ready.parts_of(target).items() if packed_layers(part)}
    if not found:
        raise DQError(f"{type(target).__name__} has no quantized layer; call dq.quantize(target, 'int8') first")
    return found
