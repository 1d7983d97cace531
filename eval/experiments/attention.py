"""Rounded attention on an embedded model: `python -m eval.experiments.attention`; rows in eval/results/attention.json.

"calls": decibels that plans leave at the output of attention itself, in the full-precision model, over recorded calls
of guided runs: from the least cosine c of each module, -10 log10(2 - 2 c), the mean over modules that attend to the
picture and over those that attend to the text. "pictures": PSNR to full precision of the same noise, layers in int8,
attention emulated in every row. Under each system stand its controls, its own idea switched off and all else equal.
"""

import argparse
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import mean

import dq
from dq import cookbook, planning
from dq.attentionplan import INT8, WISHES, AttentionPlan
from dq.fit import attention
from dq.host import mark
from dq.layers import attending
from dq.plan import Recipe
from dq.trace import capture
from dq.trace.records import Store
from eval.experiments import methods, rows, versions
from eval.experiments.quality import decibels, fingerprint
from eval.metrics import caption_accuracy
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "attention.json"
CALIBRATED = 8  # prompts
SAGE2, EIGHT = WISHES["sage2"].choices
DGQ = WISHES["dgq"].choices[0]
CALLS: Mapping[str, AttentionPlan] = {
    "sageattention2": SAGE2,
    "sageattention2, a scale a token": replace(SAGE2, q="int4/token", k="int4/token"),
    "sageattention2, a scale a block": replace(SAGE2, q="int4/block", k="int4/block"),
    "sageattention2, queries not smoothed": replace(SAGE2, smooth="k"),
    "sageattention2, keys not smoothed": replace(SAGE2, smooth="q"),
    "sageattention2, neither smoothed": replace(SAGE2, smooth=""),
    "sageattention2 in 8 bits": EIGHT,
    "sageattention2 in 8 bits, not smoothed": replace(EIGHT, smooth=""),
    "sageattention-int8": INT8,
    "qdiffusion-attention: sageattention-int8, not smoothed": replace(INT8, smooth=""),
    "dgq-attention": DGQ,
    "dgq-attention, start token not apart": replace(DGQ, start=False),
    "dgq-attention, linear": replace(DGQ, p="uint8"),
    **{f"shares alone: {p}, start apart": AttentionPlan(p=p, start=True) for p in ("uint4", "log4/1", "log4/0.5")},
    **{f"shares alone: {p}": AttentionPlan(p=p) for p in ("uint3", "log3/1", "uint4", "log4/1", "log4/0.5")},
}
PICTURES: Mapping[str, tuple[str, AttentionPlan | None]] = {  # recipe, and what every module becomes without its rule
    "int8": ("int8", None),
    "sageattention2": ("sageattention2", None),
    "sageattention2, no rule": ("sageattention2", SAGE2),
    "sageattention2, no rule, not smoothed": ("sageattention2", replace(SAGE2, smooth="")),
    "sageattention-int8": ("sageattention-int8", None),
    "sageattention-int8, no rule, not smoothed": ("sageattention-int8", replace(INT8, smooth="")),
    "dgq-attention": ("int8+dgq-attention", DGQ),
    "dgq-attention, linear": ("int8+dgq-attention", replace(DGQ, p="uint8")),
}


def calibration(name: str, steps: int) -> dq.Calibration:
    call = {key: value for key, value in tiny.CALL[name].items() if key != "num_inference_steps"}
    captions = [caption for caption, _ in tiny.prompts(CALIBRATED, seed=7)]
    return dq.Calibration(captions, steps, max(2 * CALIBRATED, steps), call_kwargs=call)


@cache
def code() -> str:
    """What decides the figures, beside weights and plans."""
    home = versions.ROOT / "dq"
    parts = ("layers/attending.py", "fit/attention.py", "attentionplan.py", "planning.py", "cookbook.py")
    return versions.code(home / part for part in parts)


def version(name: str, *plans: object) -> str:
    return versions.crc(f"{code()} {fingerprint(name)} {plans}")


@cache
def cosines(name: str, steps: int) -> Mapping[str, tuple[float, ...]]:
    """The least cosine that each plan of CALLS leaves, by module."""
    pipe, part = tiny.load(name), tiny.PARTS[name]
    model = getattr(pipe, part)
    planned = [attending.planned(model, plan) for plan in CALLS.values()]
    with tempfile.TemporaryDirectory() as folder:
        capture.capture(pipe, {part: model}, calibration(name, steps), folder, False)
        menus = {module: [each[module] for each in planned] for module in planned[0]}
        return attention.cosines(model, menus, Store(Path(folder) / part))


def call_figures(name: str, label: str, steps: int) -> dict[str, float]:
    """Mean decibels and the least cosine, over modules that attend to the picture and to the text."""
    row, index = {}, list(CALLS).index(label)
    for kind, end in (("picture", "attn1"), ("text", "attn2")):
        least = [values[index] for module, values in cosines(name, steps).items() if module.endswith(end)]
        row[f"{kind}_db"] = round(mean(-10 * math.log10(2 - 2 * value) for value in least), 1)
        row[f"{kind}_least_cosine"] = round(min(least), 5)
    return row


def quantized(name: str, label: str, steps: int):
    """The pipeline of a row, and how many modules have which attention."""
    recipe, plan = PICTURES[label]
    pipe = tiny.load(name)
    model, wanted = getattr(pipe, tiny.PARTS[name]), cookbook.get(recipe)
    assert isinstance(wanted, Recipe), "its name is no file"
    if plan is not None:
        dq.quantize(
            pipe,
            replace(planning.make_plan(model, wanted), attention=attending.planned(model, plan)),
            progress=False,
        )
    else:
        seen = None if recipe == "int8" else calibration(name, steps)
        dq.quantize(pipe, wanted, calibration=seen, progress=False)
    dq.set_backend("reference", pipe)
    found = mark.plan_of(model)
    assert found is not None, "quantized above"
    texts = [str(each) for each in found.attention.values()]
    return pipe, {text: texts.count(text) for text in texts}


@cache
def drawn(name: str, label: str, steps: int, prompts: int):
    """Pictures of a row ("": full precision), and how many modules have which attention."""
    pipe, modules = quantized(name, label, steps) if label else (tiny.load(name), {})
    captions = [caption for caption, _ in tiny.prompts(prompts, seed=1)]
    return tiny.pictures(pipe, name, captions, 0, batch=32, num_inference_steps=steps), modules


def picture_figures(name: str, label: str, steps: int, prompts: int) -> dict:
    found, modules = drawn(name, label, steps, prompts)
    full, _ = drawn(name, "", steps, prompts)
    captions, scenes = zip(*tiny.prompts(prompts, seed=1), strict=True)
    return methods.rounded(
        {"modules": modules} | decibels(found, full, captions) | caption_accuracy.score(found, scenes)
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--models", nargs="+", default=list(tiny.NAMES), choices=list(tiny.NAMES))
    parser.add_argument("--what", nargs="+", default=["calls", "pictures"], choices=["calls", "pictures"])
    parser.add_argument("--rows", nargs="+", default=list(PICTURES), choices=list(PICTURES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args(argv)
    kernels_by_rank()
    for name in options.models:
        for label, plan in CALLS.items() if "calls" in options.what else ():
            keys = {"kind": "calls", "model": name, "row": label, "steps": options.steps}
            made = partial(call_figures, name, label, options.steps)
            print(rows.kept(FILE, keys, version(name, plan), made), flush=True)
        for label in options.rows if "pictures" in options.what else ():
            asked = {"steps": options.steps, "prompts": options.prompts}
            keys = {"kind": "pictures", "model": name, "row": label, **asked}
            made = partial(picture_figures, name, label, **asked)
            print(rows.kept(FILE, keys, version(name, PICTURES[label]), made), flush=True)


if __name__ == "__main__":
    main()
