"""Drawing the pictures of a run: quantize once an entry, save, load, draw in fixed batches, measure.

Batch b goes to process b modulo their number, so that which process draws what changes no picture; every item has a
generator of its own. All of it can be killed at any moment: what is on disk is whole, and a batch with a picture
missing is drawn again, to the same bits. Calibrated recipes are fitted by all processes together, others by the first.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

import dq
from dq import api, cookbook, kernels
from dq.errors import DQError, nearest
from dq.host import saved
from dq.layers import PackedStack, packed_layers
from dq.layers.memory import align
from dq.trace.running import drawing, modules_of
from dq.trace.world import processes
from eval import prompts, timing
from eval.metrics import noise_sqnr, trajectory_error
from eval.runs import REPLAYED, Item, Run, write
from eval.suite import FULL, Entry, Pipeline, Suite
from pipelines import tiny

if TYPE_CHECKING:
    from accelerate import PartialState

REPORT = "dq_report.json"  # what dq.quantize said, beside the model
PROMPT_SEEDS = 1_000_000  # seed of an item: seed * this + number of the prompt, as in pipelines.tiny
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def generate(suite: Suite, folder: Path, chosen: Sequence[tuple[str, str]], progress: bool = True) -> Run:
    """Make every picture and figure of the chosen (pipeline, entry) pairs that is not in the folder yet."""
    for pipeline in suite.pipelines:
        if pipeline.path not in tiny.STUDENTS:
            saved.find(pipeline.path)  # refused before any work
    state = processes()
    if state.is_main_process:
        Run.create(folder, suite, prompts.items(suite))
    state.wait_for_everyone()
    run = Run(folder)
    for pipeline, entry in chosen:
        if run.missing(pipeline, entry) is None and run.figures(pipeline, entry) and run.drawn(pipeline, entry):
            continue
        state.wait_for_everyone()  # so that all have looked before the first one changes anything
        _Making(run, state, run.suite.pipeline(pipeline), run.suite.entry(entry), progress).all()
        state.wait_for_everyone()
    return run


class _Making:
    """One entry of one pipeline."""

    def __init__(self, run: Run, state: PartialState, pipeline: Pipeline, entry: Entry, progress: bool):
        self.run, self.state, self.pipeline, self.entry = run, state, pipeline, entry
        self.names, self.suite = (pipeline.name, entry.name), run.suite
        self.progress = progress and state.is_main_process

    def all(self) -> None:
        pipe = self.model()
        if pipe is None:
            return
        self.draw(pipe)
        self.state.wait_for_everyone()  # nobody draws while the first process takes the time
        if self.state.is_main_process:
            if "noise_sqnr" in (self.suite.metrics or ()) and self.entry.name != FULL:
                self.run.write_predictions(*self.names, self.answers(pipe))
            self.run.write_figures(*self.names, self.measure(pipe))

    def model(self):
        """The pipeline that draws, as a user would load it; None when the entry is missing."""
        place = self.entry.folder or self.run.model_path(*self.names)
        if self.entry.name == FULL:
            return load(self.pipeline.path, self.pipeline.dtype, self.state.device)
        if self.entry.folder is None and not place.is_dir():
            self.state.wait_for_everyone()
            self.quantize(place)
            self.state.wait_for_everyone()
            if not place.is_dir():
                return None
        try:
            return load(str(place), self.pipeline.dtype, self.state.device)
        except DQError as error:
            if self.entry.folder is not None:  # not ours to make again
                raise
            raise DQError(f"{error} (of this run: delete {str(place)!r} and run the suite again)") from None

    def quantize(self, place: Path) -> None:
        """Quantize and save; the first process notes down why when that is refused."""
        pipe = load(self.pipeline.path, self.pipeline.dtype, self.state.device)
        work = place.with_name(f"{place.name}.work")  # where a killed calibration goes on
        try:
            wanted, seen, budget = self.wanted(work)
            if seen is None and not self.state.is_main_process:
                return
            report = dq.quantize(pipe, wanted, calibration=seen, budget=budget, progress=self.progress)
        except DQError as error:
            if self.state.num_processes > 1 and work.is_dir():
                raise  # in the middle of work that the others take part in
            if self.state.is_main_process:
                self.run.write_figures(*self.names, {"missing": str(error)})
            return
        if self.state.is_main_process:
            write(place, lambda fresh: _save(pipe, report, fresh))
            shutil.rmtree(work, ignore_errors=True)

    def wanted(self, work: Path) -> tuple[Any, dq.Calibration | None, Any]:
        """Recipe or plan, calibration and budget of the entry. DQError for what this version of dq cannot do."""
        wanted, budget = cookbook.get(self.entry.recipe or Path(self.entry.plan)), None
        if self.entry.budget is not None:
            known = inspect.signature(dq.Budget).parameters
            for name in self.entry.budget:
                if name not in known:
                    raise DQError(f"budget: unknown limit {name!r}, {nearest(name, known)}")
            budget = dq.Budget(**self.entry.budget)
        if budget is None and not wanted.needs_calibration:
            return wanted, None, None
        usual = {"prompts": prompts.others(self.suite), "steps": self.suite.steps}
        given = usual | dict(self.entry.calibration)
        return wanted, dq.Calibration(call_kwargs=dict(self.pipeline.call), folder=work, **given), budget

    def draw(self, pipe) -> None:
        """The batches of this process that have a picture missing."""
        items, size = self.run.items, self.suite.batch
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        mine = batches[self.state.process_index :: self.state.num_processes]
        todo = [batch for batch in mine if not all(self.run.has(*self.names, item.index) for item in batch)]
        if todo:  # kernels that are tried out in a model's first call: which picture comes first must not matter
            with self.refusals():
                call(pipe, self.suite, self.pipeline, batches[0], min(2, self.suite.steps))
        for batch in tqdm(todo, desc=" ".join(self.names), disable=not self.progress):
            self.keep(pipe, batch)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """What full precision does not like about its arguments, in one line; of other entries it is our fault."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as error:
            if self.entry.name != FULL or isinstance(error, DQError):
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DQError(f"pipeline {self.pipeline.name!r} refuses its call: {first[:300]}") from error

    def keep(self, pipe, batch: list[Item]) -> None:
        traced = any(name.startswith("trajectory") for name in self.suite.metrics or ())
        recording = trajectory_error.record(pipe) if traced else contextlib.nullcontext([])
        with recording as steps:
            pictures = call(pipe, self.suite, self.pipeline, batch)
        if steps:
            for item, latents in zip(batch, torch.stack(steps, 1), strict=True):
                self.run.write_trajectory(*self.names, item.index, latents)
        for item, frames in zip(batch, pictures, strict=True):
            if not self.run.has(*self.names, item.index):
                self.run.write_frames(*self.names, item.index, frames)

    def answers(self, pipe) -> dict[str, torch.Tensor]:
        """What the denoisers answer to the calls full precision makes for the first items, and what it answered."""
        full = load(self.pipeline.path, self.pipeline.dtype, self.state.device)
        with contextlib.ExitStack() as stack:
            models = api.find_denoisers(full).items()
            calls = {name: stack.enter_context(noise_sqnr.record(model)) for name, model in models}
            call(full, self.suite, self.pipeline, self.run.items[:REPLAYED])
        mine = [x for name, model in api.find_denoisers(pipe).items() for x in noise_sqnr.replay(model, calls[name])]
        theirs = [made.prediction for rows in calls.values() for made in rows]
        return {
            "predictions": torch.stack(mine).cpu().contiguous(),
            "reference": torch.stack(theirs).cpu().contiguous(),
        }

    def measure(self, pipe) -> dict[str, Any]:
        """The figures of an entry; time and memory for one picture at a time."""

        def one(steps: int | None):
            return call(pipe, self.suite, self.pipeline, self.run.items[:1], steps)

        report = self.run.model_path(*self.names) / REPORT
        made = dq.plan.read_json(report) if report.is_file() else {}
        figures = {"missing": None, "seconds": made.get("seconds"), "notes": made.get("notes", [])}
        return figures | contents(pipe) | timing.measure(pipe, one, self.suite.timing["repeats"])


def load(path: str, dtype: str, device: torch.device):
    """A pipeline on a device, silent. DQError when there is none, or only a denoiser."""
    pipe = tiny.load(path, getattr(torch, dtype)) if path in tiny.STUDENTS else saved.load(path, dtype)
    if not hasattr(pipe, "components"):
        raise DQError(f"{path!r} holds a {type(pipe).__name__} alone, expected a pipeline to draw with")
    pipe.set_progress_bar_config(disable=True)
    round_activations(pipe.to(device))
    list(align(modules_of(pipe)))  # `to` copies weights in some processes, leaves them mapped in others
    return pipe


def round_activations(pipe) -> None:
    """Pictures are of the formats a recipe names: layers that a GPU would leave in floating point emulate them."""
    for model in api.find_denoisers(pipe).values():
        for layer in packed_layers(model).values():
            if not isinstance(layer, PackedStack) and layer.choice.weight_only:
                layer.backend = kernels.with_rounding(layer.op, layer.plan, layer.home, layer._conv())
                layer.bind(layer.home)


def call(pipe, suite: Suite, pipeline: Pipeline, batch: Sequence[Item], steps: int | None = None) -> list:
    """Pictures of a batch, of a video pipeline lists of frames. DQError for arguments the pipeline does not take."""
    accepted, who = inspect.signature(pipe.__call__).parameters, f"pipeline {pipeline.name!r}: {type(pipe).__name__}"
    for name in pipeline.call:
        if name not in accepted:
            raise DQError(f"{who} takes no {name!r}, {nearest(name, accepted)}")
    seeds = [item.seed * PROMPT_SEEDS + item.index // len(suite.seeds) for item in batch]
    own = {
        "prompt": [item.prompt for item in batch],
        "num_inference_steps": steps or suite.steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pil",
    }
    given = {name: value for name, value in own.items() if name in accepted} | dict(pipeline.call)
    named = [(name, item) for name, item in accepted.items() if item.kind is item.POSITIONAL_OR_KEYWORD]
    lacking = [name for name, item in named if item.default is item.empty and name not in given]
    if lacking:
        raise DQError(f"{who} also needs {lacking[0]!r}; add it under call")
    with drawing(0, batch[0].index), torch.no_grad():  # whatever draws from the global generator, too
        output = pipe(**given)
    drawn = getattr(output, "images", None) or getattr(output, "frames", None)
    if not isinstance(drawn, list) or len(drawn) != len(batch):
        got = f"{len(drawn)} pictures" if isinstance(drawn, list) else "no list of pictures or frames"
        raise DQError(f"{who} returned {got} for {len(batch)} prompts, expected one a prompt")
    return drawn


def contents(pipe) -> dict[str, Any]:
    """Kernels with the number of layers each serves, and the bytes of the denoisers' parameters, now and before."""
    models = api.find_denoisers(pipe).values()
    size = sum(value.numel() * value.element_size() for model in models for value in model.parameters())
    try:
        report = dq.explain(pipe)
    except DQError:  # nothing is quantized
        layers = [layer for model in models for layer in model.modules() if isinstance(layer, LAYERS)]
        names = Counter(f"torch {type(layer).__name__}" for layer in layers)
        return {"kernels": dict(sorted(names.items())), "emulated": False, "bytes": size, "full_bytes": size}
    names = Counter(row.kernel for row in report.layers if row.weight is not None)
    emulated = any(row.emulated for row in report.layers)
    sizes = {"bytes": report.bytes_after, "full_bytes": report.bytes_before}
    return {"kernels": dict(sorted(names.items())), "emulated": emulated, **sizes}


def _save(pipe, report: dq.Report, folder: Path) -> None:
    pipe.save_pretrained(folder)
    (folder / REPORT).write_text(report.to_json())
