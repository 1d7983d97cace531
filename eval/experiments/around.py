"""Q-Sched on the few-step students: `python -m eval.experiments.around`; a line of JSON for each row, on stdout.

A student in full precision and rounded, each without corrections and with those that the search finds for a score:
"paired", closeness to the full-precision runs of the same noise, or "clip", tiny-clip's. The search in full precision
is the control: what it gains there is the score's own gain and no repair of rounding. Figures are of prompts that no
search saw, for several seeds of the noise: the mean, and the standard error of the mean over seeds. FID is to renders,
in the recogniser's features, of all pictures of all seeds; its error is that of the seeds alone.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import mean, stdev

import torch

import dq
from dq.around import qsched
from dq.around.runs import Search
from dq.plan import Recipe
from dq.sampler import steps as stepping
from dq.surroundings import Correction
from eval import features
from eval.metrics import caption_accuracy, clip_score, fid, psnr
from eval.static import kernels_by_rank
from pipelines import tiny

SEARCHED, SEARCH_SEED = 32, 7  # prompts a search sees, half of them held out
FULL, PLAIN = "full precision", "w4a8 to nearest"
ROUNDED = {
    FULL: None,
    PLAIN: Recipe(PLAIN, ("int4/group:64", "int8/token"), ("int4/group:64", "int8a/tensor")),
    "w4a4 to nearest": Recipe("w4a4", ("int4/group:64", "int4/group:64"), ("int4/group:64", "int8a/tensor")),
    "svdquant-int4": "svdquant-int4",
}


@dataclass
class Student:
    """A student at a number of steps, the prompts of its rows, and its pictures in full precision."""

    name: str
    steps: int
    prompts: int
    seeds: int
    truth: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self):
        self.asked = tiny.prompts(self.prompts, seed=1)
        self.truth = self.draw(tiny.load(self.name))

    def draw(self, pipe) -> list[torch.Tensor]:
        """Pictures for each seed."""
        captions = [caption for caption, _ in self.asked]
        given = {"num_inference_steps": self.steps, "batch": 32}
        return [tiny.pictures(pipe, self.name, captions, seed, **given) for seed in range(self.seeds)]

    def calibration(self, score: Callable | None = None) -> dq.Calibration:
        captions = [caption for caption, _ in tiny.prompts(SEARCHED, seed=SEARCH_SEED)]
        call = {key: value for key, value in tiny.CALL[self.name].items() if key != "num_inference_steps"}
        return dq.Calibration(captions, self.steps, 4 * SEARCHED, call_kwargs=call, score=score)

    def figures(self, pictures: list[torch.Tensor]) -> dict[str, float]:
        captions, scenes = zip(*self.asked, strict=True)
        found: dict[str, list[float]] = {"psnr_db": [], "caption_accuracy": [], "clip_score": [], "fid": []}
        for mine, wanted in zip(pictures, self.truth, strict=True):
            found["psnr_db"].append(mean(min(value, 100.0) for value in psnr.per_item(mine, wanted)))
            found["caption_accuracy"].append(caption_accuracy.score(mine, scenes)["caption_accuracy"])
            found["clip_score"].append(clip_score.score(mine, captions, features.TINY_CLIP)["clip_score"])
            found["fid"].append(distance(mine))
        row = {name: round(mean(values), 4) for name, values in found.items()}
        row |= {f"{name}_se": round(stdev(values) / len(values) ** 0.5, 4) for name, values in found.items()}
        return row | {"fid_pooled": round(distance(torch.cat(pictures)), 4)}


@cache
def renders() -> torch.Tensor:
    return features.of_real("scenes", features.RECOGNISER)  # pyright: ignore[reportReturnType]


def distance(pictures: torch.Tensor) -> float:
    """FID to renders."""
    return fid.score(features.network(features.RECOGNISER).features(pictures), renders())["fid"]


def judged(pictures: torch.Tensor, prompts: list[str]) -> float:
    """The score "clip"."""
    return clip_score.score(pictures, prompts, features.TINY_CLIP)["clip_score"]


def quantized(student: Student, name: str):
    """A student rounded as ROUNDED says."""
    pipe, recipe = tiny.load(student.name), ROUNDED[name]
    if recipe is not None:
        given = student.calibration() if isinstance(recipe, str) else None
        dq.quantize(pipe, recipe, calibration=given, progress=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def corrections(student: Student, pipe, kind: str, wanted: list) -> tuple[Correction | None, str]:
    """What the search finds for one score, and what it says."""
    search = Search(pipe, "qsched", student.calibration(judged if kind == "clip" else None))
    search.wanted = wanted
    found, said = qsched.find(search)
    return found, said[0]


def rows(student: Student, names: list[str], kinds: list[str]) -> None:
    full = Search(tiny.load(student.name), "qsched", student.calibration())
    full.pipe.set_progress_bar_config(disable=True)
    full.record()
    head = {"model": student.name, "steps": student.steps, "prompts": student.prompts, "seeds": student.seeds}
    for name in names:
        pipe = quantized(student, name)
        print(json.dumps(head | {"rounded": name, "score": ""} | student.figures(student.draw(pipe))), flush=True)
        for kind in kinds if name != FULL else [each for each in kinds if each != "paired"]:
            found, said = corrections(student, pipe, kind, full.wanted)
            values = {} if found is None else dict(found.values)
            row = head | {"rounded": name, "score": kind, "said": said, "values": values}
            if found is not None:
                stepping.attach(pipe.scheduler, [found])
                row |= student.figures(student.draw(pipe))
                stepping.detach(pipe.scheduler)
            print(json.dumps(row), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--models", nargs="+", default=list(tiny.STUDENTS), choices=list(tiny.STUDENTS))
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--rounded", nargs="+", default=list(ROUNDED), choices=list(ROUNDED))
    parser.add_argument("--scores", nargs="+", default=["paired", "clip"], choices=["paired", "clip"])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    kernels_by_rank()
    for name in options.models:
        for count in options.steps:
            rows(Student(name, count, options.prompts, options.seeds), options.rounded, options.scores)


if __name__ == "__main__":
    main()
