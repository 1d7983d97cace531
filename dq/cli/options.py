"""The options of the commands: their names, their panels in `--help`, and what their text means."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from dq import disk
from dq.budget.limits import METRICS, Budget
from dq.errors import DQError, nearest
from dq.fit.tune import Tune
from dq.trace.calibration import POLICIES

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEVICES = ("cpu", "cuda")
MODEL: dict[str, Any] = {"rich_help_panel": "Model"}
CALIBRATION: dict[str, Any] = {"rich_help_panel": "Calibration"}
BUDGET: dict[str, Any] = {"rich_help_panel": "Budget"}
PICTURE: dict[str, Any] = {"rich_help_panel": "Picture"}
PEERS: dict[str, Any] = {"rich_help_panel": "Peers"}
OUTPUT: dict[str, Any] = {"rich_help_panel": "Output"}


def _among(names) -> Callable[[str], list[str]]:
    """Completes an option that takes one of a few names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Source = Annotated[
    str, Argument(help="A folder, a Hub id, a .gguf or .safetensors file, or tiny-pixart / tiny-sd in a clone.")
]
Dtype = Annotated[
    str | None, Option(help="Compute dtype: bf16, fp16 or fp32.", autocompletion=_among(DTYPES), **MODEL)
]
BenchDtype = Annotated[
    str | None,
    Option(
        help="Full precision compared with, fp32 or bf16.",
        show_default="bf16, fp32 on a processor without bf16 units",
        autocompletion=_among(DTYPES),
        **MODEL,
    ),
]
Level = Annotated[
    str,
    Option(
        help="Instructions that dq and torch are limited to: avx2, avxvnni, avx512vnni.", show_default=False, **PEERS
    ),
]
Device = Annotated[
    str | None,
    Option(help="cpu or cuda.", show_default="cuda where there is one", autocompletion=_among(DEVICES), **MODEL),
]
Pipeline = Annotated[
    str | None, Option(help="Of a single file: the pipeline it belongs to, or the folder of its config.", **MODEL)
]
For = Annotated[
    str | None, Option("--for", help="Only what this target of `dq export` holds: gguf or comfyui.", **MODEL)
]
Keep = Annotated[list[str], Option(help="Layers left as they are: a pattern, may repeat.", **MODEL)]
Component = Annotated[
    list[str],
    Option(help="Another part: name=recipe, or name=none to leave a denoiser as it is; may repeat.", **MODEL),
]
Prompts = Annotated[
    Path | None,
    Option(
        help="Calibration prompts: a text file, one a line; or with pictures: a .jsonl of call arguments, "
        "or a folder of NAME.txt with NAME.png.",
        show_default="those of dq",
        **CALIBRATION,
    ),
]
Steps = Annotated[
    int | None, Option(min=1, help="Denoising steps of a calibration run.", show_default="20", **CALIBRATION)
]
Samples = Annotated[int | None, Option(min=1, help="Denoiser inputs to record.", show_default="64", **CALIBRATION)]
Seed = Annotated[int | None, Option(min=0, help="Seed of the calibration runs.", show_default="0", **CALIBRATION)]
Policy = Annotated[
    str | None,
    Option(
        help=f"Which of them: {', '.join(sorted(POLICIES))}.",
        show_default="stratified",
        autocompletion=_among(POLICIES),
        **CALIBRATION,
    ),
]
Metric = Annotated[str, Option(help=f"What harm is: {', '.join(METRICS)}.", autocompletion=_among(METRICS), **BUDGET)]
CallArguments = Annotated[
    list[str], Option("--set", help="Calibration call argument: name=JSON, may repeat.", **CALIBRATION)
]
Work = Annotated[Path | None, Option(help="Folder to work in, kept: a killed run goes on there.", **CALIBRATION)]
BudgetGib = Annotated[float | None, Option(help="Most GiB of the denoiser; formats are mixed.", **BUDGET)]
BudgetBits = Annotated[float | None, Option(help="Most bits per weight, on average.", **BUDGET)]
BudgetMs = Annotated[float | None, Option(help="Most milliseconds per step, by measured layers.", **BUDGET)]
TuneMinutes = Annotated[
    float | None, Option(help="Then learn from the full-precision model for so long.", **CALIBRATION)
]


def check_place(out: Path, force: bool) -> None:
    """DQError when `out` may not be written: a file, a folder that is not empty, or with force no saved model."""
    if out.exists() and not out.is_dir():
        raise DQError(f"--out {str(out)!r} is a file, expected a folder that is new or empty")
    full = out.is_dir() and any(out.iterdir())
    if full and not force:
        raise DQError(f"--out {str(out)!r} is not empty; give a new folder, or --force to replace the model in it")
    if full and not any((out / name).is_file() for name in ("model_index.json", "config.json")):
        raise DQError(f"--out {str(out)!r} holds something other than a model; --force replaces saved models only")


@contextlib.contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block succeeds; DQError before it when it may not."""
    check_place(out, force)
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(disk.replacing(out))
        except OSError as error:
            raise DQError(f"--out {str(out)!r} cannot be written: {error.strerror}; choose another place") from error
        yield place


def budget_of(gib: float | None, bits: float | None, ms: float | None, metric: str = "trajectory") -> Budget | None:
    """The Budget of the options, None without any. DQError for figures that are none."""
    if gib is None and bits is None and ms is None:
        return None
    most = None if gib is None else int(gib * 2**30)
    return Budget(bytes=most, ms_per_step=ms, bits=bits, metric=metric)


def needless(recipe: str, asked: dict) -> DQError:
    """For options of a calibration, by argument, beside a recipe that has none."""
    option = next(iter(asked), "set").replace("folder", "work")
    return DQError(f"recipe {recipe!r} is data-free and runs nothing; leave --{option} out")


def tune_of(minutes: float | None) -> Tune | None:
    """The Tune of the option, None without it."""
    return None if minutes is None else Tune(minutes=minutes)


def pair(text: str, option: str, example: str) -> tuple[str, str]:
    """name=value as (name, value). DQError with the example for anything else."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise DQError(f"{option}: got {text!r}, expected name=value, for example {option} {example}")
    return name, value


def components(texts: list[str]) -> dict[str, str | None]:
    """Recipes by component, None for one that is left as it is."""
    found = dict(pair(text, "--component", "text_encoder=int8-weight") for text in texts)
    return {name: None if value == "none" else value for name, value in found.items()}


def arguments(texts: list[str]) -> dict:
    """Call arguments given as name=JSON; what is no JSON is text."""
    return {key: _value(value) for key, value in (pair(text, "--set", "eta=0.5") for text in texts)}


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def dtype_of(text: str | None) -> str | None:
    """torch's name of a dtype. DQError for an unknown one."""
    if text is None:
        return None
    if text not in DTYPES and text not in DTYPES.values():
        raise DQError(f"--dtype {text!r} is unknown, {nearest(text, DTYPES)}")
    return DTYPES.get(text, text)


def short_of(dtype: str) -> str:
    """The option's name of a dtype: fp32 of float32. DQError for one that `dq bench --peers` does not compare with."""
    short = next((short for short, name in DTYPES.items() if name == dtype), dtype)
    if short not in ("bf16", "fp32"):
        raise DQError(f"--dtype {short!r} has no contenders, expected bf16 or fp32")
    return short


def device_of(text: str | None) -> str:
    """The device asked for, or the best there is. DQError for one that is not there."""
    import torch

    if text is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise DQError(f"--device {text!r} is not available here, expected cpu or cuda") from None
    return text
