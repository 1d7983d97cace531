"""Caches and Q&C on an embedded model: `python -m eval.experiments.caches`; a line of JSON for each row, on stdout.

PSNR is to the full-precision pictures of the same noise, drawn without a cache. Q&C's controls are the rows without
its correction, and with calls drawn evenly in place of its clusters.
"""

import argparse
import json
from statistics import mean

import dq
from eval.metrics import caption_accuracy, psnr
from eval.static import kernels_by_rank
from pipelines import tiny

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--model", default="tiny-pixart", choices=list(tiny.NAMES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rows", nargs="+", type=int, default=list(range(len(ROWS))), help="numbers of ROWS")
    options = parser.parse_args(argv)
    kernels_by_rank()
    captions, scenes = zip(*tiny.prompts(options.prompts, seed=1), strict=True)
    given = {"batch": 24, "num_inference_steps": options.steps}
    full = tiny.pictures(tiny.load(options.model), options.model, list(captions), 0, **given)
    for recipe, policy in (ROWS[number] for number in options.rows):
        pipe = tiny.load(options.model)
        known = calibration(options, policy) if policy else None
        report = dq.quantize(pipe, recipe, calibration=known, progress=False)
        drawn = tiny.pictures(pipe, options.model, list(captions), 0, **given)
        row = {"model": options.model, "steps": options.steps, "recipe": recipe, "policy": policy}
        row |= {"psnr_db": round(mean(min(value, 100.0) for value in psnr.per_item(drawn, full)), 2)}
        row |= {"caption_accuracy": round(caption_accuracy.score(drawn, scenes)["caption_accuracy"], 4)}
        row |= {"said": [note for note in report.notes if note.startswith("qandc")]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
