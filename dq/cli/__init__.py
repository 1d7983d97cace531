"""The command line: `dq quantize | plan | inspect | export | generate | bench`.

Exit codes: 0 done, 2 wrong use (one line on stderr), 1 a fault of ours (a traceback). Help, completion, `inspect` and
what is wrong with the options themselves are answered without importing torch.
"""

from __future__ import annotations

from typer.exceptions import TyperException

from dq.cli import leaving
from dq.cli.commands import app
from dq.cli.options import replacing

__all__ = ["app", "main", "replacing"]


def main() -> None:
    """Run the command line and leave with its exit code."""
    leaving.run(app, "dq", "dq", lambda error: f" (`{_usage(error)} --help` lists what it takes)")


def _usage(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "dq"
