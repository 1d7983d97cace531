"""What recipes keep of the embedded video model: `python -m eval.experiments.video [--prompts 100]`.

A row per entry of ENTRIES, as in `eval.experiments.methods`: clips of held-out prompts against those of the fp32 model
from the same seeds (decibels over frames), added flicker, motion named = seen, displacement and smoothness beside
the fp32 clips' own, noise prediction by thirds, bytes, and milliseconds a step of one clip. Controls round to nearest
what the recipe's own plan quantizes; that of the budget gives all weights 5 bits. Rows go to eval/results/video.json,
one by one, and are kept while weights, code, prompts and seed are the same, so that a stopped run goes on.
"""

from dataclasses import replace

import torch

import dq
from dq.methods import qvgen
from eval import timing
from eval.experiments import methods, rows
from eval.experiments.methods import Entry, with_plain, with_tuning_changed
from pipelines import tiny

FILE = rows.FOLDER / "video.json"
MODEL = "tiny-video"
SHORT = {"calibration": {"samples": 32, "steps": 10}, "models": (MODEL,)}
ONE_FORMAT = "one format of 5 bits"


REASONS: dict[str, str] = {}  # why a row does not beat the one it is set `against`; docs/results/video.md shows it
ENTRIES = (
    Entry("int8", "int8", **SHORT),
    Entry("int4-weight", "int4-weight", **SHORT),
    *with_plain("svdquant-int4", **SHORT),
    *with_plain("svdquant-w4a8", **SHORT),
    Entry("viditq-w8a8", "viditq-w8a8", against="int8", **SHORT),
    *with_plain("viditq-w4a8", **SHORT),
    *with_plain("gptq-w4a8", **SHORT),
    *(replace(entry, **SHORT) for entry in with_tuning_changed("qvgen-w4a4", "without help", parts=qvgen.PLAIN)),
    *(replace(entry, **SHORT) for entry in with_tuning_changed("qvgen-w3a3", "without help", parts=qvgen.PLAIN)),
    *(replace(entry, **SHORT) for entry in methods.with_fp8("hif8")),
    Entry("sixbit-int4", "sixbit-int4", against="sixbit-int4, late half", **SHORT),
    Entry("sixbit-int4, late half", "sixbit-int4", fields=methods.LATE_HALF, **SHORT),
    Entry("sixbit-int4, layers chosen once", "sixbit-int4", options={"follow": False}, **SHORT),
    Entry("sixbit-int4, no rule", "sixbit-int4", fields=methods.NO_RULE, **SHORT),
    Entry("sixbit-int4+deltacache", "sixbit-int4+deltacache", against="sixbit-int4+interval:2", **SHORT),
    Entry("sixbit-int4+interval:2", "sixbit-int4+interval:2", **SHORT),
    Entry("budget of 5 bits", "int8-weight", against=ONE_FORMAT, bits=5, **SHORT),
    Entry(ONE_FORMAT, "int8-weight", weights=("int5/group:64",), **SHORT),
)


def main() -> None:
    methods.command(__doc__, tiny.VIDEOS, ENTRIES, FILE, measure, prompts=100)


def measure(model: str, entry: Entry, options) -> dict:
    """The figures of one row."""
    plan = methods.plain_plan(model, entry, options) if entry.plain else None
    pipe = tiny.load(model)
    figures = {"fp32_ms_per_step": ms_per_step(pipe)} | methods.quantized(pipe, model, entry, options, plan)
    emulated = any(row.emulated for row in dq.explain(pipe).layers)
    figures["ms_per_step"] = None if emulated else ms_per_step(pipe)
    return methods.rounded(figures | methods.compare(pipe, model, options))


def ms_per_step(pipe) -> float:
    """Of one clip, median over the steps of two calls; both sides of a row are timed in the same minute."""
    caption = [caption for caption, _ in tiny.motions(1)]

    def draw(steps: int | None) -> torch.Tensor:
        return tiny.clips(pipe, MODEL, caption, num_inference_steps=steps or 6)

    return timing.measure(pipe, draw, repeats=2)["ms_per_step"]


if __name__ == "__main__":
    main()
