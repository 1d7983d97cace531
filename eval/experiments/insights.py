"""Which way of rounding suits which operation: `python -m eval.experiments.insights`, the page of Qua2SeDiMo.

A row per model, operation and width: what each way of rounding the weights of all blocks' namesakes would cost the
pictures, beside uniform steps, by the predictor that `qua2sedimo-*` chooses with (a regression on random plans). Rows
go to eval/results/insights.json; trust is the rank correlation of predicted and measured errors of plans that the
regression has not seen.
"""

import argparse
from collections import defaultdict
from types import SimpleNamespace

import numpy as np

from dq import api
from dq.budget import sampled, sensing
from dq.budget.search import Search
from dq.methods import qua2sedimo
from eval.experiments import methods, rows
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "insights.json"
RECIPE = "qua2sedimo-w4"
UNIFORM = "inta/channel"


def main() -> None:
    parser = argparse.ArgumentParser(description="ways of rounding by operation")
    parser.add_argument("--models", nargs="+", default=list(tiny.NAMES), choices=tiny.NAMES)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    kernels_by_rank()
    for model in options.models:
        found = explored(model, options.seed)
        for row in insights(found):
            key = {"model": model, "operation": row["operation"], "bits": row["bits"]}
            rows.add(
                FILE,
                key | row | {"seed": options.seed, "trust": found.trust.get("sampled")} | rows.stamp(),
                tuple(key),
            )


def explored(model: str, seed: int) -> Search:
    """What the recipe would choose from."""
    pipe, entry = tiny.load(model), methods.Entry(RECIPE, RECIPE)
    given = methods.calibration(model, entry, SimpleNamespace(prompts=64, seed=seed))
    return api.explore(pipe, RECIPE, given, wish=sensing.Wish("sampled"), progress=False)[0]


def insights(found: Search) -> list[dict]:
    """Rows by operation and bits: `weights` of its layers; `ways`, decibels that each gains over uniform steps."""
    harm: dict[tuple, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    weights: dict[str, int] = defaultdict(int)
    for _, name, row in found.rows():
        weights[operation := sampled.operation(name)] += row.weights
        for choice, error in zip(row.choices, row.harm, strict=True):
            if choice is not None and str(choice.weight) in qua2sedimo.WAYS:
                harm[operation, choice.weight.spec.bits][sampled.way(choice)] += float(error)
    made = []
    for (operation, bits), ways in sorted(harm.items()):
        if 0 < ways.get(UNIFORM, 0):
            gains = {
                way: round(float(10 * np.log10(ways[UNIFORM] / max(error, 1e-30))), 2) for way, error in ways.items()
            }
            made.append({"operation": operation, "bits": bits, "weights": weights[operation], "ways": gains})
    return made


if __name__ == "__main__":
    main()
