"""How every command line here ends: an exit code, and what is wrong in one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from dq.errors import DQError


def run(app: typer.Typer, program: str, name: str, hint: Callable[[TyperException], str] = lambda _: "") -> NoReturn:
    """Run a command line and leave with its exit code: 0 done, 2 wrong use, 130 interrupted.

    program  as its own help calls it
    name     begins the line on stderr
    hint     what ends a line about wrong options
    """
    try:
        code = app(prog_name=program, standalone_mode=False)
    except DQError as error:
        _fail(name, str(error))
    except TyperException as error:
        message = error.format_message()
        if not message:  # no command: the help was shown
            sys.exit(2)
        _fail(name, message + hint(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(name: str, message: str) -> NoReturn:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
