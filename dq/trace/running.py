"""Running a pipeline as its user does, with every denoiser call watched and nothing left changed.

Schedulers are copied for each run, generators seeded and put back, modes of the modules restored, hooks removed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from dq import families
from dq.errors import DQError, nearest
from dq.trace import inputs
from dq.trace.calibration import Calibration
from dq.trace.units import tensors_in


@dataclass
class Call:
    """One call of a denoiser: component name, run, step, largest timestep, name given to caches, arguments."""

    part: str
    run: int
    step: int
    timestep: float | None
    context: str | None
    args: tuple
    kwargs: dict[str, Any]

    def latents(self) -> Any:
        """The first argument that is a floating tensor of two axes or more, or a list of tensors; None without one."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
                return value
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
                return value
        return None

    @property
    def rows(self) -> int:
        """Batch rows."""
        latents = self.latents()
        return 1 if latents is None else len(latents)


class Steps:
    """Numbers the calls of one run by step: distinct timesteps in order of appearance, whoever calls and how often.

    Calls without a timestep are steps of their own.
    """

    def __init__(self) -> None:
        self._seen: list = []
        self._numbers: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._seen)

    def number(self, part: str, timestep: float | None) -> int:
        """Step of the next call of `part`."""
        moment = timestep if timestep is not None else (self._numbers[part],)
        self._numbers[part] += 1
        if moment not in self._seen:
            self._seen.append(moment)
        return self._seen.index(moment)


class Runner:
    """Calls a pipeline as its user would, one prompt at a time."""

    def __init__(self, pipe, calibration: Calibration):
        self.pipe = pipe
        self.calibration = calibration
        self.texts = calibration.texts()
        self.accepted = inspect.signature(pipe.__call__).parameters
        named = [name for name, item in self.accepted.items() if item.kind is not item.VAR_KEYWORD]
        for source, given in (("call_kwargs", calibration.call_kwargs), *(("prompts", text) for text in self.texts)):
            odd = [name for name in given if name not in named] if isinstance(given, Mapping) else []
            if odd:
                raise DQError(f"{source}: {type(pipe).__name__} takes no {odd[0]!r}, {nearest(odd[0], named)}")
        given = self.arguments(0)
        lacking = [
            name
            for name, item in self.accepted.items()
            if item.default is item.empty and name not in given and item.kind is item.POSITIONAL_OR_KEYWORD
        ]
        if lacking:
            raise DQError(f"{type(pipe).__name__} also needs {lacking[0]!r}; add it to the calibration's call_kwargs")

    def arguments(self, run: int) -> dict[str, Any]:
        """Arguments of the call of one run; what the user gave wins, for this run over for all."""
        user, seed = dict(self.calibration.call_kwargs), run_seed(self.calibration.seed, run)
        own = {"num_inference_steps": self.calibration.steps, "generator": torch.Generator().manual_seed(seed)}
        entry = self.texts[run % len(self.texts)]
        if isinstance(entry, Mapping):
            user |= inputs.arguments(entry)
        elif not {"prompt", "prompt_embeds"} & user.keys():
            own["prompt"] = entry
        labels = self.accepted.get("class_labels")
        if labels is not None and labels.default is labels.empty:
            own["class_labels"] = [self._label(seed)]
        own["use_resolution_binning"] = False  # PixArt and Sana would round sizes to a table of large ones
        if _gives_latents(self.pipe):
            own["output_type"] = "latent"
        return {name: value for name, value in own.items() if name in self.accepted} | user

    def _label(self, seed: int) -> int:
        configs = (getattr(part, "config", {}) for part in self.pipe.components.values())
        counts = (config.get("num_embeds_ada_norm") for config in configs if isinstance(config, Mapping))
        return int(torch.randint(next(filter(None, counts), 1000), (), generator=torch.Generator().manual_seed(seed)))

    def run(self, run: int, models: Mapping[str, nn.Module], sink: Callable[[Call], None]) -> None:
        """One call of the pipeline; `sink` gets every call of the models."""
        steps = Steps()

        def number(call: Call) -> None:
            call.run, call.step = run, steps.number(call.part, call.timestep)
            sink(call)

        name, seed = type(self.pipe).__name__, self.calibration.seed
        with (
            watching(models, number),
            drawing(seed, run),
            spare_schedulers(self.pipe),
            telling(f"{name} (run {run})"),
        ):
            self.pipe(**self.arguments(run))

    @property
    def undecorated(self) -> Callable | None:
        """The pipeline's call as it stands under its `no_grad` decorator; None if it has none."""
        return getattr(type(self.pipe).__call__, "__wrapped__", None)

    @property
    def end(self) -> str | None:
        """What a run is followed to: "pt" (pictures), "latent" (videos: large decoders), None for neither."""
        if hasattr(self.pipe, "image_processor") and "num_frames" not in self.accepted:
            return "pt"
        return "latent" if _gives_latents(self.pipe) else None

    def differentiable(self, run: int) -> torch.Tensor:
        """Pictures or latents of one run, in whose making gradients flow where they are enabled."""
        given = self.arguments(run) | {"output_type": self.end, "return_dict": False}
        with drawing(self.calibration.seed, run), spare_schedulers(self.pipe):
            output = self.undecorated(self.pipe, **given)
        return next(value for value in tensors_in(output) if value.is_floating_point())

    def branches(self, call: Call) -> list[int]:
        """Guidance branch of each batch row: 1 where the pipeline predicts without the prompt.

        A call named `uncond` (the pipeline's cache context) is that as a whole. In a call with two rows an image the
        first half is, as everywhere in diffusers but for class labels, whose empty half comes second. Else 0.
        """
        rows, kwargs = call.rows, self.calibration.call_kwargs
        if call.context is not None and call.context != "cond_uncond":
            return [int(call.context == "uncond")] * rows
        images = [len(kwargs[name]) for name in ("prompt", "prompt_embeds", "class_labels") if _many(kwargs.get(name))]
        images = math.prod(images[:1]) * math.prod(
            kwargs.get(name) or 1 for name in ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")
        )
        if rows != 2 * images:
            return [0] * rows
        return [0] * images + [1] * images if "class_labels" in self.accepted else [1] * images + [0] * images


def _gives_latents(pipe) -> bool:
    """Whether the pipeline skips decoding for output_type="latent"; a few refuse the word."""
    try:
        return '"latent"' in inspect.getsource(type(pipe).__call__)
    except (OSError, TypeError):
        return False


def _many(value: Any) -> bool:
    return isinstance(value, (list, tuple, torch.Tensor)) and len(value) > 0


@contextlib.contextmanager
def watching(models: Mapping[str, nn.Module], sink: Callable[[Call], None]) -> Iterator[None]:
    """Hand every call of the models to `sink` before they run."""
    with contextlib.ExitStack() as stack:
        for part, model in models.items():
            context: list[str | None] = [None]
            timestep = timestep_reader(model)

            def hook(_, args, kwargs, part=part, context=context, timestep=timestep):
                sink(Call(part, 0, 0, timestep(args, kwargs), context[0], args, kwargs))

            stack.callback(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if hasattr(model, "cache_context"):
                stack.enter_context(_named_contexts(model, context))
        yield


@contextlib.contextmanager
def _named_contexts(model: nn.Module, context: list[str | None]) -> Iterator[None]:
    """Keep in `context[0]` the name under which the pipeline announces a call to the caches."""
    real, own = model.cache_context, "cache_context" in vars(model)

    @contextlib.contextmanager
    def named(name: str, **kwargs):
        before, context[0] = context[0], name
        try:
            with real(name, **kwargs):
                yield
        finally:
            context[0] = before

    model.cache_context = named
    try:
        yield
    finally:
        del model.cache_context
        if own:
            model.cache_context = real


def timestep_reader(model: nn.Module) -> Callable[[tuple, dict], float | None]:
    """Reads the largest timestep in the arguments of a call of `model`, None where there is none."""
    name = families.of(model).timestep
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    position = names.index(name) if name in names else len(names)

    def read(args: tuple, kwargs: dict) -> float | None:
        value = kwargs.get(name) if name in kwargs else args[position] if position < len(args) else None
        return None if value is None else float(torch.as_tensor(value).max())

    return read


@contextlib.contextmanager
def kept_modes(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, every module's own mode afterwards."""
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        for model in models.values():
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def modules_of(target) -> list[nn.Module]:
    """Every module that runs when a target does: the parts of a pipeline, or the one bare model."""
    if isinstance(target, nn.Module):
        return [target]
    return [part for part in target.components.values() if isinstance(part, nn.Module)]


@contextlib.contextmanager
def drawing(seed: int, run: int) -> Iterator[None]:
    """A seeded global generator, for what draws from it; its state is put back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(run_seed(seed, run))
        yield


def run_seed(seed: int, run: int) -> int:
    """Seed of one run's generators."""
    return (seed * 1_000_003 + run) % 2**63


@contextlib.contextmanager
def spare_schedulers(pipe) -> Iterator[None]:
    """Copies of the schedulers inside, since a run changes them; no progress bar of the pipeline's own."""
    kept = {name: part for name, part in pipe.components.items() if isinstance(part, SchedulerMixin)}
    bar = getattr(pipe, "_progress_bar_config", None)
    try:
        for name, part in kept.items():
            setattr(pipe, name, copy.deepcopy(part))
        pipe._progress_bar_config = {**(bar or {}), "disable": True}
        yield
    finally:
        for name, part in kept.items():
            setattr(pipe, name, part)
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar


@contextlib.contextmanager
def telling(who: str) -> Iterator[None]:
    """Whatever fails inside, as one line."""
    try:
        yield
    except DQError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise DQError(
            f"{who} failed during calibration with {type(error).__name__}: {first}; nothing was changed"
        ) from error
