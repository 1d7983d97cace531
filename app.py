"""The demo: `make app`, or `python app.py [--models FOLDER]... [--runs FOLDER]...`.

Tabs: Compare (one prompt, full precision against quantized), Quantize (run a recipe, take the result away), Results
(browse evaluation runs). Every action is also an endpoint for gradio_client; the page's footer lists them.
Exit codes: 0 done, 2 wrong use (one line on stderr), 1 a fault of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from dq.cli import leaving
from dq.errors import DQError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Folders = Annotated[list[Path], typer.Option(exists=True, file_okay=False)]


def __getattr__(name: str):
    """`build` and `launch`, imported when asked for: options are answered before gradio and torch are there."""
    if name in ("build", "launch"):
        from demo import page

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command line and leave with its exit code."""
    leaving.run(app, "app.py", "app")


@app.command()
def serve(
    models: Annotated[
        list[Path], typer.Option(exists=True, file_okay=False, help="Folder of pipelines; may repeat.")
    ] = [],  # noqa: B006
    runs: Annotated[
        list[Path], typer.Option(exists=True, file_okay=False, help="Folder of evaluation runs; may repeat.")
    ] = [],  # noqa: B006
    made: Annotated[Path, typer.Option(file_okay=False, help="Where results are kept.")] = Path("out/app/quantized"),
    most: Annotated[int, typer.Option(min=1, max=100, help="Pipelines in memory at once.")] = 2,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=10_000, help="The longest that one user's work may take.")
    ] = 60,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one of this machine.")] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(min=1, max=65535, help="A free one if left out.")] = None,  # noqa: UP045
    allow_host: Annotated[list[str], typer.Option(help="A name that the page may be asked by; may repeat.")] = [],  # noqa: B006
) -> None:
    """Serve the page until it is stopped."""
    _listens(host, port)
    from demo import page

    read = runs or [Path("out")]
    page.launch(page.build(models, read, made, most, minutes), [made, *read], host, port, names=allow_host)


def _listens(host: str, port: int | None) -> None:
    """DQError when nobody can listen there."""
    import socket

    try:
        (family, *_, address), *_ = socket.getaddrinfo(host.strip("[]") or None, port or 0, type=socket.SOCK_STREAM)
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, UnicodeError) as error:
        raise DQError(f"cannot listen on {host!r}, port {port or 'any'}: {error}; choose another one") from None


if __name__ == "__main__":
    main()
