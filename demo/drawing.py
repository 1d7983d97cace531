"""One pipeline call as a user of the demo asks for it: bounded, stoppable, timed step by step.

Time and stopping hang on a private copy of the scheduler, which every diffusers pipeline calls once or twice a step,
so that nothing here knows a pipeline class.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageChops

from demo.sessions import Stopped
from dq.errors import DQError

LONGEST_PROMPT = 1000
MOST_STEPS, MOST_SIDE, SIDE_UNIT, MOST_FRAMES, MOST_GUIDANCE, MOST_SEED = 100, 1024, 8, 129, 30.0, 2**31 - 1
GAIN = 8  # of the difference picture


@dataclass(frozen=True)
class Request:
    """What to draw. Raises DQError at once when it is out of bounds. width, height, frames: 0 for the model's own."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    width: int = 0
    height: int = 0
    frames: int = 0

    def __post_init__(self):
        for name in ("prompt", "negative"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
                raise DQError(f"{name} prompt: expected text of at most {LONGEST_PROMPT} characters")
        if not self.prompt.strip():
            raise DQError("the prompt is empty; say what to draw")
        bounds = {"seed": (0, MOST_SEED), "steps": (1, MOST_STEPS), "frames": (0, MOST_FRAMES)}
        for name, (least, most) in (bounds | {"width": (0, MOST_SIDE), "height": (0, MOST_SIDE)}).items():
            check(name, getattr(self, name), least, most, whole=True)
        check("guidance", self.guidance, 0, MOST_GUIDANCE)
        for name in ("width", "height"):
            if getattr(self, name) % SIDE_UNIT:
                raise DQError(f"{name} is {getattr(self, name)}, expected a multiple of {SIDE_UNIT}, or 0 for its own")

    def arguments(self, pipe, own: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline's call. own: what this model needs beyond it. DQError when the pipeline cannot do that."""
        accepted = inspect.signature(type(pipe).__call__).parameters
        lacking = [
            name
            for name, item in list(accepted.items())[1:]
            if item.default is item.empty and item.kind is item.POSITIONAL_OR_KEYWORD and name != "prompt"
        ]
        if lacking or "prompt" not in accepted:
            what = lacking[0] if lacking else "no prompt"
            raise DQError(f"{type(pipe).__name__} takes {what}; this page draws from a prompt alone")
        if self.negative.strip() and "negative_prompt" not in accepted:
            raise DQError(f"{type(pipe).__name__} takes no negative prompt; leave it empty")
        optional = {
            "negative_prompt": self.negative.strip(),
            "width": int(self.width),
            "height": int(self.height),
            "num_frames": int(self.frames),
            "video_length": int(self.frames),  # what Latte calls it
        }
        call = {"use_resolution_binning": False, "clean_caption": False, "output_type": "pil"} | dict(own)
        call |= {"guidance_scale": float(self.guidance)} | {name: value for name, value in optional.items() if value}
        call = {name: value for name, value in call.items() if name in accepted}
        generator = torch.Generator().manual_seed(int(self.seed))
        return call | {"prompt": self.prompt, "num_inference_steps": int(self.steps), "generator": generator}


@dataclass
class Drawn:
    """Frames of a video, or one picture; median ms of a step; peak_gib of the device, None on a CPU."""

    frames: list[Image.Image]
    video: bool
    ms_per_step: float
    peak_gib: float | None = None


@dataclass
class Watch:
    """Told after each denoising step: whether to stop, how far it is, how long each step took."""

    stop: threading.Event
    tell: Callable[[int], None]
    moments: list[float] = field(default_factory=list)

    def put_on(self, pipe):
        """A copy of the pipeline (not of its models) whose scheduler reports here."""
        if getattr(pipe, "scheduler", None) is None:
            raise DQError(f"{type(pipe).__name__} has no scheduler of its own; this page cannot follow its steps")
        watched, scheduler = copy.copy(pipe), copy.deepcopy(pipe.scheduler)
        for name in ("set_timesteps", "step"):
            setattr(scheduler, name, self._reporting(getattr(scheduler, name)))
        watched.scheduler = scheduler
        return watched

    def _reporting(self, method):
        @functools.wraps(method)  # pipelines read the signatures of their scheduler's methods
        def reporting(*args, **kwargs):
            if self.stop.is_set():
                raise Stopped
            found = method(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.moments.append(time.perf_counter())
            self.tell(len(self.moments) - 1)
            return found

        return reporting

    def ms_per_step(self, steps: int) -> float:
        """Median; schedulers of second order report twice a step."""
        gaps = [1000 * (b - a) for a, b in zip(self.moments, self.moments[1:], strict=False)]
        gaps = gaps[1:] if len(gaps) > 1 else gaps  # the first also prepares latents and chooses kernels
        return statistics.median(gaps) * max(1, round(len(self.moments) / (steps + 1))) if gaps else 0.0


def draw(pipe, wish: Request, own: Mapping[str, Any], watch: Watch) -> Drawn:
    """Draw once. DQError when the pipeline refuses, Stopped when the watch says so."""
    call = wish.arguments(pipe, own)
    with _own_failures(type(pipe).__name__):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        output = watch.put_on(pipe)(**call)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    images, frames = getattr(output, "images", None), getattr(output, "frames", None)
    if images is None and frames is None:
        raise DQError(f"{type(pipe).__name__} returned neither pictures nor frames")
    found = [image.convert("RGB") for image in (images if images is not None else frames[0])]
    return Drawn(found if frames is not None else found[:1], frames is not None, watch.ms_per_step(wish.steps), peak)


def difference(before: Image.Image, after: Image.Image) -> Image.Image:
    """Absolute difference, GAIN times as bright."""
    return ImageChops.difference(before, after).point(lambda value: min(255, GAIN * value))


@contextlib.contextmanager
def _own_failures(who: str):
    """What the pipeline says when it does not like its arguments, as one line."""
    try:
        yield
    except (DQError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DQError(f"{who}: {first[:200]}") from error


def check(name: str, value, least: float, most: float, whole: bool = False) -> None:
    """DQError when a number is out of bounds."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise DQError(f"{name} is {str(value)[:40]}, expected {kind} from {least:g} to {most:g}")
