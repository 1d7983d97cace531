"""The Quantize tab: run a recipe with live progress, stop it, take plan and report away.

The work is done by `demo.job` in a process of its own, so that it ends at once when its user says so or leaves.
"""

from __future__ import annotations

import atexit
import contextlib
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from demo import drawing, look
from demo.job import PLAN, REPORT
from demo.models import Shelf
from demo.sessions import Sessions, Stopped, told
from dq import cookbook, disk
from dq.errors import DQError, nearest
from pipelines import tiny

MOST_SAMPLES, MOST_PROMPTS, KEPT = 1024, 200, 8
LEAST_BITS, MOST_BITS = 2, 16  # of a budget; 0 stands for none
LAYER_COLUMNS = ["layer", "weight", "activation", "rank", "KiB", "SQNR, dB", "kernel"]
BAR = re.compile(r"^(?P<what>.*?):?\s+(?P<share>\d+)%\|.*?\|\s*(?P<done>\d+)/(?P<all>\d+)\s*\[")
BEAT, GRACE = 0.3, 5.0  # seconds between looks at the process, and until it is killed


class Job:
    """One run of `demo.job`: its last progress bar, its last lines, and its end."""

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.lines, self.bar = settings, deque(maxlen=12), None
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "demo.job"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        self.process.stdin.write(json.dumps(settings).encode())
        self.process.stdin.close()
        atexit.register(self.end)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        """Progress bars end in a carriage return, everything else in a line feed."""
        pending = b""
        while chunk := self.process.stderr.read1(4096):
            *whole, pending = re.split(rb"[\r\n]+", pending + chunk)
            for line in (*whole, pending):
                text = line.decode(errors="replace").strip()
                if found := BAR.match(text):
                    self.bar = found.groupdict()
                elif text and line is not pending:
                    self.lines.append(text)
        atexit.unregister(self.end)

    def failed(self) -> str:
        """Why it ended without a result, in one line."""
        self.reader.join(GRACE)
        told_by_dq = [line.removeprefix("dq: ") for line in self.lines if line.startswith("dq: ")]
        if self.process.returncode == 2 and told_by_dq:
            return told_by_dq[-1]
        return f"the job ended with code {self.process.returncode}: {self.lines[-1] if self.lines else 'no message'}"

    def end(self) -> None:
        """Stop it if it runs, without waiting for that: the server's event loop may be who calls."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            threading.Thread(target=self._make_sure, daemon=True).start()

    def _make_sure(self) -> None:
        """Asked to stop it removes what it began; killed it does not."""
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        disk.sweep(self.settings["out"])


def settings(
    shelf: Shelf, model: str, recipe: str, bits: float, prompts: str, samples: int, steps: int, seed: int
) -> dict:
    """What `demo.job` is told. DQError for whatever is out of bounds."""
    place, known = shelf.place(model), cookbook.names()
    if recipe not in known:
        raise DQError(f"recipe {str(recipe)[:80]!r} is unknown, {nearest(str(recipe)[:80], known)}")
    model = str(model).strip()
    found = {"model": model, "place": str(place), "recipe": recipe}
    if bits:
        drawing.check("bits per weight", bits, LEAST_BITS, MOST_BITS)
        found["bits"] = float(bits)
    name = f"{model}-{recipe}" + (f"-{bits:g}-bits" if bits else "")
    found["out"] = str(_fresh(shelf.made, re.sub(r"[^\w.-]+", "-", name)))
    if not (bits or cookbook.get(recipe).needs_calibration):
        return found
    lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
    if len(lines) > MOST_PROMPTS or any(len(line) > drawing.LONGEST_PROMPT for line in lines):
        raise DQError(f"prompts: expected at most {MOST_PROMPTS} lines of {drawing.LONGEST_PROMPT} characters")
    drawing.check("samples", samples, 1, MOST_SAMPLES, whole=True)
    drawing.check("steps", steps, 1, drawing.MOST_STEPS, whole=True)
    drawing.check("seed", seed, 0, drawing.MOST_SEED, whole=True)
    if samples < steps:
        raise DQError(f"samples is {samples} and steps {steps}, expected at least one sample a step; raise samples")
    call = {"use_resolution_binning": False, "clean_caption": False} | tiny.CALL.get(model, {})
    call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    return found | {"prompts": lines, "samples": int(samples), "steps": int(steps), "seed": int(seed), "call": call}


def _fresh(folder: Path, name: str) -> Path:
    """A folder that is not there yet; of the results of this demo the newest KEPT stay."""
    old = sorted(
        (path for path in folder.iterdir() if (path / REPORT).is_file()), key=lambda path: path.stat().st_mtime
    )
    for path in old[: max(0, len(old) - KEPT + 1)]:
        shutil.rmtree(path, ignore_errors=True)
    number = 1
    while (folder / f"{name}-{number}").exists():
        number += 1
    return folder / f"{name}-{number}"


def running(job: Job, stop: threading.Event) -> Iterator[str]:
    """The page's words on a job until it ends. Stopped, or DQError with its last line, when it fails."""
    began = time.monotonic()
    with contextlib.closing(_Ended(job)):
        while job.process.poll() is None:
            yield _bar(job, time.monotonic() - began)
            if stop.wait(BEAT):
                raise Stopped
    if job.process.returncode:
        raise DQError(job.failed())


class _Ended:
    def __init__(self, job: Job):
        self.close = job.end


def _bar(job: Job, seconds: float) -> str:
    bar = job.bar or {"what": "loading", "share": 0, "done": 0, "all": 0}
    count = f" {bar['done']} of {bar['all']}" if int(bar["all"]) else ""
    tail = html.escape("\n".join(job.lines))
    return (
        f'<div class="job"><div class="track"><div class="done" style="width:{int(bar["share"])}%"></div></div>'
        f"<p><b>{html.escape(bar['what'])}</b>{count} · {seconds:.0f} s</p><pre>{tail}</pre></div>"
    )


def result(folder: Path) -> tuple[str, str, str, pd.DataFrame]:
    """What the page shows of a finished job: words, plan, report, layers."""
    report = json.loads((folder / REPORT).read_text("utf-8"))
    before, after = report["bytes_before"], report["bytes_after"]
    quantized = sum(row["weight"] is not None for row in report["layers"])
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report["notes"])
    words = (
        f'<div class="job"><p><b>{html.escape(folder.name)}</b> is done: {quantized} layers quantized, '
        f"{len(report['layers']) - quantized} kept, {before / 2**20:.1f} → {after / 2**20:.1f} MiB "
        f"({after / max(before, 1):.2f}x) in {report['seconds']:.0f} s. Choose it as a recipe in Compare.</p>"
        f"<ul>{notes}</ul></div>"
    )
    rows = [
        [
            row["name"],
            row["weight"] or "kept",
            row["act"] or "",
            row["rank"] or "",
            round(row["bytes"] / 1024, 1),
            "" if row["error_db"] is None else round(row["error_db"], 1),
            row["kernel"],
        ]
        for row in report["layers"]
    ]
    return words, str(folder / PLAN), str(folder / REPORT), pd.DataFrame(rows, columns=LAYER_COLUMNS)


def tab(shelf: Shelf, sessions: Sessions) -> None:
    """Lay the tab out and connect it; endpoints `quantize` and `stop_quantize`."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            inputs = _inputs(shelf)
            go, halt = look.buttons("Quantize", "quantize")
        with gr.Column(scale=7, min_width=320):
            words = gr.HTML(
                "<p>Progress appears here. Leaving the page stops the run.</p>", label="progress", elem_id="progress"
            )
            with gr.Row():
                files = [gr.DownloadButton(text) for text in ("Plan (JSON)", "Report (JSON)")]
            layers = gr.Dataframe(
                headers=LAYER_COLUMNS,
                label="Layers",
                interactive=False,
                wrap=True,
                max_height=460,
                elem_id="layers",
                column_widths=["31%", "13%", "14%", "8%", "9%", "9%", "16%"],
            )

    @told
    def run(model, recipe, bits, prompts, samples, steps, seed, request: gr.Request = None):
        """Quantize a pipeline with a recipe: words on the progress, then plan, report and layers."""
        asked = settings(shelf, model, recipe, bits, prompts, samples, steps, seed)
        with sessions.working(request) as stop:
            for text in running(Job(asked), stop):
                yield text, None, None, None
        yield result(Path(asked["out"]))

    event = go.click(
        run,
        list(inputs.values()),
        [words, *files, layers],
        api_name="quantize",
        concurrency_id="quantize",
        show_progress="hidden",
    )
    stopped = sessions.connect(halt, event, "stop_quantize")
    stopped.then(lambda: "<p>Stopped.</p>", None, words, api_visibility="private")


def _inputs(shelf: Shelf) -> dict[str, gr.components.Component]:
    names, known = shelf.names(), cookbook.names()
    found = {
        "model": gr.Dropdown(
            names, value=names[0], label="Pipeline", allow_custom_value=True, elem_id="quantize-model"
        ),
        "recipe": gr.Dropdown(
            known,
            value="svdquant-int4" if "svdquant-int4" in known else known[0],
            label="Recipe",
            elem_id="quantize-recipe",
            info="the data-free ones need no calibration",
        ),
        "bits": look.number(
            0,
            "Budget: bits per weight",
            (0, MOST_BITS),
            precision=None,
            elem_id="quantize-bits",
            info="0: the recipe's own formats; else each layer gets one by how much it harms the picture",
        ),
    }
    with gr.Accordion("Calibration", open=True):
        found["prompts"] = gr.Textbox(
            "", label="Prompts, one a line", lines=3, max_lines=8, placeholder="empty: the prompts that come with dq"
        )
        with gr.Row():
            found["samples"] = look.number(64, "Samples", (1, MOST_SAMPLES))
            found["steps"] = look.number(20, "Steps", (1, drawing.MOST_STEPS))
            found["seed"] = look.number(0, "Seed", (0, drawing.MOST_SEED))
    return found
