"""The demo: `make app`, or `python app.py [--models FOLDER]... [--runs FOLDER]...`.

Tabs: Compare (one prompt, full precision against quantized), Quantize (run a recipe, take the result away), Results
(browse evaluation runs). Every action is also an endpoint for gradio_client; the page's footer lists them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: no call home

import gradio as gr
from starlette.middleware import Middleware

from demo import compare, look, quantizing, results
from demo.models import Shelf
from demo.sessions import Sessions

QUEUE, UPLOAD = 100, "8mb"
CLEAN = 3600  # seconds after which pictures that were shown leave the disk
HEAD = """# dq
Diffusion pipelines in full precision and quantized, side by side."""


def build(models: list[Path], runs: list[Path], made: Path, most: int = 2) -> gr.Blocks:
    """The page. models, runs: the folders it may read; made: where quantized pipelines are kept; most: in memory."""
    made.mkdir(parents=True, exist_ok=True)
    shelf, sessions = Shelf(models, made, most), Sessions()
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
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def launch(page: gr.Blocks, readable: list[Path], host: str = "127.0.0.1", port: int | None = None, wait=True) -> str:
    """Serve the page; its address. readable: folders from which files may be downloaded."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        theme=look.THEME,
        css=look.CSS,
        allowed_paths=[str(folder.resolve()) for folder in readable],
        max_file_size=UPLOAD,
        footer_links=["api"],
        app_kwargs={"middleware": [Middleware(look.OwnHost)]},
        quiet=not wait,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
    )
    return address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, action="append", default=[], help="folder of pipelines; may repeat")
    parser.add_argument("--runs", type=Path, action="append", default=[], help="folder of evaluation runs; may repeat")
    parser.add_argument("--made", type=Path, default=Path("out/app/quantized"), help="where results are kept")
    parser.add_argument("--most", type=int, default=2, help="pipelines in memory at once")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=None)
    options = parser.parse_args()
    runs = options.runs or [Path("out")]
    page = build(options.models, runs, options.made, options.most)
    launch(page, [options.made, *runs], options.host, options.port)


if __name__ == "__main__":
    main()
