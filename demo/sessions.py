"""What every tab needs: stopping one user's work, and telling what went wrong as one line of text."""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator

import gradio as gr
import torch

from dq.errors import DQError

log = logging.getLogger("demo")


class Stopped(Exception):
    """The user asked for it, or left."""


class Sessions:
    """Which work runs for which browser session, so that a user stops their own and nobody else's.

    minutes  after which work ends by itself, so that whoever has gone without a word holds nothing for ever
    """

    def __init__(self, minutes: float = 60):
        self.minutes = minutes
        self._stops: dict[str, list[threading.Event]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def working(self, request: gr.Request | None) -> Iterator[threading.Event]:
        """An event that is set when the work in the block should end."""
        session, stop = getattr(request, "session_hash", None) or "", threading.Event()
        late = threading.Timer(60 * self.minutes, stop.set)
        late.daemon = True
        with self._lock:
            self._stops[session].append(stop)
        late.start()
        try:
            yield stop
        except Stopped:
            if late.finished.is_set():
                asked = "take fewer steps, a smaller size or fewer samples"
                raise DQError(f"that took longer than the {self.minutes:g} minutes it may take; {asked}") from None
            raise
        finally:
            late.cancel()
            with self._lock:
                self._stops[session].remove(stop)
                if not self._stops[session]:
                    del self._stops[session]

    def stop(self, request: gr.Request) -> str:
        """End what runs for this session; says how much that was."""
        with self._lock:
            mine = list(self._stops.get(getattr(request, "session_hash", None) or "", ()))
        for stop in mine:
            stop.set()
        return f"stopping {len(mine)}" if mine else "nothing was running"

    def connect(self, button: gr.Button, event, name: str) -> gr.events.Dependency:
        """Let a button, and an endpoint of that name, stop an event that runs or waits in the queue."""

        def stop(request: gr.Request):
            """Stop what runs for this session."""
            return self.stop(request)

        words = gr.Textbox(label="said", visible=False)  # for programs
        return button.click(stop, None, words, api_name=name, queue=False, cancels=[event])


def told(function: Callable) -> Callable:
    """The function with every failure as a gr.Error of one line; faults of ours go to the log with their traceback."""

    @functools.wraps(function)
    def safe(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            raise _as_text(error) from None

    @functools.wraps(function)
    def safe_stream(*args, **kwargs):
        try:
            yield from function(*args, **kwargs)
        except GeneratorExit:
            raise
        except BaseException as error:
            raise _as_text(error) from None

    return safe_stream if inspect.isgeneratorfunction(function) else safe


def _as_text(error: BaseException) -> BaseException:
    """What the user sees: the page renders messages as HTML, so that signs of it are written out."""
    if isinstance(error, gr.Error) or not isinstance(error, Exception):
        return error
    if isinstance(error, Stopped):
        return _shown("Stopped.", "Stopped", duration=5)
    if isinstance(error, DQError):
        return _shown(" ".join(str(error).split()), "That does not work")
    if isinstance(error, torch.OutOfMemoryError):
        return _shown("Out of memory: take a smaller size, or another model.", "That does not fit")
    log.error("a fault of ours", exc_info=error)
    return _shown(f"A fault of the demo ({type(error).__name__}); its log has the rest.", "A fault")


def _shown(text: str, title: str, duration: float | None = None) -> gr.Error:
    return gr.Error(html.escape(text, quote=False), duration=duration, title=title, print_exception=False)
