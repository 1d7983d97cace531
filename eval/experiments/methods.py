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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dq.methods import pvtuning, qua2sedimo, quest, qvgen
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan
from eval.experiments import rows, versions
from eval.experiments.quality import decibels, denoiser, fingerprint, kernels
from eval.metrics import (
    caption_accuracy,
    dynamic_degree,
    feature_distance,
    flicker,
    motion_accuracy,
    motion_smoothness,
    noise_sqnr,
)
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "methods.json"
ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "methods"  # fp32 pictures, plans and locks, made again when missing
KEYS = ("model", "row", "prompts", "seed", "weights", "version")
BATCH = REPLAYED = 16  # prompts a call, and prompts whose calls are replayed: larger batches leave the cache
CALIBRATION = {"samples": 128, "steps": 20, "seed": 0}
CALIBRATION_PROMPTS, CALIBRATION_SEED = 32, 7
TUNING = [ROOT / "dq" / name for name in ("fit/distill.py", "fit/steps.py", "trace/pairs.py")]  # and what they import
CODES_KEPT = ("scales", "branch", "bias", "smooth", "act")
INT4_MORE = ("int4/group:32", "int4/group:16", "int4/group:8")
INT_WIDER = ("int5/group:64", "int6/group:64")


@dataclass(frozen=True)
class Entry:
    """One row for each model.

    recipe       the recipe's name; `baseline`: the method's BASELINE recipe in its place
    plain        round what the recipe's plan quantizes to nearest instead
    weights      with `plain`: formats for weights of under 8 bits; the first that takes at least the recipe's bytes.
                 Without: the one format of all weights
    formats      with `plain`: formats in place of others, by name, of weights and activations
    options      changes to the recipe's options
    act          format of all rounded activations, in place of the recipe's
    fields       changes to the recipe's fields
    calibration  changes to the calibration
    against      the row it has to beat, by PSNR
    bits         a budget of so many bits a weight
    tune         fields of a dq.Tune that comes after
    """

    name: str
    recipe: str
    plain: bool = False
    baseline: bool = False
    weights: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    options: Mapping = field(default_factory=dict)
    calibration: Mapping = field(default_factory=dict)
    against: str = ""
    bits: float | None = None
    models: tuple[str, ...] = tiny.NAMES
    act: str = ""
    fields: Mapping = field(default_factory=dict)
    tune: Mapping = field(default_factory=dict)

    def wanted(self) -> Recipe:
        """The recipe to quantize by; DQError or ImportError when this version has none."""
        recipe = replace(cookbook.get(self.recipe), **self.fields)
        if self.baseline:
            recipe = importlib.import_module(f"dq.methods.{recipe.method}").BASELINE
        if self.act:
            recipe = replace(recipe, linear=(recipe.linear[0], self.act), conv=(recipe.conv[0], self.act))
        if self.weights and not self.plain:
            (form,) = self.weights
            pairs = {"linear": (form, recipe.linear[1]), "conv": (form, recipe.conv[1])}
            recipe = replace(recipe, **pairs, modulation=form, edge=form)
        return replace(recipe, options={**recipe.options, **self.options}) if self.options else recipe


def with_plain(recipe: str, **more) -> tuple[Entry, Entry]:
    name = f"plain of {recipe}"
    return Entry(recipe, recipe, against=name, **more), Entry(name, recipe, plain=True, **more)


def with_fp8(recipe: str) -> tuple[Entry, Entry]:
    """A recipe of HiF8 and the same of e4m3."""
    name = f"{recipe} in fp8"
    return Entry(recipe, recipe, against=name), Entry(name, recipe, plain=True, formats={"hif8": "fp8"})


def _with_one_range(recipe: str) -> tuple[Entry, Entry]:
    """A recipe with a table of ranges, and the same with one range for all steps."""
    name, act = f"{recipe} in one range", cookbook.get(recipe).linear[1].replace("table", "static")
    return Entry(recipe, recipe, against=name), Entry(name, recipe, act=act)


def _with_one_width(recipe: str, weight: str) -> tuple[Entry, Entry, Entry]:
    """A recipe that mixes weight formats, the same with one that fits its budget, and its plan with nothing fitted."""
    name = f"{recipe} in one width"
    one = Entry(name, recipe, options={"choices": (weight,)})
    return Entry(recipe, recipe, against=name), one, Entry(f"plain of {recipe}", recipe, plain=True)


def _with_groups_off(recipe: str) -> tuple[Entry, Entry, Entry]:
    """A recipe with groups of channels, the same without, and with as many that are not clusters."""
    name = f"{recipe} without groups"
    off = Entry(name, recipe, options={"groups": 1})
    return Entry(recipe, recipe, against=name), off, Entry(f"{recipe} in order", recipe, options={"permute": False})


def _with_control(recipe: str, what: str, **options) -> tuple[Entry, Entry]:
    """A recipe and the same with its own idea switched off, all else equal."""
    name = f"{recipe} {what}"
    return Entry(recipe, recipe, against=name), Entry(name, recipe, options=options)


def _in_one_way(recipe: str) -> tuple[Entry, Entry]:
    """A recipe that chooses among ways of rounding, and the same with uniform steps only."""
    name = f"{recipe} in one way"
    return Entry(recipe, recipe, against=name), Entry(name, recipe, options={"choices": qua2sedimo.UNIFORM})


# the 8-bit steps of a recipe whose late ones have them, as many, at the beginning of the run
EARLY8 = {"linear": ("int4/group:64", "int8/token"), "late": ("int4/group:64",), "switch": (1 / 3,)}
FROM_NEAREST = {"start": "nearest"}
DIT = ("tiny-pixart",)  # of models with transformer blocks in a list
# in place of a rule: its late format from half of the steps on or until then (the mean bits of the rule), or never
LATE_HALF = {"route": 0.0, "switch": (0.5,)}
EARLY_HALF = {"route": 0.0, "switch": (0.5,), "linear": ("int4/group:64", "int8/token"), "late": ("int4/group:64",)}
NO_RULE = {"route": 0.0, "late": ()}


def _with_learning_off(recipe: str, what: str, **options) -> tuple[Entry, ...]:
    """As `_with_control`, and both once more from nearest rounding, as published: GPTQ leaves less to learn."""
    near = f"{recipe} from nearest"
    off = Entry(f"{near}, {what}", recipe, options={**FROM_NEAREST, **options})
    return *_with_control(recipe, what, **options), Entry(near, recipe, options=FROM_NEAREST, against=off.name), off


def with_tuning_changed(recipe: str, what: str, **tune) -> tuple[Entry, Entry]:
    """A recipe that brings a tuning along, and the same updates with its own idea off."""
    name, own = f"{recipe} {what}", cookbook.get(recipe).options["tune"]
    return Entry(recipe, recipe, against=name), Entry(name, recipe, options={"tune": {**own, **tune}})


ENTRIES = (
    Entry("int8", "int8"),
    *with_plain("gptq-int4-weight"),
    Entry("gptq-int4-weight in 3 bits", "gptq-int4-weight", weights=("int3/group:64",)),
    Entry("gptq-int4-weight in 2 bits", "gptq-int4-weight", weights=("int2/group:64",)),
    *with_plain("svdquant-int4"),
    Entry("svdquant-int4 with clipping", "svdquant-int4", options={"clip": True}, against="svdquant-int4"),
    Entry("svdquant-int4 for rounded inputs", "svdquant-int4", options={"noise": True}, against="svdquant-int4"),
    Entry("svdquant-int4-late8", "svdquant-int4-late8", against="svdquant-int4-late8, early instead"),
    Entry("svdquant-int4-late8, early instead", "svdquant-int4-late8", fields=EARLY8),
    Entry("sixbit-int4", "sixbit-int4", against="sixbit-int4, late half", models=DIT),
    Entry("sixbit-int4, late half", "sixbit-int4", fields=LATE_HALF, models=DIT),
    Entry("sixbit-int4, early half", "sixbit-int4", fields=EARLY_HALF, models=DIT),
    Entry("sixbit-int4, layers chosen once", "sixbit-int4", options={"follow": False}, models=DIT),
    Entry("sixbit-int4, no rule", "sixbit-int4", fields=NO_RULE, models=DIT),
    Entry("svdquant-int4+sixbit", "svdquant-int4+sixbit", against="svdquant-int4, late half", models=DIT),
    Entry("svdquant-int4, late half", "svdquant-int4-late8", fields={"switch": (0.5,)}, models=DIT),
    Entry("svdquant-int4 tuned", "svdquant-int4", tune={"minutes": 20}, against="svdquant-int4"),
    Entry("svdquant-int4 tuned, codes kept", "svdquant-int4", tune={"minutes": 20, "parts": CODES_KEPT}),
    Entry("svdquant-int4 tuned, steps by the end", "svdquant-int4", tune={"minutes": 20, "loss": "ends"}),
    Entry("svdquant-int4 tuned, guided loss", "svdquant-int4", tune={"minutes": 20, "loss": "guided"}),
    *with_tuning_changed("efficientdm-w4a4", "with one rate for all", aware=False),
    *with_tuning_changed("efficientdm-w4a8", "with one rate for all", aware=False),
    *with_tuning_changed("quest-w4a4", "in all layers at once", stages=quest.EVERYWHERE),
    *with_tuning_changed("quest-w4a8", "in all layers at once", stages=quest.EVERYWHERE),
    *with_tuning_changed("qvgen-w4a4", "without help", parts=qvgen.PLAIN),
    *with_tuning_changed("qvgen-w3a3", "without help", parts=qvgen.PLAIN),
    *with_tuning_changed("pvtuning-w2", "with codes kept", parts=pvtuning.CODES_KEPT),
    Entry("hif8-tuned", "hif8-tuned", against="hif8"),
    Entry("plain of svdquant-int4, smaller groups", "svdquant-int4", plain=True, weights=INT4_MORE),
    Entry("plain of svdquant-int4, more bits", "svdquant-int4", plain=True, weights=INT_WIDER),
    *with_plain("svdquant-nvfp4"),
    Entry("svdquant-int8", "svdquant-int8", against="int8"),
    *with_plain("svdquant-w4a8"),
    Entry("svdquant-mp-w4a4", "svdquant-mp-w4a4", against="svdquant-int4"),
    Entry("svdquant-mp-w4a8", "svdquant-mp-w4a8", against="svdquant-w4a8"),
    Entry("svdquant-w4a8 for rounded inputs", "svdquant-w4a8", options={"noise": True}, against="svdquant-w4a8"),
    *with_plain("gptq-w4a8"),
    Entry("gptq-w4a8 for rounded inputs", "gptq-w4a8", options={"noise": True}, against="gptq-w4a8"),
    Entry("comq-int4-weight", "comq-int4-weight", against="comq-int4-weight to nearest"),
    Entry("comq-int4-weight to nearest", "comq-int4-weight", options={"sweeps": 0}),
    Entry("comq-w4a8", "comq-w4a8", against="comq-w4a8 to nearest"),
    Entry("comq-w4a8 to nearest", "comq-w4a8", options={"sweeps": 0}),
    Entry("viditq-w8a8", "viditq-w8a8", against="int8"),
    *with_plain("viditq-w4a8"),
    *with_plain("qdiffusion-w4a8"),
    Entry("qdiffusion-w4a8 without split", "qdiffusion-w4a8", options={"splits": False}, models=("tiny-sd",)),
    Entry("qdiffusion-w4a8, nothing learned", "qdiffusion-w4a8", options={"steps": 0}),
    Entry(
        "qdiffusion-w4a8 from nearest",
        "qdiffusion-w4a8",
        options=FROM_NEAREST,
        against="qdiffusion-w4a8, plain nearest",
    ),
    Entry("qdiffusion-w4a8, plain nearest", "qdiffusion-w4a8", options={**FROM_NEAREST, "steps": 0}),
    Entry("ptq4dm-w8a8", "ptq4dm-w8a8", against="ptq4dm-w8a8 baseline", calibration={"policy": "normal"}),
    Entry("ptq4dm-w8a8 baseline", "ptq4dm-w8a8", baseline=True),
    Entry("tfmq-w8a8", "tfmq-w8a8", against="ptq4dm-w8a8 baseline"),
    *with_plain("tfmq-w4a8"),
    Entry("tfmq-w4a8, time in the blocks", "tfmq-w4a8", options={"temporal": False}),
    Entry("tdq-w8a8", "tdq-w8a8", against="ptq4dm-w8a8 baseline"),
    Entry("vq4dit-w2", "vq4dit-w2", against="vq4dit-w2, codebook only"),
    Entry("vq4dit-w2, codebook only", "vq4dit-w2", options={"candidates": 1}),
    Entry("vq4dit-w2 from nearest", "vq4dit-w2", options=FROM_NEAREST),
    Entry("vq4dit-w2, k-means only", "vq4dit-w2", options={**FROM_NEAREST, "steps": 0}),
    Entry("vq4dit-w3", "vq4dit-w3", against="vq4dit-w3, codebook only"),
    Entry("vq4dit-w3, codebook only", "vq4dit-w3", options={"candidates": 1}),
    Entry("vptq-w2", "vptq-w2", against="vptq-w2 without compensation"),
    Entry("vptq-w2 without compensation", "vptq-w2", options={"compensate": False}),
    *with_fp8("hif8"),
    *with_fp8("hif8-weight"),
    Entry("tdq-w8a8 of 8 steps", "tdq-w8a8", against="tfmq-w8a8 of 8 steps", calibration={"steps": 8}),
    Entry("tfmq-w8a8 of 8 steps", "tfmq-w8a8", calibration={"steps": 8}),
    *_with_one_range("tdq-w8a6"),
    *_with_one_range("tdq-w4a6"),
    *_with_one_range("tfmq-w4a6"),
    *with_plain("ptq4dm-w6a6", calibration={"policy": "normal"}),
    *_with_groups_off("dgq-w4a8"),
    *_with_groups_off("dgq-w4a6"),
    *_in_one_way("qua2sedimo-w4"),
    *_in_one_way("qua2sedimo-w3.7"),
    *_with_one_width("mixdq-w5a8", "int5/channel"),
    *_with_one_width("mixdq-w4a8", "int4/channel"),
    *_with_one_width("viditq-mp-w4a8", "int5/channel"),
    *_with_learning_off("fp4dit-w4a6", "not scale-aware", scale_aware=False),
    Entry("fp4dit-w4a6 in one format", "fp4dit-w4a6", options={"formats": False}),
    *_with_learning_off("fp4dit-w4a8", "not scale-aware", scale_aware=False),
    Entry("fp4dit-w4a8 in one format", "fp4dit-w4a8", options={"formats": False}),
    *_with_learning_off("lowbitfp-w4a8", "without learned rounding", steps=0),
    Entry("lowbitfp-w4a8 in one format", "lowbitfp-w4a8", options={"formats": False}),
    *_with_control("lowbitfp-w8a8", "in one format", formats=False),
    *_with_control("llmfp4-w4a4", "without shift", shift=False),
    Entry("llmfp4-w4a4 in one format", "llmfp4-w4a4", options={"formats": False}),
    *_with_control("llmfp4-w4a8", "without shift", shift=False),
    Entry("lrqdit-w4a4", "lrqdit-w4a4", against="lrqdit-w4a4 without logarithms"),
    Entry("lrqdit-w4a4 without logarithms", "lrqdit-w4a4", options={"log": False}),
    Entry("lrqdit-w4a4 without rotation", "lrqdit-w4a4", options={"rotate": False}),
    Entry("lrqdit-w3a4", "lrqdit-w3a4", against="lrqdit-w3a4 without logarithms"),
    Entry("lrqdit-w3a4 without logarithms", "lrqdit-w3a4", options={"log": False}),
    Entry("squeezellm-w3", "squeezellm-w3", against="squeezellm-w3 without sensitivity"),
    Entry("squeezellm-w3 without sensitivity", "squeezellm-w3", options={"count": ""}),
    Entry("squeezellm-w3 with GPTQ", "squeezellm-w3", options={"round": "gptq"}),
    Entry("plain int3 of squeezellm-w3", "squeezellm-w3", plain=True, weights=("int3/group:64",)),
)
# why a row does not beat the one it is set `against`, by (model, row); docs/results/methods.md shows it
NOTHING_LEFT = "after GPTQ no block gains by learned rounding, so that nothing of it is kept: the same figures"
LOGS = "weights here are like normal ones, to which an even grid of as many codes is nearer: the log has the units"
RANKED_BY_LUCK = "its regression ranks plans no better than luck, and 4 bits with scales leave most layers 3"
WEIGHTS_REMAIN = "4-bit weights leave the noise: a table takes 0.1 dB of it away, pictures differ by luck"
REASONS: dict[tuple[str, str], str] = {
    ("tiny-pixart", "fp4dit-w4a6"): NOTHING_LEFT,
    ("tiny-pixart", "lowbitfp-w4a8"): NOTHING_LEFT,
    ("tiny-pixart", "lrqdit-w4a4"): LOGS,
    ("tiny-pixart", "lrqdit-w3a4"): LOGS,
    ("tiny-pixart", "tdq-w4a6"): WEIGHTS_REMAIN,
    ("tiny-pixart", "tfmq-w4a6"): WEIGHTS_REMAIN,
    ("tiny-pixart", "qua2sedimo-w4"): RANKED_BY_LUCK,
    ("tiny-pixart", "mixdq-w4a8"): "4.25 bits are 0.11 more than int4 everywhere: there is next to nothing to mix",
    ("tiny-pixart", "viditq-w4a8"): "rounded to nearest, as published: noise 0.1 to 0.7 dB nearer, pictures not",
}


def main() -> None:
    command(__doc__, tiny.NAMES, ENTRIES, FILE, measure)


Measure = Callable[[str, Entry, argparse.Namespace], dict]


def command(
    doc: str, models: Sequence[str], entries: Sequence[Entry], file: Path, measured: Measure, prompts: int = 256
) -> None:
    """The command line of a file of such rows, of so many prompts by default; exits with 1 when one has no figures."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(models), choices=models)
    parser.add_argument("--rows", nargs="+", default=None, help="names of ENTRIES, all by default")
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure rows anew (one process)")
    parser.add_argument("--list", action="store_true", help="say which rows there are and which are measured")
    options = parser.parse_args()
    kernels_by_rank()
    known = [entry.name for entry in entries]
    for name in options.rows or []:
        if name not in known:
            parser.error(f"row {name!r} is unknown, expected one of {', '.join(known)}")
    for name in options.models:
        if not tiny.shipped((name,)):
            parser.error(f"the files of {name} are not in {str(tiny.folder(name))!r}")
    failed = run(options, entries, file, measured)
    for reason in dict.fromkeys(failed.values()):
        print(f"no row {', '.join(name for name, why in failed.items() if why == reason)}: {reason}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def run(options, entries: Sequence[Entry], file: Path, measured: Measure) -> dict[str, str]:
    """Measure every row asked for that is neither there nor taken by another process; -> reasons by failed row."""
    asked = [entry for entry in entries if entry.name in (options.rows or [entry.name])]
    asked.sort(key=lambda entry: entry.plain)  # a derived plan waits for the calibrated one
    todo, failed = [], {}
    for model, entry in ((model, entry) for model in options.models for entry in asked if model in entry.models):
        try:
            todo.append((identity(model, entry, options), entry))  # before any work: the code as it is now
        except (dq.DQError, ImportError, AttributeError) as error:
            failed[f"{model} {entry.name}"] = str(error)
    for row, entry in tqdm(todo, desc="rows", disable=options.list):
        if options.list:
            print(f"{row['model']:12} {entry.name:44} {'measured' if _there(row, file) else 'to do'}")
        elif options.again or not _there(row, file):
            with claimed(f"{row['model']} {row['row']}", wait=False) as mine:
                if mine and (options.again or not _there(row, file)):
                    failed |= _added(row, entry, options, file, measured)
    return failed


def _added(row: dict, entry: Entry, options, file: Path, measured: Measure) -> dict[str, str]:
    try:
        row |= measured(row["model"], entry, options) | rows.stamp()
    except dq.DQError as error:
        return {f"{row['model']} {row['row']}": str(error)}
    with claimed("rows"):
        rows.add(file, row, ("model", "row"))
    shown = "caption_accuracy" if "caption_accuracy" in row else "motion_accuracy"
    tqdm.write(f"{row['model']} {row['row']}: {row['psnr_db']:.2f} dB, {shown.replace('_', ' ')} {row[shown]:.3f}")
    return {}


def identity(model: str, entry: Entry, options) -> dict:
    """The figures a row is known by."""
    row = {"model": model, "row": entry.name, "recipe": entry.recipe, "prompts": options.prompts, "seed": options.seed}
    return row | {"weights": fingerprint(model), "version": version(entry)}


def _there(row: dict, file: Path) -> bool:
    return any(all(old.get(key) == row[key] for key in KEYS) for old in rows.read(file))


def measure(model: str, entry: Entry, options) -> dict:
    """Quantize and compare with the fp32 model; the figures of one row."""
    plan = plain_plan(model, entry, options) if entry.plain else None
    figures = {"plan": None if plan is None else versions.crc(_code("") + json.dumps(plan.to_dict()["layers"]))}
    if plan is not None and (same := _same_plan(model, entry.name, figures["plan"], options)):
        return same
    pipe = tiny.load(model)
    figures |= quantized(pipe, model, entry, options, plan) | compare(pipe, model, options)
    return rounded(figures)


def rounded(figures: Mapping) -> dict:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in figures.items()}


def quantized(pipe, model: str, entry: Entry, options, plan: Plan | None = None) -> dict:
    """Quantize a pipeline by a plan, or else as an entry says; seconds, bits, bytes and kernels."""
    if plan is None:
        with claimed(plan_file(model, entry).stem):
            report = calibrate(pipe, model, entry, options)
    else:
        report = dq.quantize(pipe, plan, progress=False)
    layers = packed_layers(getattr(pipe, denoiser(pipe)))
    figures = {"seconds": round(report.seconds, 1), "candidates": report.candidates, "notes": report.notes}
    figures |= {"bits": bits({name: layer.plan for name, layer in layers.items()})}
    figures |= {"bytes": report.bytes_after, "fp32_bytes": report.bytes_before, "branch_share": branch_share(layers)}
    return figures | {
        "kernels": kernels(pipe),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def compare(pipe, model: str, options) -> dict:
    """Figures of pictures and predictions of a quantized pipeline."""
    truth, images = pictures(model, options), draw(pipe, model, options)
    captions, labels = zip(*grammar(model)(options.prompts, seed=options.seed), strict=True)
    if model in tiny.VIDEOS:
        figures = of_clips(images, truth, captions, labels)
    else:
        figures = decibels(images, truth, captions) | feature_distance.score(images, truth)
        for key, found in (("caption_accuracy", images), ("caption_accuracy_fp32", truth)):
            figures[key] = caption_accuracy.score(found, labels)["caption_accuracy"]
    calls = recorded(model, min(REPLAYED, options.prompts), options.seed)
    predictions = noise_sqnr.replay(getattr(pipe, denoiser(pipe)), calls)
    return figures | noise_sqnr.score(predictions, [call.prediction for call in calls])


def of_clips(clips: torch.Tensor, truth: torch.Tensor, captions: Sequence[str], labels: Sequence) -> dict:
    """Figures of clips (N, 8, 3, 64, 64): decibels over frames, added flicker, and motion beside that of the truth."""
    figures = decibels(clips.flatten(0, 1), truth.flatten(0, 1), [text for text in captions for _ in truth[0]])
    figures |= flicker.score(clips, truth)
    for suffix, found in (("", clips), ("_fp32", truth)):
        seen = motion_accuracy.score(found, labels)
        seen |= dynamic_degree.score(found) | motion_smoothness.score(found)
        figures |= {f"{key}{suffix}": value for key, value in seen.items()}
    return figures


def grammar(model: str) -> Callable:
    """What draws held-out captions of a model with their labels."""
    return tiny.motions if model in tiny.VIDEOS else tiny.prompts


def draw(pipe, model: str, options) -> torch.Tensor:
    """Pictures (N, 3, 64, 64), or clips (N, 8, 3, 64, 64), of the evaluation prompts, each from a seed of its own."""
    captions = [caption for caption, _ in grammar(model)(options.prompts, seed=options.seed)]
    return drawn(pipe, model, captions, options.seed, BATCH)


def drawn(pipe, model: str, captions: list[str], seed: int, batch: int) -> torch.Tensor:
    return (tiny.clips if model in tiny.VIDEOS else tiny.pictures)(pipe, model, captions, seed, batch=batch)


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
    pipe, captions = tiny.load(model), [caption for caption, _ in grammar(model)(count, seed=seed)]
    with noise_sqnr.record(getattr(pipe, denoiser(pipe))) as calls:
        drawn(pipe, model, captions, seed, count)
    return calls


def calibrate(pipe, model: str, entry: Entry, options) -> dq.Report:
    """Quantize a pipeline by a recipe, with calibration if it needs any, and keep the plan for the baselines."""
    recipe, budget = entry.wanted(), dq.Budget(bits=entry.bits) if entry.bits else None
    tune = dq.Tune(**entry.tune) if entry.tune else None
    given = calibration(model, entry, options) if recipe.needs_calibration or budget or tune else None
    report = dq.quantize(pipe, recipe, calibration=given, budget=budget, tune=tune, progress=False)
    disk.write(plan_file(model, entry), mark.plan_of(getattr(pipe, denoiser(pipe))).save)
    return report


def calibration(model: str, entry: Entry, options, count: int = CALIBRATION_PROMPTS):
    """`count` prompts that no evaluation prompt repeats, not even by the same words."""
    asked = {caption for caption, _ in grammar(model)(options.prompts, seed=options.seed)}
    others = [caption for caption, _ in grammar(model)(20 * CALIBRATION_PROMPTS, seed=CALIBRATION_SEED)]
    prompts = [caption for caption in dict.fromkeys(others) if caption not in asked][:count]
    call = {key: value for key, value in tiny.CALL[model].items() if key != "num_inference_steps"}
    return dq.Calibration(**{"prompts": prompts, "call_kwargs": call, **CALIBRATION, **entry.calibration})


def plan_file(model: str, entry: Entry) -> Path:
    """Where the plan that a calibrated recipe ended with is kept."""
    return WORK / f"{model}-{entry.recipe}-{fingerprint(model)}-{version(_calibrated(entry))}.json"


def _calibrated(entry: Entry) -> Entry:
    return replace(entry, plain=False, weights=(), formats={}) if entry.plain else entry


def plain_plan(model: str, entry: Entry, options) -> Plan:
    """The baseline's plan, derived from the plan that the recipe ends with."""
    path = plan_file(model, entry)
    with claimed(path.stem):  # another process may be making it
        if not path.exists():
            calibrate(tiny.load(model), model, _calibrated(entry), options)
    final = Plan.load(path)
    for weight in entry.weights or (None,):
        plan = derived(final, entry.name, weight, entry.formats)
        if weight is None or packed_bytes(plan) >= packed_bytes(final):
            return plan
    raise dq.DQError(f"none of {', '.join(entry.weights)} takes the {packed_bytes(final)} bytes of {entry.recipe}")


def derived(final: Plan, name: str, weight: str | None = None, formats: Mapping[str, str] | None = None) -> Plan:
    """A plan with the same layers, groups and activations and nothing fitted; `weight` for those of under 8 bits,
    `formats` in place of others."""
    layers = {key: _plain(plan, weight, formats or {}) for key, plan in final.layers.items()}
    return replace(final, layers=layers, recipe=name, edges=())


def _plain(plan: LayerPlan, weight: str | None, formats: Mapping[str, str]) -> LayerPlan:
    form = TensorPlan.parse(weight) if weight and plan.weight.spec.bits_per_weight < 8 else plan.weight
    form = replace(form, format=formats.get(form.format, form.format))
    plain = replace(plan, weight=form, smooth=False, rotate=0, rank=0, splits=(), steps=1, reason="")
    if plan.act is None:
        return plain
    act, *late = [
        replace(act, format=formats.get(act.format, act.format), scale="dynamic", shift=0.0, clip=1.0)
        for act in (plan.act, *plan.late)
    ]
    plain = replace(plain, late=tuple(late))
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
        act = "A" + "-".join(str(each.spec.bits) for each in (plan.act, *plan.late)) if plan.act else ""
        sizes[plan.kind.startswith("conv")][f"W{plan.weight.spec.bits_per_weight:g}{act}"] += plan.rows * plan.columns
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
    asked += [dict(entry.formats)] if entry.formats else []
    code = _code(recipe.method)
    if entry.tune or "tune" in recipe.options:
        asked.append(dict(entry.tune))
        code += versions.code(TUNING)
    if entry.bits:
        asked.append(entry.bits)
        code += versions.code((ROOT / "dq" / "budget").glob("*.py"))
    return versions.crc(code + json.dumps(asked, default=str, sort_keys=True))


if __name__ == "__main__":
    main()
