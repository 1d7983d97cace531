"""Number formats: how a matrix of floats becomes bytes, and back. Plain torch, no state, any device.

    x̂ = (code_value(q) − z) · step        x, q: (rows, K); step, z: one value per scale block

`step` is the stored scale, or for micro formats the product of block scale and tensor scale. A block is the part of a
row that shares one scale: the tensor, the row, or `size` neighbours along K (the last group of a row may be shorter).

Adding a format is adding a file to this folder that exports `FORMATS: dict[str, Format]`, and if its names have
parameters a function `parse(name) -> Format | None`. `names()` and `get()` find it by listing the folder.
"""

import difflib
import importlib
import pkgutil

from dq.formats.base import Encoded, Format, FormatError, Granularity, Scales

__all__ = ["Encoded", "Format", "FormatError", "Granularity", "Scales", "get", "names"]


def _modules() -> list:
    """The format files of this folder, in alphabetical order."""
    found = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")
    return [importlib.import_module(f"{__name__}.{name}") for name in found]


def _catalogue() -> dict[str, Format]:
    """Every named format. Raises FormatError if two files use one name."""
    formats: dict[str, Format] = {}
    for module in _modules():
        for name, form in module.FORMATS.items():
            if name in formats or name != form.name:
                raise FormatError(f"{module.__name__}: got format {name!r} ({form.name!r}), expected its own name")
            formats[name] = form
    return formats


def names() -> list[str]:
    """Names of all formats found in this folder, sorted."""
    return sorted(_catalogue())


def get(name: str) -> Format:
    """The format of that name: one of `names()`, an alias, or a parametrised name such as "e3m4".

    Raises FormatError with the nearest name if there is none.
    """
    formats = _catalogue()
    if name in formats:
        return formats[name]
    for module in _modules():
        form = module.parse(name) if hasattr(module, "parse") else None
        if form is not None:
            return form
    nearest = difflib.get_close_matches(str(name), formats, n=1, cutoff=0.0)[0]
    raise FormatError(f"format: got {name!r}, expected one of {', '.join(sorted(formats))}; did you mean {nearest!r}?")
