"""The demo does what `make demo` promises, and int8 keeps the pictures of the trained models."""

import functools
import sys

import pytest
import torch
from PIL import Image

import dq
from dq import kernels
from pipelines import first_pictures as demo
from pipelines import tiny


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A demo of two pictures and two steps."""
    monkeypatch.setattr(demo, "PICTURES", 2)
    monkeypatch.setitem(tiny.CALL["tiny-pixart"], "num_inference_steps", 2)
    monkeypatch.setattr(demo.bench, "in_turn", functools.partial(demo.bench.in_turn, least=1))
    monkeypatch.setattr(demo.step_ms, "__defaults__", (0.0,))
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path)])
    return tmp_path


def test_demo_writes_the_picture_and_prints_the_table(short, capsys):
    kernel = "int8 x int8" if kernels.vnni() else "int8 emulated"
    demo.main()
    printed = capsys.readouterr().out
    for words in ("parameter bytes", "ms per step", "fp32", "bf16", "PSNR", "caption accuracy", kernel):
        assert words in printed
    assert Image.open(short / "demo.png").height > 3 * demo.SCALE * 64
    assert dq.explain(type(tiny.load("tiny-pixart")).from_pretrained(short / "tiny-pixart-int8")).layers


def test_the_grid_puts_a_row_under_a_row():
    red, blue = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    red[:, 0], blue[:, 2] = 1, 1
    sheet = demo.grid({"a": red, "b": blue})
    assert sheet.getpixel((demo.MARGIN + 1, 1)) == (255, 0, 0)
    assert sheet.getpixel((demo.MARGIN + 1, sheet.height - 2)) == (0, 0, 255)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_int8_keeps_the_pictures(name, tmp_path):
    captions = [caption for caption, _ in tiny.prompts(4, seed=2)]
    original, quantized = tiny.load(name), tiny.load(name)
    report = dq.quantize(quantized, "int8", progress=False)
    quantized.save_pretrained(tmp_path)
    loaded = type(quantized).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    pictures = [tiny.pictures(pipe, name, captions) for pipe in (original, loaded)]
    assert demo.psnr_db(pictures[1], pictures[0]).mean() > 35
    folder = tmp_path / ("unet" if name == "tiny-sd" else "transformer")
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert files <= 0.30 * report.bytes_before
