"""One picture of one prompt, with a pipeline of any kind."""

from __future__ import annotations

import inspect
from pathlib import Path

from dq.errors import DQError, nearest


def draw(pipe, prompt: str, seed: int, call: dict):
    """The picture of one prompt. DQError for a lone denoiser, unknown arguments and pipelines that draw no picture."""
    import torch

    if not hasattr(pipe, "components"):
        raise DQError(f"{type(pipe).__name__} is a denoiser alone, expected a pipeline; load it into one in Python")
    known = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        if name not in known:
            raise DQError(f"{type(pipe).__name__} takes no argument {name!r}, {nearest(name, known)}")
    call = plain_size(pipe) | call | {"generator": torch.Generator().manual_seed(seed)}
    try:
        output = pipe(prompt=prompt, **call)
    except (TypeError, ValueError) as error:
        raise DQError(f"{type(pipe).__name__}: {error}") from error
    if not getattr(output, "images", None):
        raise DQError(f"{type(pipe).__name__} returned no picture; use it from Python")
    return output.images[0]


def plain_size(pipe) -> dict:
    """PixArt's pipelines round sizes to a table of large ones unless told not to."""
    binning = "use_resolution_binning"
    return {binning: False} if binning in inspect.signature(type(pipe).__call__).parameters else {}


def check_picture(out: Path) -> None:
    """DQError when a file's ending is no picture's; makes its folder."""
    from PIL import Image

    known = Image.registered_extensions()
    if out.suffix.lower() not in known:
        raise DQError(f"--out {str(out)!r} has no picture's ending, expected for example .png or .jpg")
    out.parent.mkdir(parents=True, exist_ok=True)
