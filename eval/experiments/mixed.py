"""Mixed precision at the bytes of one format for all: `python -m eval.experiments.mixed`.

A row per model, budget, way of choosing and calibration seed: pictures of the held-out prompts against those of the
fp32 model from the same seeds. Budgets are the bytes of `int8` with all weights at 6, 5 and 4 bits in groups of 64,
and 10 and 20 % below all at 8 bits; activations have 8 bits everywhere. Ways: one format for all, the integer program,
greedy (the most sensitive layers get 8 bits first) and random choices, all rounded to nearest; one format and the
program once more with GPTQ. Rows go to eval/results/mixed.json and are kept while weights, prompts and seed are the
same: take out those that a change to the code has made old. Several processes may run at once. `--ms` instead compares
predicted and measured milliseconds per step of budgets in time; let nothing else run then.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

import dq
from dq import api, cookbook, timing
from dq.budget import charts, search, sensing
from dq.budget.predictions import Predictions
from dq.host import mark
from dq.plan import Plan
from dq.trace.records import Store
from eval.experiments import methods, rows
from eval.experiments.quality import denoiser, fingerprint
from eval.metrics import feature_distance, psnr
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "mixed.json"
WORK = methods.ROOT / "out" / "mixed"
KEYS = ("model", "budget", "way", "calibration_seed")
SAME = (*KEYS, "prompts", "seed", "weights")
RECIPE, FITTED = "int8", "gptq-w4a8"
PROMPTS = 64  # to measure sensitivity on
UNIFORM = {"int6": "int6/group:64", "int5": "int5/group:64", "int4": "int4/group:64", "int8": "int8/channel"}
SHARES = {"int8 - 10 %": 0.9, "int8 - 20 %": 0.8}
SEEDS = (0, 1, 2)
CALIBRATION = {"samples": 40, "steps": 20}
MS_SHARES = (0.25, 0.5, 0.75)  # of the way from the fastest plan to the most exact one


@dataclass(frozen=True)
class Entry:
    """One row: the budget, how formats are chosen within it, and the seed of the calibration."""

    budget: str
    way: str
    seed: int


def entries() -> list[Entry]:
    """All rows of a model, those that matter most first."""
    made = [Entry(name, "one format", 0) for name in UNIFORM]
    made += [Entry(name, "mixed", seed) for seed in SEEDS for name in ("int4", "int5", "int6", *SHARES)]
    made += [Entry(name, way, 0) for way in ("greedy", "random") for name in ("int4", "int5", "int6")]
    made += [Entry(name, "one format, GPTQ", 0) for name in UNIFORM]
    made += [Entry(name, "mixed, GPTQ", seed) for seed in SEEDS for name in ("int6", *SHARES, "int5", "int4")]
    return made + [
        Entry(name, way, seed)
        for seed in SEEDS[1:]
        for way in ("greedy", "random")
        for name in ("int4", "int5", "int6")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(tiny.NAMES), choices=tiny.NAMES)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ms", action="store_true", help="predicted and measured milliseconds instead")
    options = parser.parse_args()
    if options.ms:
        for model in options.models:
            for row in time_rows(model):
                rows.add(FILE, row | rows.stamp(), KEYS)
        return
    kernels_by_rank()
    for model in options.models:
        for entry in tqdm(entries(), desc=model):
            row = {"model": model, "budget": entry.budget, "way": entry.way, "calibration_seed": entry.seed}
            row |= {"prompts": options.prompts, "seed": options.seed, "weights": fingerprint(model)}
            with methods.claimed(" ".join(map(str, row.values())), wait=False) as mine:
                if mine and not any(all(old.get(key) == row[key] for key in SAME) for old in rows.read(FILE)):
                    row |= measure(model, entry, options) | rows.stamp()
                    with methods.claimed("mixed rows"):
                        rows.add(FILE, row, KEYS)
                    tqdm.write(
                        f"{model} {entry}: {row['psnr_db']:.2f} dB, {row['bytes'] / row['limit']:.4f} of the limit"
                    )


def measure(model: str, entry: Entry, options) -> dict:
    """The figures of one row."""
    pipe, (found, plans) = tiny.load(model), explored(model, entry.seed, options.prompts, options.seed)
    limit, chosen = _chosen(found, entry)
    if entry.way.endswith("GPTQ"):
        report = _fit(pipe, model, entry, limit, options)
    else:
        (part,) = plans
        report = dq.quantize(pipe, search.plans(found, plans, chosen, entry.budget)[part], progress=False)
    images, truth = methods.draw(pipe, model, options), methods.pictures(model, options)
    figures = psnr.score(images, truth) | feature_distance.score(images, truth)
    figures["psnr_db_median"] = float(psnr.per_picture(images, truth).median())
    figures |= {"bytes": report.bytes_after, "limit": limit, "metric": found.metric, "trust": found.trust}
    figures |= {"formats": _formats(pipe, plans)}
    if not entry.way.endswith("GPTQ"):
        figures["predicted_db"] = found.sqnr_db(chosen)
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in figures.items()}


def _fit(pipe, model: str, entry: Entry, limit: int, options) -> dq.Report:
    """Quantize with GPTQ: in one format, or under a budget."""
    given = calibration(model, entry.seed, options.prompts, options.seed)
    with methods.claimed(f"search {given.folder.name}"):
        if entry.way.startswith("mixed"):
            return dq.quantize(pipe, FITTED, calibration=given, budget=dq.Budget(bytes=limit), progress=False)
        weight, recipe = UNIFORM[entry.budget], cookbook.get(FITTED)
        pairs = {"linear": (weight, recipe.linear[1]), "conv": (weight, recipe.conv[1])}
        recipe = replace(recipe, **pairs, modulation=weight, edge=weight)
        return dq.quantize(pipe, recipe, calibration=given, progress=False)


def _chosen(found: search.Search, entry: Entry) -> tuple[int, search.Chosen]:
    """-> (bytes allowed, the plan)."""
    plain = charts.uniform(found)
    if entry.budget in SHARES:
        limit = int(SHARES[entry.budget] * found.bytes_of(plain[UNIFORM["int8"]]))
    else:
        limit = found.bytes_of(plain[UNIFORM[entry.budget]])
    budget = dq.Budget(bytes=limit)
    if entry.way.startswith("one format"):
        return limit, plain[UNIFORM[entry.budget]]
    if entry.way == "random":
        return limit, found.random(budget, entry.seed)
    return limit, (found.greedy if entry.way == "greedy" else found.choose)(budget)


def calibration(model: str, seed: int, count: int, evaluated: int) -> dq.Calibration:
    """On prompts that none of the evaluation's (`count` of them, from a seed) repeats; what is measured is kept."""
    options = argparse.Namespace(prompts=count, seed=evaluated)
    entry = methods.Entry("search", RECIPE, calibration=CALIBRATION | {"seed": seed})
    given = methods.calibration(model, entry, options, PROMPTS)
    return dq.Calibration(**{**vars(given), "folder": WORK / f"{model}-{fingerprint(model)}-{seed}"})


@cache
def explored(model: str, seed: int, count: int, evaluated: int, timed: bool = False) -> tuple[search.Search, dict]:
    """What a budget chooses from; see `calibration`."""
    given = calibration(model, seed, count, evaluated)
    with methods.claimed(f"search {given.folder.name}"):
        return api.explore(tiny.load(model), RECIPE, given, wish=sensing.Wish(timed=timed), progress=False)


def _formats(pipe, plans: Mapping[str, Plan]) -> dict[str, int]:
    """Layers of each format, and those the budget kept although the recipe's own plan has them."""
    (base,) = plans.values()
    plan = mark.plan_of(getattr(pipe, denoiser(pipe)))
    counts = Counter(str(layer.weight) for layer in plan.layers.values())
    return dict(counts) | {"kept": len(plan.kept.keys() - base.kept.keys())}


def time_rows(model: str) -> list[dict]:
    """Budgets in milliseconds: predicted, and measured on one recorded call of the quantized model."""
    found, plans = explored(model, 0, 256, 1, timed=True)
    (part,) = plans
    fast, exact = (found.ms_of(plan) for plan in (found.curve("ms", 2)[0], found.curve("ms", 2)[-1]))
    made = []
    for share in MS_SHARES:
        limit = fast + share * (exact - fast)
        chosen = found.choose(dq.Budget(ms_per_step=limit))
        pipe = tiny.load(model)
        dq.quantize(pipe, search.plans(found, plans, chosen, "time")[part], progress=False)
        ms = _step_ms(getattr(pipe, denoiser(pipe)), WORK / f"{model}-{fingerprint(model)}-0" / part)
        row = {"model": model, "budget": f"ms {share}", "way": "mixed", "calibration_seed": 0, "limit_ms": limit}
        row |= {"predicted_ms": found.ms_of(chosen), "measured_ms": ms, "threads": torch.get_num_threads()}
        print(f"{model}: limit {limit:.1f}, predicted {row['predicted_ms']:.1f}, measured {ms:.1f} ms")
        made.append(row | {"formats": _formats(pipe, plans)})
    return made


@torch.inference_mode()
def _step_ms(model: torch.nn.Module, folder: Path) -> float:
    args, kwargs = Predictions(model, Store(folder), 1).call(0)
    times = timing.in_turn({"step": lambda: model(*args, **kwargs)}, seconds=5)
    return statistics.median(times["step"])


if __name__ == "__main__":
    main()
