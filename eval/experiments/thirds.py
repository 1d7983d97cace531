"""Formats of inputs along the run at equal mean bits: `python -m eval.experiments.thirds`.

`svdquant-int4` under a budget of mean input bits, 4 or 8 for each layer: in one format for all steps, and in one for
each third of them; weights of both have 4 bits, and the budget BITS. Beside it formats of the steps alone, the same in
all layers: those that a beam search over the steps finds (as AdaTSQ, arXiv 2602.09883, searches timesteps: the state
is kept along the run, candidates are the widths of the next step, those whose latents are nearest to those of the
full-precision run go on), and 8 bits in the last or first steps. All are fitted alike. Rows, noise SQNR by thirds
and PSNR of the held-out prompts, go to eval/results/thirds.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

import dq
from dq import cookbook
from dq.budget.limits import Budget
from dq.host import mark
from dq.layers import clock, packed_layers
from dq.plan import Plan
from eval.experiments import methods, rows, versions
from eval.experiments.quality import denoiser, fingerprint
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "thirds.json"
RECIPE = "svdquant-int4"
WIDE = "int8/token"
BITS = 5.2  # of a weight, scales and branch included
ACT_BITS = 5.4  # as 8 bits in 7 of 20 steps and 4 in the others
PROMPTS = 2  # of the calibration's that the beam search runs
WAYS = ("one format", "by thirds", "beam", "late", "early")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["tiny-pixart"], choices=tiny.NAMES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--metric", default="trajectory")
    parser.add_argument("--act-bits", type=float, default=ACT_BITS)
    options = parser.parse_args()
    kernels_by_rank()
    for model in options.models:
        for way in options.ways:
            keys = {"model": model, "row": way, "prompts": options.prompts, "seed": options.seed}
            keys |= {"metric": options.metric, "act_bits": options.act_bits}
            found = rows.kept(FILE, keys, version(model), partial(measure, model, way, options))
            print(found, flush=True)


def version(model: str) -> str:
    decides = [*methods.roots(_recipe().method), *(versions.ROOT / "dq" / "budget").glob("*.py")]
    given = [methods.CALIBRATION, methods.CALIBRATION_PROMPTS, BITS, PROMPTS]
    return versions.crc(f"{versions.code(decides)} {fingerprint(model)} {_recipe().to_dict()} {given}")


def measure(model: str, way: str, options) -> dict:
    """The figures of one way."""
    pipe, entry = tiny.load(model), methods.Entry(way, RECIPE)
    seen = methods.calibration(model, entry, options)
    if way in ("one format", "by thirds"):
        limits = {"bits": BITS, "act_bits": options.act_bits, "metric": options.metric}
        recipe = _recipe()
        recipe = replace(recipe, options={**recipe.options, "choices": (recipe.linear[0],)})
        budget = Budget(**limits, thirds=way == "by thirds")
        report = dq.quantize(pipe, recipe, calibration=seen, budget=budget, progress=False)
    else:
        report = dq.quantize(pipe, _of_steps(model, way, options, seen), calibration=seen, progress=False)
    plan: Any = mark.plan_of(getattr(pipe, denoiser(pipe)))
    figures = methods.compare(pipe, model, options) | {"bytes": report.bytes_after, "switch": plan.switch}
    return methods.rounded(figures | {"formats": _formats(plan), "notes": report.notes})


def _formats(plan: Plan) -> dict[str, int]:
    """How many layers round their inputs in each way along the run, by bits."""
    acts = [(layer.act, *layer.late) for layer in plan.layers.values() if layer.act and layer.kind == "linear"]
    texts = sorted("-".join(str(act.spec.bits) for act in each) for each in acts)
    return {text: len(list(same)) for text, same in groupby(texts)}


def _of_steps(model: str, way: str, options, seen) -> dq.Recipe:
    """The recipe with the same format in all layers, in each step as the way says."""
    steps = tiny.CALL[model]["num_inference_steps"]
    wide = round(steps * (options.act_bits - 4) / 4)
    pattern = [(way == "early" and step < wide) or (way == "late" and step >= steps - wide) for step in range(steps)]
    return recipe_of(found_by_beam(model, wide, seen) if way == "beam" else pattern)


def _recipe() -> dq.Recipe:
    found = cookbook.get(RECIPE)
    assert isinstance(found, dq.Recipe)
    return found


def recipe_of(pattern: Sequence[bool]) -> dq.Recipe:
    """`svdquant-int4` with 8-bit inputs in the steps of a pattern."""
    recipe, steps = _recipe(), len(pattern)
    narrow = recipe.linear[1]
    starts = [step for step in range(1, steps) if pattern[step] != pattern[step - 1]]
    formats = [WIDE if pattern[step] else narrow for step in (0, *starts)]
    switch = tuple(step / steps for step in starts)
    return replace(recipe, linear=(recipe.linear[0], formats[0]), late=tuple(formats[1:]), switch=switch)


def found_by_beam(model: str, wide: int, seen) -> tuple[bool, ...]:
    """The steps that get 8-bit inputs, `wide` of them: those of the path whose latents end nearest to full precision.

    Kept along the run: for each number of 8-bit steps so far the path that is nearest, as long as it can still end
    with `wide` of them. All paths, each going on in either width, are one batch; the scheduler's step chooses.
    """
    prompts, steps = seen.prompts[:PROMPTS], tiny.CALL[model]["num_inference_steps"]
    truth: list[torch.Tensor] = []
    with _stepping(pipe := tiny.load(model), lambda found: truth.append(found) or torch.arange(len(found))):
        _run(pipe, model, prompts, 1)
    half = [step >= steps // 2 for step in range(steps)]
    dq.quantize(pipe, recipe_of(half), calibration=seen, progress=False)
    slots = wide + 1
    kept: list[tuple[bool, ...]] = [()] * slots  # by slot; a slot without a path of its own repeats the first

    def choose(found: torch.Tensor) -> torch.Tensor:
        rows = found.reshape(2 * slots, len(prompts), *found.shape[1:])
        errors = (rows - truth[len(kept[0])]).flatten(1).square().sum(1).tolist()
        paths: dict[tuple[bool, ...], int] = {
            (*kept[slot % slots], slot >= slots): slot for slot in reversed(range(2 * slots))
        }
        best: dict[int, tuple[bool, ...]] = {}
        for path in sorted(paths, key=lambda path: errors[paths[path]]):
            if sum(path) <= wide <= sum(path) + steps - len(path):
                best.setdefault(sum(path), path)
        kept[:] = (list(best.values()) + [next(iter(best.values()))] * slots)[:slots]
        slot = torch.tensor([paths[path] for path in kept] * 2)
        return (slot[:, None] * len(prompts) + torch.arange(len(prompts))).flatten()

    with _stepping(pipe, choose), _in_both_widths(getattr(pipe, denoiser(pipe)), slots * len(prompts)):
        _run(pipe, model, prompts, 2 * slots)
    return kept[0]


def _run(pipe, model: str, prompts: Sequence[str], copies: int) -> None:
    generators = [torch.Generator().manual_seed(index) for _ in range(copies) for index in range(len(prompts))]
    with torch.inference_mode():
        pipe([*prompts] * copies, generator=generators, **{"output_type": "latent"} | tiny.CALL[model])


@contextmanager
def _stepping(pipe, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """After each step of the scheduler the batch goes on as the rows that `choose` names of the new latents."""
    own, kept = type(pipe.scheduler), pipe.scheduler

    class Stepping(own):
        def step(self, *args, **kwargs):
            (latents, *rest) = super().step(*args, **{**kwargs, "return_dict": False})
            rows = choose(latents)
            for name, value in vars(self).items():  # what it remembers of earlier steps
                if isinstance(value, list) and value and any(isinstance(each, torch.Tensor) for each in value):
                    setattr(self, name, [each[rows] if isinstance(each, torch.Tensor) else each for each in value])
                elif isinstance(value, torch.Tensor) and value.shape[:1] == latents.shape[:1] and value.dim() > 1:
                    setattr(self, name, value[rows])
            return (latents[rows], *rest)

    pipe.scheduler = Stepping.from_config(kept.config)
    try:
        yield
    finally:
        pipe.scheduler = kept


@contextmanager
def _in_both_widths(model, half: int) -> Iterator[None]:
    """The first `half` rows of each guidance branch in the first phase's formats, the others in the last's."""
    layers: list[Any] = [layer for layer in packed_layers(model).values() if layer.plan.late]
    ticking, plain, plan = layers[0].clock, type(model).forward, mark.plan_of(model)
    assert plan is not None

    def forward(*args, **kwargs):
        found = []
        for phase in (0, len(layers[0].plan.late)):
            ticking.now_at(phase)
            found.append(plain(model, *args, **kwargs)[0])
        wide = torch.arange(len(found[0])) % (2 * half) >= half
        return (torch.where(wide.reshape(-1, *[1] * (found[0].dim() - 1)), found[1], found[0]),)

    clock.detach(model)
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        clock.attach(model, ticking, plan.timestep)


if __name__ == "__main__":
    main()
