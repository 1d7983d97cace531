"""The Compare tab: one prompt, one seed, the full-precision and the quantized pipeline side by side."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image

import dq
from demo import drawing, look, models
from demo.drawing import Drawn, Request, Watch
from demo.models import Shelf
from demo.sessions import Sessions, told
from dq import cookbook
from dq.errors import DQError
from dq.report import with_speed
from eval import metrics
from eval.metrics import psnr
from pipelines import tiny

KERNEL_COLUMNS = ["layers", "for example", "weight", "activation", "kernel", "why none faster"]
FPS = 8
EXAMPLES = [
    "a yellow star above an orange ring",
    "a green cross next to a blue circle",
    "a small red ring under a cyan circle",
    "a big cyan square over a small white plus sign",
    "there is an orange cross",
    "a large red star moving left slowly",  # of tiny-video
]


@dataclass(frozen=True)
class Comparison:
    """Both results, figures as plain JSON, and the rows of the kernel table."""

    before: Drawn
    after: Drawn
    figures: dict[str, Any]
    kernels: pd.DataFrame


def compare(shelf: Shelf, chosen: tuple, wish: Request, stop: Event, tell: Callable[[float, str], None]) -> Comparison:
    """Draw with a model and its quantized form.

    chosen   names of the model and the recipe, and a plan's file or None, which then goes before the recipe
    tell     called with a share of the work and words, after each step
    """
    model, recipe, file = chosen
    plan = models.plan_of(file) if file is not None else None
    tell(0.0, f"loading {model}")
    with shelf.borrow(model, plan) as shared:
        tell(0.02, "quantizing")
        form, own = shelf.form(shared, recipe, plan), tiny.CALL.get(shared.name, {})
        drawn = []
        for number, (what, pipe) in enumerate((("original", shared.pipe), ("quantized", form))):
            start = 0.05 + 0.45 * number

            def after_step(step: int, what=what, start=start) -> None:
                tell(start + 0.45 * min(1, step / wish.steps), f"{what}: step {min(step, wish.steps)} of {wish.steps}")

            if pipe not in shared.warm:
                drawing.draw(pipe, replace(wish, steps=1), own, Watch(stop, lambda step: None))
                shared.warm.add(pipe)
            drawn.append(drawing.draw(pipe, wish, own, Watch(stop, after_step)))
        tell(0.96, "measuring")
        report = dq.explain(form)
    figures = measure(*drawn, report) | {"model": shared.name, "recipe": report.recipe}
    figures |= {"seed": int(wish.seed), "steps": int(wish.steps)}
    return Comparison(*drawn, figures, kernel_table(report))


def measure(before: Drawn, after: Drawn, report) -> dict[str, Any]:
    """PSNR, the perceptual distance that can be had, ms per step, GiB: pairs are (original, quantized)."""
    name, value, note = perceptual(before.frames, after.frames)
    return {
        "psnr_db": round(float(psnr.per_picture(after.frames, before.frames).mean()), 2),
        "perceptual": {"name": name, "value": value, "note": note},
        "ms_per_step": [round(before.ms_per_step, 2), round(after.ms_per_step, 2)],
        "times_as_fast": round(before.ms_per_step / max(after.ms_per_step, 1e-6), 2),
        "gib": [round(size / 2**30, 5) for size in (report.bytes_before, report.bytes_after)],
        "share": round(report.bytes_after / max(report.bytes_before, 1), 3),
        "peak_gib": [before.peak_gib, after.peak_gib] if before.peak_gib is not None else None,
        "frames": len(before.frames) if before.video else 0,
    }


def perceptual(before: list[Image.Image], after: list[Image.Image]) -> tuple[str, float | None, str]:
    """(metric, mean value, note): LPIPS where its library and weights are, else its stand-in, named as one."""
    lpips = metrics.load("lpips")
    reason = lpips.why_not()
    if reason is None:
        return "LPIPS", round(float(np.mean(lpips.per_item(after, before))), 4), "0 for equal pictures"
    name, note = lpips.INSTEAD.replace("_", " "), f"in place of LPIPS, which {reason}"
    try:
        return name, round(float(metrics.load(lpips.INSTEAD).per_picture(after, before).mean()), 4), note
    except (ValueError, RuntimeError) as error:
        return name, None, f"{note}; not at this size: {(str(error).splitlines() or [''])[0][:80]}"


def _activations(row) -> str:
    """Of a row of a report: the format they are rounded to."""
    formats = ", then ".join((row.act, *row.late)) if row.act else ""
    return f"{formats}, left in floating point here" if row.weight_only else formats


def kernel_table(report) -> pd.DataFrame:
    """Layers alike in formats and kernel as one row, most layers first; layers in full precision last."""
    groups: dict[tuple, list] = {}
    for row in report.layers:
        refused = tuple(backend for backend, _ in row.why_not)
        key = (row.weight is None, row.weight, row.act, row.late, row.kernel, refused or row.reason)
        groups.setdefault(key, []).append(row)
    ordered = sorted(groups.values(), key=lambda found: (found[0].weight is None, -len(found)))
    rows = []
    for found in ordered:
        row, kernel = found[0], with_speed(found[0].kernel or "torch, full precision", found)
        refusals = "; ".join(f"{backend}: {reason}" for backend, reason in row.why_not)
        rows.append([len(found), row.name, row.weight or "kept", _activations(row), kernel, refusals or row.reason])
    return pd.DataFrame(rows, columns=KERNEL_COLUMNS)


def clips(before: Drawn, after: Drawn) -> dict[str, Any]:
    """What the player shows: three clips of equally many frames, drawn on one clock."""
    shown = {
        "original": before.frames,
        "quantized": after.frames,
        f"difference x{drawing.GAIN}": [
            drawing.difference(*pair) for pair in zip(before.frames, after.frames, strict=True)
        ],
    }
    return {
        "fps": FPS,
        "clips": [{"label": key, "frames": [_data(frame) for frame in frames]} for key, frames in shown.items()],
    }


def _data(frame: Image.Image) -> str:
    buffer = io.BytesIO()
    frame.save(buffer, format="WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def tab(shelf: Shelf, sessions: Sessions) -> None:
    """Lay the tab out and connect it; endpoints `compare`, `stop_compare`, `models`, `recipes`."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            inputs = _inputs(shelf)
            go, halt = look.buttons("Compare", "compare")
            gr.Examples([[text] for text in EXAMPLES], inputs["prompt"], label="Prompts", api_visibility="private")
        with gr.Column(scale=7, min_width=320):
            outputs = _outputs()

    @told
    def run(model, recipe, plan=None, request: gr.Request = None, progress=gr.Progress(), **asked):  # noqa: B008
        """Draw one prompt with a pipeline and its quantized form: pictures, difference, clips, figures, kernels."""
        wish = Request(**asked)
        with sessions.working(request) as stop:
            found = compare(shelf, (model, recipe, plan), wish, stop, lambda share, text: progress(share, desc=text))
        return shown(found)

    def choices(model: str) -> list[str]:
        """What a model can be quantized with at once."""
        return shelf.choices(model)

    first, names = ("model", "recipe", "plan"), [name for name in inputs if name not in ("model", "recipe", "plan")]
    event = gr.on(
        [go.click, inputs["prompt"].submit],
        run,
        [inputs[name] for name in first],
        outputs,
        inputs_kwargs={name: inputs[name] for name in names},
        api_name="compare",
        concurrency_id="draw",
        show_progress_on=outputs[0],
    )
    triggers = [inputs["model"].change, inputs["recipe"].focus]

    def update(model):
        with contextlib.suppress(DQError):  # told when the button is pressed
            return gr.update(choices=shelf.choices(model))
        return gr.update(choices=list(cookbook.RECIPES))

    gr.on(triggers, update, inputs["model"], inputs["recipe"], api_visibility="private", show_progress="hidden")
    gr.api(told(choices), api_name="recipes")
    gr.api(shelf.names, api_name="models")
    sessions.connect(halt, event, "stop_compare")


def shown(found: Comparison) -> list:
    """Values of the outputs: the picture, or the middle frame of a video, in the slider; videos in the player."""
    before, after = found.before, found.after
    middle = len(before.frames) // 2
    pair = before.frames[middle], after.frames[middle]
    player = clips(before, after) if before.video else None
    return [pair, drawing.difference(*pair), player, found.figures, found.kernels]


def _inputs(shelf: Shelf) -> dict[str, gr.components.Component]:
    names = shelf.names()
    found = {
        "model": gr.Dropdown(
            names,
            value=names[0],
            label="Pipeline",
            allow_custom_value=True,
            elem_id="compare-model",
            info="an embedded one, a folder of this demo, or a Hub id",
        ),
        "recipe": gr.Dropdown(
            shelf.choices(names[0]),
            value="int8",
            label="Recipe",
            allow_custom_value=True,
            elem_id="compare-recipe",
            info="data-free, or a result of the Quantize tab",
        ),
    }
    with gr.Accordion("Or a plan of your own", open=False):
        found["plan"] = gr.File(label="Plan (JSON)", file_types=[".json"], height=90)
    found["prompt"] = gr.Textbox(
        EXAMPLES[0],
        label="Prompt",
        lines=2,
        max_length=drawing.LONGEST_PROMPT,
        submit_btn=False,
        elem_id="compare-prompt",
    )
    found["negative"] = gr.Textbox("", label="Negative prompt", max_length=drawing.LONGEST_PROMPT)
    with gr.Row():
        found["seed"] = look.number(0, "Seed", (0, drawing.MOST_SEED))
        found["steps"] = look.number(20, "Steps", (1, drawing.MOST_STEPS))
        found["guidance"] = look.number(3.0, "Guidance", (0, drawing.MOST_GUIDANCE), precision=None)
    with gr.Accordion("Size", open=False), gr.Row():
        found["width"] = look.number(0, "Width", (0, drawing.MOST_SIDE), info="0: its own")
        found["height"] = look.number(0, "Height", (0, drawing.MOST_SIDE), info="0: its own")
        found["frames"] = look.number(0, "Frames", (0, drawing.MOST_FRAMES), info="of a video")
    return found


def _outputs() -> list[gr.components.Component]:
    with gr.Row():
        slider = gr.ImageSlider(
            label="original | quantized",
            format="png",
            interactive=False,
            max_height=520,
            elem_id="pair",
            elem_classes="pixels",
            scale=1,
            min_width=280,
        )
        gap = gr.Image(
            label=f"difference, {drawing.GAIN} times as bright",
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="difference",
            elem_classes="pixels",
            scale=1,
            min_width=280,
        )
    player = look.player(elem_id="clips")
    figures = look.figures(elem_id="figures")
    kernels = gr.Dataframe(
        headers=KERNEL_COLUMNS,
        label="Kernels (dq.explain)",
        interactive=False,
        wrap=True,
        elem_id="kernels",
        column_widths=["9%", "22%", "14%", "13%", "20%", "22%"],
    )
    return [slider, gap, player, figures, kernels]
