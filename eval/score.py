"""What the metrics say of one entry of a run: a figure with its interval, or why there is none.

    score(run, "tiny-pixart", "int8")
    {"psnr": {"value": 47.6, "low": 46.9, "high": 48.3, "unit": "dB", "better": "higher", "count": 200,
              "per_item": [...], "note": ""},
     "lpips": {"missing": "needs torchvision, not installed here", "instead": "feature_distance"}, ...}

Of a metric that looks through a network the usual one is taken where it can be had, else the project's stand-in: then
its key ends in that network's name, and the plain key says what is missing. FID and KID are against real pictures, if
the suite names some; FID also, as `fid_to_full`, against the full-precision pictures of the same seeds. `per_item` has
a place for every item of the run. Frames of a video count as pictures, and the figure of a video is their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dq.errors import DQError
from eval import features, intervals, metrics, prompts
from eval.runs import REPLAYED, Item, Run
from eval.suite import FULL, Suite

NEEDS = {  # what a run may lack, and then says
    "reference": "needs a quantized entry",
    "real": "needs real pictures; name some in the suite under fid: real",
    "scenes": "needs prompts of the scene grammar",
    "clips": "needs videos",
    "motions": "needs prompts of motion",
    "trajectory": "needs the latents of every step, which this run did not keep",
    "predictions": "needs what the denoiser predicts for recorded calls, which this run did not keep",
}
SETS = "features"  # what metrics of whole sets need; those that also need clips turn them into one vector each
PIXELS = 2**20  # of the pictures that metrics get at once
RESAMPLES, FEW_RESAMPLES, WIDE = 30, 10, 512  # of a set, and of one with more than WIDE features


@dataclass(frozen=True)
class Task:
    """One metric through one network (None where it has none), under the key its row gets."""

    key: str
    module: ModuleType
    judge: str | None = None

    @property
    def usual(self) -> str | None:
        return next(iter(getattr(self.module, "JUDGES", {})), None)

    @property
    def to_full(self) -> str:
        """`fid (network)` -> `fid_to_full (network)`."""
        name, space, network = self.key.partition(" ")
        return f"{name}_to_full{space}{network}"

    def row(
        self, value: float, interval: tuple[float, float] | None, count: int, note: str = "", figure: str = ""
    ) -> dict[str, Any]:
        """A row of a figure, the headline where none is named."""
        figure = figure or next(iter(self.module.UNITS))
        unit = self.module.UNITS[figure]
        better = self.module.BETTER if isinstance(self.module.BETTER, str) else self.module.BETTER[figure]
        low, high = interval or (None, None)
        if self.judge != self.usual:
            of = f"through {features.label(self.judge)}, not {self.usual}"
            note = f"{of}: compares only with figures through the same network. {note}"
        row = {"value": value, "low": low, "high": high, "unit": unit, "better": better, "count": count}
        return row | {"per_item": None, "note": note.strip()}


class Feed:
    """What metrics ask for, by name, of some items of one entry; each thing is read once."""

    def __init__(self, run: Run, pipeline: str, entry: str, items: Sequence[Item]):
        self.run, self.pipeline, self.entry, self.items = run, pipeline, entry, items

    @cached_property
    def clips(self) -> list[torch.Tensor]:
        return self._clips(self.entry)

    @cached_property
    def reference_clips(self) -> list[torch.Tensor]:
        return self._clips(FULL)

    @cached_property
    def images(self) -> torch.Tensor:
        return torch.cat(self.clips)

    @cached_property
    def reference(self) -> torch.Tensor:
        return torch.cat(self.reference_clips)

    @cached_property
    def prompts(self) -> list[str]:
        return [self.items[owner].prompt for owner in self.owners]

    @cached_property
    def scenes(self) -> list:
        found = [prompts.scene(item.scene) for item in self.items]
        return [found[owner] for owner in self.owners]

    @cached_property
    def motions(self) -> list:
        return [prompts.clip(item.scene) for item in self.items]

    @property
    def predictions(self) -> list[torch.Tensor]:
        return list(self.run.predictions(self.pipeline, self.entry)["predictions"])

    @property
    def reference_predictions(self) -> list[torch.Tensor]:
        return list(self.run.predictions(self.pipeline, self.entry)["reference"])

    @cached_property
    def trajectory(self) -> list[torch.Tensor]:
        return self._trajectory(self.entry)

    @cached_property
    def reference_trajectory(self) -> list[torch.Tensor]:
        return self._trajectory(FULL)

    @cached_property
    def owners(self) -> list[int]:
        """Which of the items each picture belongs to."""
        return [number for number, clip in enumerate(self.clips) for _ in clip]

    def per_item(self, values: Sequence[float]) -> list[float]:
        """Means over the pictures of each item, of one value a picture or one an item."""
        if len(values) == len(self.items):
            return list(values)
        found: list[list[float]] = [[] for _ in self.items]
        for owner, value in zip(self.owners, values, strict=True):
            found[owner].append(value)
        return [intervals.mean(row) for row in found]

    def _clips(self, entry: str) -> list[torch.Tensor]:
        return [features.as_pictures(self.run.frames(self.pipeline, entry, item.index)) for item in self.items]

    def _trajectory(self, entry: str) -> list[torch.Tensor]:
        found = [self.run.trajectory(self.pipeline, entry, item.index) for item in self.items]
        for item, latents in zip(self.items, found, strict=True):
            if latents is None or latents.shape != found[0].shape:
                path = str(self.run.latents_path(self.pipeline, entry, item.index))
                picture = str(self.run.image_path(self.pipeline, entry, item.index))
                raise DQError(f"latents {path!r} are not those of a run; delete {picture!r} and run the suite again")
        return list(torch.stack(found, 1))


def check(suite: Suite) -> None:
    """DQError for a metric, a network or real pictures that a suite names and that are not there, before any work."""
    for name in suite.metrics or metrics.names():
        module = metrics.load(name)
        named = _named(module, suite)
        reason = named and module.why_not(named)
        if reason:
            raise DQError(f"suite: {': '.join(module.JUDGE_FROM)}: {reason}")
    real = suite.fid.get("real", "scenes")
    if real != "scenes" and not Path(real).exists():
        raise DQError(f"suite: fid: real is {real!r}, which is not there; expected a folder, a .npz file or scenes")


def _named(module: ModuleType, suite: Suite) -> str | None:
    """The network that the suite names for a metric."""
    if not hasattr(module, "JUDGES"):
        return None
    section, key = module.JUDGE_FROM
    return getattr(suite, section).get(key)


def score(run: Run, pipeline: str, entry: str) -> dict[str, dict[str, Any]]:
    """A row for every metric that the suite names, or that the run can feed; see the module docstring."""
    items = [
        item for item in run.items if run.has(pipeline, entry, item.index) and run.has(pipeline, FULL, item.index)
    ]
    if not items:
        raise DQError(f"{pipeline} {entry}: no picture to score; run the suite again")
    has = _given(run, pipeline, entry, items[0])
    tasks, rows = _tasks(run.suite, has)
    alone = [task for task in tasks if hasattr(task.module, "per_item")]
    rows |= _of_items(run, pipeline, entry, items, alone)
    for task in tasks:
        if task not in alone:
            of = _of_set if SETS in task.module.NEEDS else _of_run
            rows |= of(run, pipeline, entry, items, task)
    if len(items) < len(run.items):
        part = f"{len(items)} of {len(run.items)} pictures"
        for row in rows.values():
            if "value" in row:
                row["note"] = f"{part}. {row['note']}".strip()
    return dict(sorted(rows.items()))


def _given(run: Run, pipeline: str, entry: str, item: Item) -> set[str]:
    """What this entry can feed to metrics."""
    found = {"images", "prompts", SETS, "reference_features"}
    pairs = entry != FULL
    if item.scene is not None:
        found |= {"scenes", "motions"} if prompts.moves(item.scene) else {"scenes"}
    if run.is_video(pipeline, entry, item.index):
        found |= {"clips", "reference_clips"} if pairs else {"clips"}
    if pairs:
        found.add("reference")
        if run.trajectory(pipeline, entry, item.index) is not None:
            found |= {"trajectory", "reference_trajectory"}
        if run.predictions(pipeline, entry):
            found |= {"predictions", "reference_predictions"}
    return found


def _tasks(suite: Suite, has: set[str]) -> tuple[list[Task], dict[str, dict]]:
    """What to compute for an entry that has these things, and rows for what the suite names and cannot be computed."""
    todo, rows = list(suite.metrics or metrics.names()), {}
    tasks: list[Task] = []
    for name in todo:  # grows by stand-ins
        module = metrics.load(name)
        lacks = [need for need in module.NEEDS if need not in has]
        if lacks and not _only_for_pairs(lacks, has):
            if suite.metrics:
                rows[name] = {"missing": NEEDS[lacks[0]], "instead": None}
            continue
        found, missing = _able(name, module, suite, has)
        tasks += [] if lacks else found
        rows |= missing
        todo += [
            stand for row in missing.values() if (stand := row["instead"]) in metrics.names() and stand not in todo
        ]
    return tasks, rows


def _only_for_pairs(lacks: list[str], has: set[str]) -> bool:
    """Whether all that is lacking is a second side: full precision is not compared with itself."""
    return "reference" not in has and all(
        need in ("reference", "reference_clips") or "trajectory" in need or "predictions" in need for need in lacks
    )


def _able(name: str, module: ModuleType, suite: Suite, has: set[str]) -> tuple[list[Task], dict[str, dict]]:
    """The task of a metric on this machine, or of its stand-in; and a row for what is missing."""
    why_not = getattr(module, "why_not", None)
    if not hasattr(module, "JUDGES"):
        reason = why_not and why_not()
        if reason:
            return [], {name: {"missing": reason, "instead": getattr(module, "INSTEAD", None)}}
        return [Task(name, module)], {}
    (usual, stand_in), named = module.JUDGES, _named(module, suite)
    judge = named or usual
    task = Task(name if judge == usual else f"{name} ({features.label(judge)})", module, judge)
    reason = why_not(judge, fetch=named is not None)
    if not reason:
        return [task], {}
    if named or why_not(stand_in) or not has.issuperset(module.JUDGES[stand_in]):
        return [], {key: {"missing": reason, "instead": None} for key in _keys(task, suite)}
    second = Task(f"{name} ({stand_in})", module, stand_in)
    pairs = zip(_keys(task, suite), _keys(second, suite), strict=True)
    return [second], {key: {"missing": reason, "instead": instead} for key, instead in pairs}


def _keys(task: Task, suite: Suite) -> list[str]:
    """Keys of all rows of a task: of a metric of sets, one against real pictures and one against full precision."""
    if SETS not in task.module.NEEDS:
        return [task.key]
    of_real = "real" in suite.fid and "clips" not in task.module.NEEDS
    return [task.key] * of_real + [task.to_full] * task.module.TAKES_PAIRS


def _of_items(
    run: Run, pipeline: str, entry: str, items: Sequence[Item], tasks: list[Task]
) -> dict[str, dict[str, Any]]:
    """Rows of metrics that have a value for each item."""
    values: dict[str, list[float]] = {task.key: [] for task in tasks}
    rows: dict[str, dict] = {}
    for part in _parts(run, pipeline, entry, items):
        feed = Feed(run, pipeline, entry, part)
        for task in tasks:
            given = [getattr(feed, need) for need in task.module.NEEDS] + [task.judge] * (task.judge is not None)
            try:
                if task.key not in rows:
                    values[task.key] += feed.per_item(task.module.per_item(*given))
            except ValueError as error:  # these pictures are not for this metric
                rows[task.key] = {"missing": str(error), "instead": None}
    groups = [item.prompt for item in items]
    for task in tasks:
        if task.key not in rows:
            found = values[task.key]
            places = dict(zip([item.index for item in items], found, strict=True))
            row = task.row(intervals.mean(found), intervals.of_mean(found, groups), len(found))
            rows[task.key] = row | {"per_item": [places.get(item.index) for item in run.items]}
    return rows


def _of_run(run: Run, pipeline: str, entry: str, items: Sequence[Item], task: Task) -> dict[str, dict[str, Any]]:
    """A row for every figure of a metric that has no value for an item."""
    feed, recorded = Feed(run, pipeline, entry, items), "predictions" in task.module.NEEDS
    try:
        found = task.module.score(*[getattr(feed, need) for need in task.module.NEEDS])
    except ValueError as error:  # these pictures are not for this metric
        return {task.key: {"missing": str(error), "instead": None}}
    count = min(len(items), REPLAYED) if recorded else len(items)
    return {figure.removesuffix("_db"): task.row(value, None, count, figure=figure) for figure, value in found.items()}


def _of_set(run: Run, pipeline: str, entry: str, items: Sequence[Item], task: Task) -> dict[str, dict[str, Any]]:
    """Rows of a metric of whole sets: against real pictures and against those of full precision."""
    indices, rows = tuple(item.index for item in items), {}
    mine, owners = _features(run, pipeline, entry, task, indices)
    groups = [run.items[owner].prompt for owner in owners]
    real = run.suite.fid.get("real")
    if real is not None and "clips" not in task.module.NEEDS:  # real pictures do not move
        objects = run.suite.prompts.get("objects") if real == "scenes" else None
        rows[task.key] = _missing_or(lambda: _against_real(task, mine, groups, (real, task.judge, objects)))
    elif not task.module.TAKES_PAIRS and run.suite.metrics:
        rows[task.key] = {"missing": NEEDS["real"], "instead": None}
    if task.module.TAKES_PAIRS and entry != FULL:
        theirs, _ = _features(run, pipeline, FULL, task, indices)
        rows[task.to_full] = _missing_or(lambda: _against_full(task, mine, theirs, groups))
    return rows


def _missing_or(make: Callable[[], dict]) -> dict:
    try:
        return make()
    except ValueError as error:  # of DQError too: these pictures or statistics are not for this metric
        return {"missing": str(error), "instead": None}


def _against_real(task: Task, mine: torch.Tensor, groups: list, real: tuple) -> dict:
    theirs = features.of_real(*real)
    if isinstance(theirs, features.Statistics):
        if not task.module.TAKES_STATISTICS:
            raise ValueError(f"needs real pictures, {real[0]!r} holds statistics alone")
        counts = [len(mine), theirs.count or len(mine)]
    else:
        counts = [len(mine), len(theirs)]
        theirs = features.Statistics.of(theirs) if task.module.TAKES_STATISTICS else theirs
    return _distance(task, lambda rows: (mine[rows], theirs), groups, counts)


def _against_full(task: Task, mine: torch.Tensor, theirs: torch.Tensor, groups: list) -> dict:
    if len(mine) != len(theirs):
        raise ValueError(f"needs as many pictures as full precision has, got {len(mine)} and {len(theirs)}")
    return _distance(task, lambda rows: (mine[rows], theirs[rows]), groups, [len(mine)] * 2)  # pairs stay together


def _distance(task: Task, sets: Callable, groups: list, counts: list[int]) -> dict:
    """The row of a distance; sets: both sides for some rows of the generated pictures."""
    (figure,) = task.module.UNITS

    def measure(rows: list[int]) -> float:
        return task.module.score(*sets(rows))[figure]

    every = list(range(len(groups)))
    value, width = measure(every), sets(every)[0].shape[1]
    times = RESAMPLES if width <= WIDE else FEW_RESAMPLES
    interval = None
    if len(set(groups)) > 1:
        low, high = intervals.of_distance(value, measure, intervals.resamples(groups, times))
        interval = max(task.module.LEAST, low), high
    return task.row(value, interval, len(groups), task.module.note(counts, width))


@lru_cache(maxsize=4)  # full precision is asked for with every entry
def _features(
    run: Run, pipeline: str, entry: str, task: Task, indices: tuple[int, ...]
) -> tuple[torch.Tensor, list[int]]:
    """Features (N, d) of the pictures, or of the clips, of some items, and the item of each."""
    net, found, owners = features.network(task.judge), [], []
    for part in _parts(run, pipeline, entry, [run.items[index] for index in indices]):
        feed = Feed(run, pipeline, entry, part)
        if "clips" in task.module.NEEDS:
            found += [task.module.vector(net.features(clip))[None] for clip in feed.clips]
            owners += [item.index for item in part]
            continue
        found.append(net.features(feed.images))
        owners += [part[owner].index for owner in feed.owners]
    return torch.cat(found), owners


def _parts(run: Run, pipeline: str, entry: str, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The items in order, as many at once as have PIXELS together."""
    frames = run.frames(pipeline, entry, items[0].index)
    width, height = frames[0].size
    size = max(1, PIXELS // (len(frames) * width * height))
    for start in range(0, len(items), size):
        yield items[start : start + size]
