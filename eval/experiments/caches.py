"""Caches and Q&C on an embedded model: `python -m eval.experiments.caches`; rows in eval/results/caches.json.

PSNR is to the full-precision pictures of the same noise, drawn without a cache. Q&C's controls are the rows without
its correction, and with calls drawn evenly in place of its clusters.
"""

import argparse
from functools import cache, partial

import dq
from dq import cookbook
from eval.experiments import around, methods, rows, versions
from eval.experiments.quality import decibels, fingerprint
from eval.metrics import caption_accuracy
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "caches.json"
CALIBRATED, SAMPLES = 16, 64  # prompts, calls
CACHED = "ptq4dm-w8a8+interval:2"
ROWS = (  # recipe, policy of its calibration
    ("int8", ""),
    ("int8+interval:2", ""),
    ("int8+interval:2+qandc", "stratified"),
    ("int8+firstblock:0.08", ""),
    ("int8+taylorseer:2", ""),
    ("int8+deltacache:0.1", ""),
    ("sixbit-int4", "stratified"),
    ("sixbit-int4+deltacache:0.1", "stratified"),
    ("ptq4dm-w8a8", "stratified"),
    (CACHED, "stratified"),
    (CACHED, "clustered"),
    (f"{CACHED}+qandc", "stratified"),
    (f"{CACHED}+qandc", "clustered"),
)


def calibration(options, policy: str) -> dq.Calibration:
    call = {key: value for key, value in tiny.CALL[options.model].items() if key != "num_inference_steps"}
    captions = [caption for caption, _ in tiny.prompts(CALIBRATED, seed=7)]
    return dq.Calibration(captions, options.steps, max(SAMPLES, options.steps), policy=policy, call_kwargs=call)


def version(model: str, recipe: str) -> str:
    wanted = cookbook.get(recipe)
    return versions.crc(f"{around.code(wanted.method)} {fingerprint(model)} {wanted.to_dict()}")


@cache
def full(model: str, steps: int, prompts: int):
    """Pictures in full precision, without a cache."""
    return drawn(tiny.load(model), model, steps, prompts)


def drawn(pipe, model: str, steps: int, prompts: int):
    captions = [caption for caption, _ in tiny.prompts(prompts, seed=1)]
    return tiny.pictures(pipe, model, captions, 0, batch=32, num_inference_steps=steps)


def figures(options, recipe: str, policy: str) -> dict:
    pipe = tiny.load(options.model)
    known = calibration(options, policy) if policy else None
    report = dq.quantize(pipe, recipe, calibration=known, progress=False)
    captions, scenes = zip(*tiny.prompts(options.prompts, seed=1), strict=True)
    asked = (options.model, options.steps, options.prompts)
    images = drawn(pipe, *asked)
    row = decibels(images, full(*asked), captions) | caption_accuracy.score(images, scenes)
    return methods.rounded(row | {"said": [note for note in report.notes if note.startswith("qandc")]})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--model", default="tiny-pixart", choices=list(tiny.NAMES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", nargs="+", type=int, default=list(range(len(ROWS))), help="numbers of ROWS")
    options = parser.parse_args(argv)
    kernels_by_rank()
    for recipe, policy in (ROWS[number] for number in options.rows):
        keys = {"model": options.model, "recipe": recipe, "policy": policy}
        keys |= {"steps": options.steps, "prompts": options.prompts}
        made = partial(figures, options, recipe, policy)
        print(rows.kept(FILE, keys, version(options.model, recipe), made), flush=True)


if __name__ == "__main__":
    main()
