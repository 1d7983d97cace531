"""The one error of wrong use, and the clause that names what would have been right."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

MOST_NAMES = 16  # names an error lists in full


class DQError(ValueError):
    """Wrong use of dq, told in one line: what, what was got, what was expected, what to do."""


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """A DQError from inside the block that does not name the file begins with it."""
    try:
        yield
    except DQError as error:
        if str(path) in str(error):
            raise
        raise DQError(f"file {str(path)!r}: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """The clause that ends an error about an unknown name: the known names (a few of them if many) and the nearest."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    shown = ", ".join(known) if len(known) <= MOST_NAMES else f"{', '.join(known[:4])}, ... ({len(known)} names)"
    return f"expected one of {shown}." + (f" Did you mean {close[0]!r}?" if close else "")
