"""The command line: `dq quantize | plan | inspect | generate | bench`.

Exit codes: 0 done, 2 wrong use (one line on stderr), 1 a fault of ours (a traceback). Help, completion, `inspect` and
what is wrong with the options themselves are answered without importing torch.
"""

from __future__ import annotations

import sys

import typer
from typer.exceptions import TyperException

from dq.cli.commands import app
from dq.cli.options import replacing
from dq.errors import DQError

__all__ = ["app", "main", "replacing"]


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = app(prog_name="dq", standalone_mode=False)
    except DQError as error:
        _fail(str(error))
    except TyperException as error:
        message = error.format_message()
        if not message:  # no command: the help was shown
            sys.exit(2)
        _fail(f"{message} (`{_usage(error)} --help` lists what it takes)")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "dq"


def _fail(message: str) -> None:
    """One line on stderr, exit code 2."""
    print("dq: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
