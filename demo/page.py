"""The page itself: its tabs, its queue, and how it is served."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: no call home

import gradio as gr

from demo import compare, guard, look, quantizing, results, waiting
from demo.models import Shelf
from demo.sessions import Sessions

UPLOAD = 8 * 2**20  # bytes of a file
MINUTES = 60.0  # after which one user's work ends
CLEAN = 3600  # seconds after which pictures that were shown leave the disk
HEAD = """# dq
Diffusion pipelines in full precision and quantized, side by side."""


def build(models: list[Path], runs: list[Path], made: Path, most: int = 2, minutes: float = MINUTES) -> gr.Blocks:
    """The page. models, runs: the folders it may read; made: where quantized pipelines are kept; most: in memory.

    minutes: the longest that one comparison or one quantization may take
    """
    made.mkdir(parents=True, exist_ok=True)
    shelf, sessions = Shelf(models, made, most), Sessions(minutes)
    with gr.Blocks(title="dq", analytics_enabled=False, delete_cache=(CLEAN, CLEAN)) as page:
        gr.Markdown(HEAD, elem_id="head")
        with gr.Tab("Compare", id="compare"):
            compare.tab(shelf, sessions)
        with gr.Tab("Quantize", id="quantize"):
            quantizing.tab(shelf, sessions)
        with gr.Tab("Results", id="results"):
            results.tab(runs)

        def left(request: gr.Request) -> None:
            sessions.stop(request)  # nobody waits for it any more

        page.unload(left)
    return waiting.take_turns(page)


def launch(
    page: gr.Blocks,
    readable: list[Path],
    host: str = "127.0.0.1",
    port: int | None = None,
    wait: bool = True,
    names: Iterable[str] = (),
) -> str:
    """Serve the page; its address. readable: folders from which files may be downloaded; names: as in `Guard`."""

    @contextlib.asynccontextmanager
    async def guarded(server):  # middleware given to gradio would stand behind its own, which answers some by itself
        server.middleware_stack = guard.Guard(server.middleware_stack, host, names, UPLOAD + 2**16)
        yield

    guard.fetch_nothing()
    _, address, _ = page.launch(
        server_name=f"[{host}]" if ":" in host and not host.startswith("[") else host,  # as gradio wants IPv6
        server_port=port,
        prevent_thread_lock=not wait,
        theme=look.THEME,
        css=look.CSS,
        allowed_paths=[str(folder.resolve()) for folder in readable],
        max_file_size=UPLOAD,
        footer_links=["api"],
        app_kwargs={"lifespan": guarded},
        quiet=not wait,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
    )
    return address
