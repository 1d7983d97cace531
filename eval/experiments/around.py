"""Q-Sched on the few-step students: `python -m eval.experiments.around`; rows in eval/results/around.json.

A student in full precision and rounded, each without corrections and with those that the search finds for a score:
"paired", closeness to the full-precision runs of the same noise, or "clip", tiny-clip's. The search in full precision
is the control: what it gains there is the score's own gain and no repair of rounding. Figures are of prompts that no
search saw, for several seeds of the noise: the mean, and the standard error of the mean over seeds. FID is to renders,
in the recogniser's features, of all pictures of all seeds; its error is that of the seeds alone.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from statistics import mean, stdev

import torch

import dq
from dq.around import qsched
from dq.around.runs import Search
from dq.plan import Recipe
from dq.sampler import steps as stepping
from dq.surroundings import Correction
from eval import features
from eval.experiments import methods, rows, versions
from eval.experiments.quality import fingerprint
from eval.metrics import caption_accuracy, clip_score, fid, psnr
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "around.json"
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


def code(method: str) -> str:
    """What decides figures of a fitted model with caches and corrections around it."""
    rooms = [*(versions.ROOT / "dq" / "around").glob("*.py"), *(versions.ROOT / "dq" / "sampler").glob("*.py")]
    return versions.code([*rooms, *methods.roots(method)])


def version(name: str) -> str:
    return versions.crc(f"{code('svdquant')} {fingerprint(name)} {SEARCHED} {SEARCH_SEED}")


class Bench:
    """Rows of one student: what several of them need is made once, and only when one is missing."""

    def __init__(self, name: str, options, steps: int):
        self.name, self.options, self.steps = name, options, steps

    @cached_property
    def student(self) -> Student:
        return Student(self.name, self.steps, self.options.prompts, self.options.seeds)

    @cached_property
    def wanted(self) -> list:
        """The full-precision runs of the prompts that a search sees."""
        full = Search(tiny.load(self.name), "qsched", self.student.calibration())
        full.pipe.set_progress_bar_config(disable=True)
        full.record()
        return full.wanted

    @cache  # noqa: B019 (lives as long as the command)
    def rounded(self, rounding: str):
        return quantized(self.student, rounding)

    def figures(self, rounding: str, kind: str) -> dict:
        pipe = self.rounded(rounding)
        if not kind:
            return self.student.figures(self.student.draw(pipe))
        found, said = corrections(self.student, pipe, kind, self.wanted)
        row = {"said": said, "values": {} if found is None else dict(found.values)}
        if found is None:
            return row | self.figures(rounding, "")
        stepping.attach(pipe.scheduler, [found])
        row |= self.student.figures(self.student.draw(pipe))
        stepping.detach(pipe.scheduler)
        return row

    def measure(self) -> None:
        for rounding in self.options.rounded:
            kinds = [kind for kind in self.options.scores if (rounding, kind) != (FULL, "paired")]
            for kind in ("", *kinds):
                keys = {"model": self.name, "steps": self.steps, "rounded": rounding, "score": kind}
                keys |= {"prompts": self.options.prompts, "seeds": self.options.seeds}
                made = partial(self.figures, rounding, kind)
                print(rows.kept(FILE, keys, version(self.name), made), flush=True)


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
            Bench(name, options, count).measure()


if __name__ == "__main__":
    main()
