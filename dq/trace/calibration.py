"""What the user states of calibration data: prompts, steps, how many denoiser calls, or a loop of their own."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq import disk
from dq.errors import DQError, nearest
from dq.trace import inputs

if TYPE_CHECKING:
    from torch import nn

MOST_STEPS, MOST_SAMPLES, MOST_SEED = 10_000, 1_000_000, 2**63 - 1
POLICIES = ("uniform", "all", "normal", "stratified", "clustered")
PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclass(frozen=True)
class Calibration:
    """What to record. Raises DQError at once for what cannot work.

    prompts       a text or a dict of call arguments a run, e.g. {"prompt": "make it red", "image": "cat.png"}; or the
                  path of a text file, a .jsonl or a folder of pairs (see dq/trace/inputs.py); None: dq's own
    steps         denoising steps of a run
    samples       (run, step) pairs to record, at least `steps`
    policy        which pairs: uniform, all, normal, stratified, clustered
    call_kwargs   further arguments of the pipeline's call; they win over what dq would pass
    folder        where records stay and a killed calibration goes on; None: a temporary folder
    forward_loop  for a bare model: called with the model once, runs it as the user does; every call is recorded,
                  so that of the rest only seed and folder count
    score         for recipes that search what runs around the model (`+qsched`): a function of pictures (N, 3, H, W)
                  in [0, 1] and their N prompts, higher is better; None: closeness to the full-precision runs
    """

    prompts: Sequence[str | Mapping[str, Any]] | str | Path | None = None
    steps: int = 20
    samples: int = 64
    seed: int = 0
    policy: str = "stratified"
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    folder: str | Path | None = None
    forward_loop: Callable[[nn.Module], Any] | None = None
    score: Callable[[Any, list[str]], float] | None = None

    def __post_init__(self):
        for name, least, most in (("steps", 1, MOST_STEPS), ("samples", 1, MOST_SAMPLES), ("seed", 0, MOST_SEED)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise DQError(f"calibration: {name} is {value!r}, expected an integer of {least} or more")
            if value > most:
                raise DQError(f"calibration: {name} is {value}, expected at most {most}; lower it")
        if self.policy not in POLICIES:
            raise DQError(f"calibration: policy is {self.policy!r}, {nearest(str(self.policy), POLICIES)}")
        if self.samples < self.steps:
            least = f"expected samples >= steps, so that each step is seen; raise samples to {self.steps}"
            raise DQError(f"calibration: got samples={self.samples} and steps={self.steps}, {least} or lower steps")
        if not isinstance(self.call_kwargs, Mapping):
            raise DQError(f"calibration: call_kwargs is a {type(self.call_kwargs).__name__}, expected a dict")
        if self.call_kwargs.get("num_inference_steps", self.steps) != self.steps:
            got = f"num_inference_steps={self.call_kwargs['num_inference_steps']!r} in call_kwargs"
            raise DQError(f"calibration: got {got} and steps={self.steps}, expected one number; give it as steps")
        if self.forward_loop is not None and not callable(self.forward_loop):
            raise DQError(f"calibration: forward_loop is {self.forward_loop!r}, expected a function of the model")
        if self.score is not None and not callable(self.score):
            raise DQError(f"calibration: score is {self.score!r}, expected a function of pictures and their prompts")
        self.texts()

    def texts(self) -> list[inputs.Entry]:
        """The prompts themselves, each a text or call arguments. Raises DQError when there are none."""
        given = self.prompts
        if given is None or isinstance(given, (str, Path)):
            return inputs.check(inputs.read(Path(given or PROMPTS)), f"prompts file {str(given)!r}")
        if not isinstance(given, Sequence) or isinstance(given, bytes):
            raise DQError(
                f"calibration: prompts is a {type(given).__name__}, expected a list of texts or a file's path"
            )
        return inputs.check(given, "prompts")

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """The folder of the records, held against other processes; a temporary one is removed at the end."""
        if self.folder is not None:
            with _alone(Path(self.folder)):
                yield Path(self.folder)
        else:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise DQError("calibration: several processes need a folder all of them see; give folder=...")
            # Windows removes no file that is open, as a store's lock may be until the store is collected
            with tempfile.TemporaryDirectory(prefix="dq-", ignore_cleanup_errors=os.name == "nt") as made:
                yield Path(made)


def resolve(value: Calibration | Callable[[nn.Module], Any]) -> Calibration:
    """A Calibration as it is, a function as the forward loop of one. Raises DQError for anything else."""
    from torch import nn  # here: what a user states is checked before torch is needed

    if isinstance(value, Calibration):
        return value
    if callable(value) and not isinstance(value, (type, nn.Module)):
        return Calibration(forward_loop=value)
    raise DQError(f"calibration is {value!r}, expected dq.Calibration(prompts=...) or a function forward_loop(model)")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """DQError when another calibration is at work in a folder; processes of one launch count as one."""
    from dq.trace.world import processes

    if not processes().is_main_process:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DQError(f"calibration: cannot make the folder {str(folder)!r}: {error}; choose another") from None
    with disk.locked(folder / ".calibrating", wait=False) as mine:
        if not mine:
            what = f"calibration: another process is at work in the folder {str(folder)!r}"
            raise DQError(f"{what}; wait until it is done, choose another folder, or launch both with accelerate")
        yield
