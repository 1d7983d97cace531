"""GGUF files that are damaged, cut short or written to harm: one line of DQError at once, and nothing is touched."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from diffusers import AutoModel

import dq
from dq.bridges import gguf
from dq.errors import DQError
from tests.bridges import written
from tests.test_cli import refused

MAGIC = b"GGUF"


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
    count = struct.pack("<I", len(shape) if dims is None else dims)
    return text(name) + count + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


def header(tensors: list[bytes] = (), entries: list[bytes] = (), counts=None, version: int = 3) -> bytes:
    given = struct.pack("<QQ", *(counts or (len(tensors), len(entries))))
    return MAGIC + struct.pack("<I", version) + given + b"".join(entries) + b"".join(tensors) + bytes(4096)


ONE = tensor("a", (32, 2))
HOSTILE = {
    "empty": (b"", "cannot be read"),
    "another kind": (b"PK\x03\x04" + bytes(100), "is no GGUF file"),
    "magic alone": (MAGIC, "the version would end at byte 8"),
    "old version": (header([ONE], version=1), "has version 1, expected 2 or 3"),
    "big-endian": (header([ONE], version=0x03000000), "expected 2 or 3, little-endian"),
    "tensors without end": (header([ONE], counts=(2**60, 0)), "it counts 1152921504606846976 tensors"),
    "entries without end": (header([ONE], counts=(1, 2**63)), "entries of metadata"),
    "more tensors than there are": (header([ONE], counts=(99_999, 0)), "would end|dimensions|twice"),
    "name beyond the file": (header([text("a", 2**40)]), "would have 1099511627776 bytes"),
    "name that ends after the file": (header([text("a", 1000)])[:200], "would end at byte"),
    "name of no text": (header([tensor("x", (2,)).replace(b"x", b"\xff")]), "is no text"),
    "value beyond the file": (header([ONE], [entry("k", 8, text("v", 2**50))]), "would have 1125899906842624 bytes"),
    "array without end": (header([ONE], [entry("k", 9, struct.pack("<IQ", 0, 2**62))]), "would hold"),
    "array of texts without end": (
        header([ONE], [entry("k", 9, struct.pack("<IQ", 8, 2**20))]),
        "would end|would have|is no text",
    ),
    "arrays in arrays": (header([ONE], [entry("k", 9, struct.pack("<IQ", 9, 1))]), "is an array of type 9"),
    "unknown value": (header([ONE], [entry("k", 77, b"")]), "has type 77, expected 0 to 12"),
    "key twice": (header([ONE], [entry("k", 0, b"\1")] * 2), "key 'k' stands twice"),
    "tensor twice": (header([ONE, ONE]), "tensor 'a' stands twice"),
    "no dimensions": (header([tensor("a", ())]), "has 0 dimensions"),
    "dimensions without end": (header([tensor("a", (2,), dims=2**31)]), "dimensions, expected 1 to 5"),
    "size of zero": (header([tensor("a", (0, 4))]), "has sizes"),
    "sizes that overflow": (header([tensor("a", (2**32, 2**32))]), "has sizes"),
    "unknown type": (header([tensor("a", (32,), kind=999)]), "has type 999, unknown to gguf"),
    "half a block": (header([tensor("a", (33, 2), kind=8)]), "whole blocks of 32 of Q8_0"),
    "data beyond the file": (header([tensor("a", (2**20, 64))]), "tensor 'a' ends at byte"),
    "offset beyond the file": (header([tensor("a", (32,), offset=2**62)]), "ends at byte"),
    "offset between": (header([tensor("a", (32,), offset=3)]), "at no multiple of 32"),
    "one in another": (header([ONE, tensor("b", (32, 2), offset=32)]), "begins at 32, within another"),
    "alignment of zero": (
        header([ONE], [entry("general.alignment", 4, struct.pack("<I", 0))]),
        "its alignment is '0'",
    ),
    "alignment of three": (header([ONE], [entry("general.alignment", 4, struct.pack("<I", 24))]), "its alignment is"),
    "alignment of text": (header([ONE], [entry("general.alignment", 8, text("32"))]), "its alignment is '32'"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_one_line(what, tmp_path, monkeypatch, capsys):
    data, line = HOSTILE[what]
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(DQError, match=line) as told:
        gguf.File(file)
    assert time.perf_counter() - start < 2 and "\n" not in str(told.value) and len(str(told.value)) < 400
    out = tmp_path / "out"
    words = ("quantize", file, "--recipe", "int8", "--pipeline", "pipelines/tiny/tiny-pixart", "--out", out)
    refused(monkeypatch, capsys, *words)
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_any_changed_or_missing_byte_of_a_header_is_read_or_refused(tmp_path):
    model, _ = written.model("pixart")
    file = written.file(tmp_path / "m.gguf", written.named(model, False), "Q8_0", "pixart", dq__note="text")
    whole = file.read_bytes()
    end = min(info.start for info in gguf.File(file).tensors.values())
    dice, refusals, changed = random.Random(0), 0, tmp_path / "changed.gguf"
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 2, 8))):
            data[dice.randrange(end)] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
        changed.write_bytes(data[: dice.choice((len(data), len(data), dice.randrange(len(data))))])
        try:
            found = gguf.File(changed)
            assert all(info.start + info.size <= changed.stat().st_size for info in found.tensors.values())
        except DQError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert 100 < refusals < 400


@pytest.mark.parametrize("at", [0.5, 0.999])
def test_a_file_cut_short_is_refused_before_a_tensor_is_read(at, tmp_path):
    model, config = written.model("qwen_image")
    file = written.file(tmp_path / "m.gguf", written.named(model, False), "Q8_0")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * at)])
    with pytest.raises(DQError, match=r"ends at byte .* download it again"):
        dq.from_file(file, config=config)


def test_values_that_are_no_numbers_are_named(tmp_path):
    model, config = written.model("qwen_image")
    state = written.named(model, False)
    state["proj_out.bias"] = state["proj_out.bias"] * float("nan")
    with pytest.raises(DQError, match=r"tensor 'proj_out.bias' holds NaN or Inf"):
        dq.from_file(written.file(tmp_path / "m.gguf", state, "Q8_0"), config=config, progress=False)


def test_a_killed_conversion_leaves_nothing_and_a_second_one_is_whole(tmp_path):
    pipe = AutoModel.from_pretrained("pipelines/tiny/tiny-pixart/transformer")
    file = written.file(tmp_path / "m.gguf", written.named(pipe, False), "Q8_0", "pixart")
    out, place = tmp_path / "out", "pipelines/tiny/tiny-pixart"
    words = ["quantize", str(file), "--recipe", "stored", "--pipeline", place, "--dtype", "fp32", "--out"]
    stop = (
        "import os, signal, dq.host.files as files; "
        "files._settle = lambda path: os.kill(os.getpid(), signal.SIGKILL); "
    )
    code = "import sys; {}from dq.cli import main; sys.argv = ['dq', *sys.argv[1:]]; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(dq.__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, "-c", code.format(stop), *words, str(out)], env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert any(path.name.startswith(".out-") for path in tmp_path.iterdir()), "it was killed while it wrote"
    for folder in (out, tmp_path / "other"):
        subprocess.run(
            [sys.executable, "-c", code.format(""), *words, str(folder)],
            env=environment,
            check=True,
            capture_output=True,
        )
    names = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert all((out / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in names)
    assert not any(path.name.startswith(".out-") for path in tmp_path.iterdir())
