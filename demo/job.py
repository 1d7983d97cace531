"""Quantizing in a process of its own, which can be ended at any moment: `python -m demo.job < settings.json`.

Settings: model, place, recipe, out, under a budget bits (per weight), and for calibrated recipes and budgets prompts,
samples, steps, seed, call. Writes OUT as a saved pipeline with plan.json and report.json beside the parts, whole or
not at all. Exit codes are those of `dq`.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import dq
from demo import models
from dq import api, cli
from dq.errors import DQError
from dq.host import mark

PLAN, REPORT = "plan.json", "report.json"


def main() -> None:
    try:
        quantize(json.load(sys.stdin))
    except DQError as error:
        print("dq: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def quantize(settings: dict) -> None:
    """Load, quantize, save; the plans of all denoisers in one file, by component."""
    pipe = models.load(settings["place"])
    budget = dq.Budget(bits=settings["bits"]) if "bits" in settings else None
    report = dq.quantize(pipe, settings["recipe"], calibration=_calibration(pipe, settings), budget=budget)
    with cli.replacing(Path(settings["out"]), force=False) as place:
        pipe.save_pretrained(place)
        plans = {name: mark.plan_of(model).to_dict() for name, model in api.find_denoisers(pipe).items()}
        only = next(iter(plans.values())) if len(plans) == 1 else plans
        (place / PLAN).write_text(json.dumps(only, indent=1), "utf-8")
        (place / REPORT).write_text(report.to_json(), "utf-8")
        (place / models.MADE_FROM).write_text(
            json.dumps({"model": settings["model"], "recipe": settings["recipe"]}), "utf-8"
        )


def _calibration(pipe, settings: dict) -> dq.Calibration | None:
    if "samples" not in settings:
        return None
    accepted = inspect.signature(type(pipe).__call__).parameters
    call = {name: value for name, value in settings["call"].items() if name in accepted}
    chosen = {name: settings[name] for name in ("steps", "samples", "seed")}
    return dq.Calibration(settings["prompts"] or None, call_kwargs=call, **chosen)


if __name__ == "__main__":
    main()
