"""Metrics, one file each, found by listing this folder. A file has

    NEEDS         what `score` and `per_item` take, in this order; eval/score.py tells what a run can give
    UNITS         figure -> its unit, the headline first
    BETTER        "higher" or "lower", or one for each figure
    score(...)    -> {figure: value}

and, where it applies,

    per_item(...) -> the headline of each picture, video or run: a list of floats, whose mean is the headline
                  without it, and unless it is of whole sets, a run has a row for every figure of `score`
    why_not(...)  -> why it cannot be computed on this machine, or None
    INSTEAD       the metric that stands in for it then
    JUDGES        {network it looks through: what a run must have for it}, the usual one first, the stand-in next;
                  `per_item` and `why_not` then take a network's name last
    JUDGE_FROM    (section, key) of a suite that names another network

FID and KID take features in place of pictures: see eval/features.py and what these two files say beside.
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from dq.errors import DQError, nearest


def names() -> list[str]:
    """Every metric that is there."""
    return sorted(item.name for item in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The file of a metric; DQError for an unknown name."""
    if name not in names():
        raise DQError(f"unknown metric {name!r}, {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def why_no_library(*packages: str) -> str | None:
    """Which of these packages is not installed, None when all are."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"needs {' and '.join(absent)}, not installed here" if absent else None
