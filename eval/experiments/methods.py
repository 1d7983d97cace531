"""What calibrated recipes keep of the embedded models, beside plain rounding: `python -m eval.experiments.methods`.

A row per model and entry of ENTRIES: pictures of the held-out prompts against those of the fp32 model from the same
seeds, caption accuracy, and the error of the noise prediction on the fp32 run's own inputs. A baseline is a plan
derived from a calibrated one: same kept layers, groups and activations, nothing fitted. Rows go to
eval/results/methods.json and are kept while weights, method, prompts and seed are the same, so that a stopped run goes
on. Several processes may run at once, each takes rows that no other has; two with OMP_NUM_THREADS=1 suit two cores.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import dq
from dq import cookbook, disk
from dq.budget.choices import weight_bytes
from dq.host import mark
from dq.layers import packed_layers
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan
from eval.experiments import rows, versions
from eval.experiments.quality import decibels, denoiser, fingerprint, kernels
from eval.metrics import caption_accuracy, feature_distance, noise_sqnr
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "methods.json"
ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "methods"  # fp32 pictures, plans and locks, made again when missing
KEYS = ("model", "row", "prompts", "seed", "weights", "version")
BATCH = REPLAYED = 16  # prompts a call, and prompts whose calls are replayed: larger batches leave the cache
CALIBRATION = {"samples": 128, "steps": 20, "seed": 0}
CALIBRATION_PROMPTS, CALIBRATION_SEED = 32, 7
INT4_MORE = ("int4/group:32", "int4/group:16", "int4/group:8")
INT_WIDER = ("int5/group:64", "int6/group:64")


@dataclass(frozen=True)
class Entry:
    """One row for each model.

    recipe       the recipe's name; `baseline`: the method's BASELINE recipe in its place
    plain        round what the recipe's plan quantizes to nearest instead
    weights      with `plain`: formats for weights of under 8 bits; the first that takes at least the recipe's bytes
    options      changes to the recipe's options
    calibration  changes to the calibration
    against      the row it has to beat, by PSNR
    """

    name: str
    recipe: str
    plain: bool = False
    baseline: bool = False
    weights: tuple[str, ...] = ()
    options: Mapping = field(default_factory=dict)
    calibration: Mapping = field(default_factory=dict)
    against: str = ""
    models: tuple[str, ...] = tiny.NAMES

    def wanted(self) -> Recipe:
        """The recipe to quantize by; DQError or ImportError when this version has none."""
        recipe = cookbook.get(self.recipe)
        if self.baseline:
            recipe = importlib.import_module(f"dq.methods.{recipe.method}").BASELINE
        return replace(recipe, options={**recipe.options, **self.options}) if self.options else recipe


def _with_plain(recipe: str, **more) -> tuple[Entry, Entry]:
    name = f"plain of {recipe}"
    return Entry(recipe, recipe, against=name, **more), Entry(name, recipe, plain=True, **more)


ENTRIES = (
    Entry("int8", "int8"),
    *_with_plain("gptq-int4-weight"),
    *_with_plain("svdquant-int4"),
    Entry("svdquant-int4 without clipping", "svdquant-int4", options={"clip": False}),
    Entry("svdquant-int4 for rounded inputs", "svdquant-int4", options={"noise": True}, against="svdquant-int4"),
    Entry("plain of svdquant-int4, smaller groups", "svdquant-int4", plain=True, weights=INT4_MORE),
    Entry("plain of svdquant-int4, more bits", "svdquant-int4", plain=True, weights=INT_WIDER),
    *_with_plain("svdquant-nvfp4"),
    Entry("svdquant-int8", "svdquant-int8", against="int8"),
    *_with_plain("svdquant-w4a8"),
    Entry("svdquant-w4a8 for rounded inputs", "svdquant-w4a8", options={"noise": True}, against="svdquant-w4a8"),
    *_with_plain("gptq-w4a8"),
    Entry("gptq-w4a8 for rounded inputs", "gptq-w4a8", options={"noise": True}, against="gptq-w4a8"),
    Entry("comq-int4-weight", "comq-int4-weight", against="comq-int4-weight to nearest"),
    Entry("comq-int4-weight to nearest", "comq-int4-weight", options={"sweeps": 0}),
    Entry("comq-w4a8", "comq-w4a8", against="comq-w4a8 to nearest"),
    Entry("comq-w4a8 to nearest", "comq-w4a8", options={"sweeps": 0}),
    Entry("viditq-w8a8", "viditq-w8a8", against="int8"),
    *_with_plain("viditq-w4a8"),
    *_with_plain("qdiffusion-w4a8"),
    Entry("qdiffusion-w4a8 without split", "qdiffusion-w4a8", options={"splits": False}, models=("tiny-sd",)),
    Entry("ptq4dm-w8a8", "ptq4dm-w8a8", against="ptq4dm-w8a8 baseline", calibration={"policy": "normal"}),
    Entry("ptq4dm-w8a8 baseline", "ptq4dm-w8a8", baseline=True),
    Entry("tfmq-w8a8", "tfmq-w8a8", against="ptq4dm-w8a8 baseline"),
    *_with_plain("tfmq-w4a8"),
    Entry("tdq-w8a8", "tdq-w8a8", against="ptq4dm-w8a8 baseline"),
)
# why a row does not beat the one it is set `against`, by (model, row); docs/results/methods.md shows it
REASONS: dict[tuple[str, str], str] = {
    ("tiny-pixart", "viditq-w4a8"): "rounded to nearest, as published: noise 0.1 to 0.7 dB nearer, pictures not"
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(tiny.NAMES), choices=tiny.NAMES)
    parser.add_argument("--rows", nargs="+", default=None, help="names of ENTRIES, all by default")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure rows anew (one process)")
    parser.add_argument("--list", action="store_true", help="say which rows there are and which are measured")
    options = parser.parse_args()
    kernels_by_rank()
    known = [entry.name for entry in ENTRIES]
    for name in options.rows or []:
        if name not in known:
            parser.error(f"row {name!r} is unknown, expected one of {', '.join(known)}")
    failed = run(options)
    for reason in dict.fromkeys(failed.values()):
        print(f"no row {', '.join(name for name, why in failed.items() if why == reason)}: {reason}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def run(options) -> dict[str, str]:
    """Measure every row asked for that is neither there nor taken by another process; -> reasons by failed row."""
    asked = [entry for entry in ENTRIES if entry.name in (options.rows or [entry.name])]
    asked.sort(key=lambda entry: entry.plain)  # a derived plan waits for the calibrated one
    todo, failed = [], {}
    for model, entry in ((model, entry) for model in options.models for entry in asked if model in entry.models):
        try:
            todo.append((identity(model, entry, options), entry))  # before any work: the code as it is now
        except (dq.DQError, ImportError, AttributeError) as error:
            failed[f"{model} {entry.name}"] = str(error)
    for row, entry in tqdm(todo, desc="rows", disable=options.list):
        if options.list:
            print(f"{row['model']:12} {entry.name:44} {'measured' if _there(row) else 'to do'}")
        elif options.again or not _there(row):
            _take(row, entry, options, failed)
    return failed


def _take(row: dict, entry: Entry, options, failed: dict[str, str]) -> None:
    with claimed(f"{row['model']} {row['row']}", wait=False) as mine:
        if not mine or (_there(row) and not options.again):
            return
        try:
            row |= measure(row["model"], entry, options) | rows.stamp()
        except dq.DQError as error:
            failed[f"{row['model']} {row['row']}"] = str(error)
            return
        with claimed("rows"):
            rows.add(FILE, row, ("model", "row"))
        tqdm.write(f"{row['model']} {row['row']}: {row['psnr_db']:.2f} dB, accuracy {row['caption_accuracy']:.3f}")


def identity(model: str, entry: Entry, options) -> dict:
    """The figures a row is known by."""
    row = {"model": model, "row": entry.name, "recipe": entry.recipe, "prompts": options.prompts, "seed": options.seed}
    return row | {"weights": fingerprint(model), "version": version(entry)}


def _there(row: dict) -> bool:
    return any(all(old.get(key) == row[key] for key in KEYS) for old in rows.read(FILE))


def measure(model: str, entry: Entry, options) -> dict:
    """Quantize and compare with the fp32 model; the figures of one row."""
    pipe = tiny.load(model)
    plan = plain_plan(model, entry, options) if entry.plain else None
    figures = {"plan": None if plan is None else versions.crc(_code("") + json.dumps(plan.to_dict()["layers"]))}
    if plan is not None and (same := _same_plan(model, entry.name, figures["plan"], options)):
        return same
    if plan is None:
        with claimed(plan_file(model, entry).stem):
            report = calibrate(pipe, model, entry, options)
    else:
        report = dq.quantize(pipe, plan, progress=False)
    layers = packed_layers(getattr(pipe, denoiser(pipe)))
    figures |= {"seconds": round(report.seconds, 1), "candidates": report.candidates, "notes": report.notes}
    figures |= {"bits": bits({name: layer.plan for name, layer in layers.items()})}
    figures |= {"bytes": report.bytes_after, "fp32_bytes": report.bytes_before, "branch_share": branch_share(layers)}
    figures |= {"kernels": kernels(pipe), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}
    figures |= compare(pipe, model, options)
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in figures.items()}


def compare(pipe, model: str, options) -> dict:
    """Figures of pictures and predictions of a quantized pipeline."""
    truth, images = pictures(model, options), draw(pipe, model, options)
    captions, scenes = zip(*tiny.prompts(options.prompts, seed=options.seed), strict=True)
    figures = decibels(images, truth, captions) | feature_distance.score(images, truth)
    for key, found in (("caption_accuracy", images), ("caption_accuracy_fp32", truth)):
        figures[key] = caption_accuracy.score(found, scenes)["caption_accuracy"]
    calls = recorded(model, min(REPLAYED, options.prompts), options.seed)
    predictions = noise_sqnr.replay(getattr(pipe, denoiser(pipe)), calls)
    return figures | noise_sqnr.score(predictions, [call.prediction for call in calls])


def draw(pipe, model: str, options) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) of the evaluation prompts, each from a seed of its own."""
    captions = [caption for caption, _ in tiny.prompts(options.prompts, seed=options.seed)]
    return tiny.pictures(pipe, model, captions, options.seed, batch=BATCH)


def pictures(model: str, options) -> torch.Tensor:
    """The fp32 pictures, drawn once for all rows and processes."""
    path = WORK / f"{model}-{fingerprint(model)}-{options.prompts}-{options.seed}.safetensors"
    with claimed(path.stem):
        if not path.exists():
            disk.write(path, lambda fresh: save_file({"images": draw(tiny.load(model), model, options)}, fresh))
    return load_file(path)["images"]


@cache
def recorded(model: str, count: int, seed: int) -> list[noise_sqnr.Call]:
    """Denoiser calls of the fp32 model for the first `count` evaluation prompts, as one batch."""
    pipe, captions = tiny.load(model), [caption for caption, _ in tiny.prompts(count, seed=seed)]
    with noise_sqnr.record(getattr(pipe, denoiser(pipe))) as calls:
        tiny.pictures(pipe, model, captions, seed, batch=count)
    return calls


def calibrate(pipe, model: str, entry: Entry, options) -> dq.Report:
    """Quantize a pipeline by a recipe, with calibration if it needs any, and keep the plan for the baselines."""
    recipe = entry.wanted()
    given = calibration(model, entry, options) if recipe.needs_calibration else None
    report = dq.quantize(pipe, recipe, calibration=given, progress=False)
    disk.write(plan_file(model, entry), mark.plan_of(getattr(pipe, denoiser(pipe))).save)
    return report


def calibration(model: str, entry: Entry, options, count: int = CALIBRATION_PROMPTS):
    """`count` prompts that no evaluation prompt repeats, not even by the same words."""
    asked = {caption for caption, _ in tiny.prompts(options.prompts, seed=options.seed)}
    drawn = [caption for caption, _ in tiny.prompts(20 * CALIBRATION_PROMPTS, seed=CALIBRATION_SEED)]
    prompts = [caption for caption in dict.fromkeys(drawn) if caption not in asked][:count]
    call = {key: value for key, value in tiny.CALL[model].items() if key != "num_inference_steps"}
    return dq.Calibration(**{"prompts": prompts, "call_kwargs": call, **CALIBRATION, **entry.calibration})


def plan_file(model: str, entry: Entry) -> Path:
    """Where the plan that a calibrated recipe ended with is kept."""
    return WORK / f"{model}-{entry.recipe}-{fingerprint(model)}-{version(_calibrated(entry))}.json"


def _calibrated(entry: Entry) -> Entry:
    return replace(entry, plain=False, weights=())


def plain_plan(model: str, entry: Entry, options) -> Plan:
    """The baseline's plan, derived from the plan that the recipe ends with."""
    path = plan_file(model, entry)
    with claimed(path.stem):  # another process may be making it
        if not path.exists():
            calibrate(tiny.load(model), model, _calibrated(entry), options)
    final = Plan.load(path)
    for weight in entry.weights or (None,):
        plan = derived(final, entry.name, weight)
        if weight is None or packed_bytes(plan) >= packed_bytes(final):
            return plan
    raise dq.DQError(f"none of {', '.join(entry.weights)} takes the {packed_bytes(final)} bytes of {entry.recipe}")


def derived(final: Plan, name: str, weight: str | None = None) -> Plan:
    """A plan with the same layers, groups and activations and nothing fitted; `weight` for those of under 8 bits."""
    layers = {key: _plain(plan, weight) for key, plan in final.layers.items()}
    return replace(final, layers=layers, recipe=name, edges=())


def _plain(plan: LayerPlan, weight: str | None) -> LayerPlan:
    form = TensorPlan.parse(weight) if weight and plan.weight.spec.bits < 8 else plan.weight
    plain = replace(plan, weight=form, smooth=False, rotate=0, rank=0, splits=(), steps=1, reason="")
    if plan.act is None:
        return plain
    act = replace(plan.act, scale="dynamic", shift=0.0, clip=1.0)
    if plan.act.scale != "dynamic":
        act = replace(act, granularity="token" if plan.kind == "linear" else "tensor")
    return replace(plain, act=act)


def packed_bytes(plan: Plan) -> int:
    """Bytes of the packed tensors under a plan with fp32 as compute dtype, biases not counted."""
    return sum(weight_bytes(layer, torch.float32) for layer in plan.layers.values())


def _same_plan(model: str, name: str, plan: str, options) -> dict | None:
    """Figures of another row that was measured with the same plan: recipes may share their baseline."""
    mine = [model, fingerprint(model), options.prompts, options.seed, plan]
    for old in rows.read(FILE):
        if old["row"] != name and mine == [old.get(k) for k in ("model", "weights", "prompts", "seed", "plan")]:
            known = ("row", "recipe", "version")
            return {key: value for key, value in old.items() if key not in known} | {"same_as": old["row"]}
    return None


def bits(plans: Mapping[str, LayerPlan]) -> str:
    """Bits of most weights and of their activations: W4A8, or W4 with activations in floating point; convs apart."""
    sizes: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for plan in plans.values():
        act = f"A{plan.act.spec.bits}" if plan.act else ""
        sizes[plan.kind.startswith("conv")][f"W{plan.weight.spec.bits}{act}"] += plan.rows * plan.columns
    linear, conv = (counter.most_common(1)[0][0] if counter else "" for counter in sizes.values())
    return linear if conv in ("", linear) else f"{linear}, convolutions {conv}"


def branch_share(layers: Mapping[str, torch.nn.Module]) -> float:
    """Bytes of the low-rank factors as a share of all bytes of packed layers."""
    sizes: Counter[bool] = Counter()
    for layer in layers.values():
        for name, value in layer.named_parameters(recurse=False):
            sizes[name in ("proj_down", "proj_up")] += value.numel() * value.element_size()
    return sizes[True] / sizes.total()


@contextlib.contextmanager
def claimed(name: str, wait: bool = True) -> Iterator[bool]:
    """Hold a name against other processes; False without waiting when one holds it. Ends with the process."""
    with disk.locked(WORK / "locks" / re.sub(r"[^\w.-]+", "_", name), wait) as mine:
        yield mine


def roots(method: str) -> list[Path]:
    """Files of dq that, with what they import, decide what a recipe of a method ("": data-free) makes of a model."""
    home = ROOT / "dq"
    found = [
        *(home / "formats").glob("*.py"),
        *(home / "kernels").glob("*.py"),
        home / "cookbook.py",
        home / "planning.py",
    ]
    if method:
        found += [home / "methods" / f"{method}.py", home / "fit" / "walk.py"]
        found += [home / "trace" / name for name in ("walk.py", "capture.py")]
    return found


@cache
def _code(method: str) -> str:
    return versions.code(roots(method))


def version(entry: Entry) -> str:
    """Changes when the code or the options behind an entry do."""
    recipe = entry.wanted()
    asked = [recipe.to_dict(), entry.plain, entry.weights, dict(entry.calibration), CALIBRATION, CALIBRATION_PROMPTS]
    return versions.crc(_code(recipe.method) + json.dumps(asked, default=str, sort_keys=True))


if __name__ == "__main__":
    main()
