"""Suites, prompt files and runs that somebody else wrote, or that were damaged, are read or refused in one line."""

import json
import os
import random
import re
import time
import zlib

import numpy as np
import pytest
import yaml
from PIL import Image

from dq.errors import DQError
from eval import compare, features, prompts, reading, report, score
from eval.experiments import rows
from eval.runs import Run
from eval.suite import MOST_PICTURES, Suite
from tests.eval import made_runs

ROOT = "pipelines: {p: {path: tiny-pixart}}\nrecipes: [int8]\nprompts: {scenes: 1}\n"
SECONDS = 5.0  # nothing that is refused takes longer


def laughs(levels=9):
    """Aliases that stand for 10 ** levels values."""
    names = ["x0: &x0 [" + ",".join(["lol"] * 10) + "]"]
    names += [f"x{i}: &x{i} [" + ",".join([f"*x{i - 1}"] * 10) + "]" for i in range(1, levels)]
    return "{" + ", ".join(names) + "}"


def told(work, *args, **options):
    """The one line that a hostile file is refused with, in time."""
    began = time.monotonic()
    with pytest.raises(DQError) as caught:
        work(*args, **options)
    assert time.monotonic() - began < SECONDS
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1200
    return text


HOSTILE = {
    "aliases in a call": (
        f"pipelines: {{p: {{path: x, call: {laughs()}}}}}\nrecipes: [int8]\n",
        "more than 20000 values",
    ),
    "aliases in seeds": (ROOT + f"seeds: [{laughs()}]\n", "more than 20000 values"),
    "aliases in a merge": (ROOT + f"fid: {{<<: {laughs()}}}\n", "more than 20000 values"),
    "an anchor in itself": ("pipelines: &p {p: {path: x, call: *p}}\n", "holds itself"),
    "deep lists": ("[" * 5000, "nested too deep"),
    "deep keys": ("".join(" " * i + "a:\n" for i in range(300)), "nested too deep"),
    "many scenes": (
        ROOT.replace("scenes: 1", "scenes: 1000000000"),
        "prompts: scenes is 1000000000, expected at most 20000",
    ),
    "scenes times seeds": (
        ROOT.replace("scenes: 1", "scenes: 20000") + f"seeds: {list(range(100))}",
        f"expected at most {MOST_PICTURES} pictures",
    ),
    "many seeds": (ROOT + f"seeds: {list(range(15000))}", "seeds is a list of 15000, expected"),
    "a long decimal": (ROOT + f"steps: {'9' * 5000}", "is not YAML: .*digits"),
    "a long hexadecimal": (ROOT + f"steps: 0x{'f' * 50000}", "steps is an integer of 200000 bits, expected at most"),
    "a huge seed": (ROOT + "seeds: [99999999999999999999]", "seeds: 0 is 'an|seeds: 0 is an integer of 67 bits"),
    "a float for steps": (ROOT + "steps: 1e3", "steps is '?1"),
    "no date": (ROOT + "name: 2020-99-99", "is not YAML: month"),
    "no boolean": (ROOT + "name: !!bool maybe", "is not YAML"),
    "an object of Python": (ROOT + "name: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "a date in a call": (
        ROOT.replace("tiny-pixart", "x, call: {a: 2020-01-01}"),
        "call: holds a date, expected",
    ),
    "infinity in a budget": (ROOT.replace("[int8]", "[{recipe: int8, budget: {bits: .inf}}]"), "budget: holds inf"),
    "numbers as keys": (ROOT.replace("tiny-pixart", "x, call: {1: 2}"), "is 1, expected text"),
    "half a character": (ROOT + 'name: "\\ud800"', "name is .*expected"),
    "a NUL by escape": (ROOT.replace("tiny-pixart", '"a\\0b"'), "path is .*expected"),
    "a key twice": (ROOT + "steps: 3\nsteps: 4\n", "the key 'steps' twice"),
    "a long name": (ROOT.replace("p: {", "x" * 300 + ": {"), "at most 200 bytes"),
    "two documents": ("---\na: 1\n---\nb: 2\n", "expected a single document"),
    "nothing": ("", "is None, expected keys and values"),
    "a text": ("suite", "is 'suite', expected keys and values"),
    "a column of the grammar": (ROOT.replace("scenes: 1", "scenes: 1, column: a"), "column does not go with scenes"),
    "a wrong key far in": (ROOT.replace("[int8]", "[{recipe: int8, calibration: {sample: 3}}]"), "'samples'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_suite_is_one_line_at_once(name, tmp_path):
    text, message = HOSTILE[name]
    (tmp_path / "s.yaml").write_text(text)
    said = told(Suite.read, tmp_path / "s.yaml")
    assert str(tmp_path / "s.yaml") in said
    assert re.search(message, said), said


BYTES = {
    "latin": ("name: café\n".encode("latin-1"), "expected a text file in UTF-8"),
    "utf-16": (ROOT.encode("utf-16"), "expected a text file in UTF-8"),
    "picture": (bytes(range(256)) * 8, "expected a text file in UTF-8"),
    "NUL": (ROOT.encode() + b"\0", "holds a NUL byte"),
    "large": (b"# " + b"x" * reading.MOST_YAML, "has more than 256 KiB"),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_file_that_is_no_text_is_one_line(name, tmp_path):
    data, message = BYTES[name]
    (tmp_path / "s.yaml").write_bytes(data)
    assert message in told(Suite.read, tmp_path / "s.yaml")
    (tmp_path / "p.txt").write_bytes(data)
    if name != "large":
        assert message in told(prompts.read, tmp_path / "p.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_a_device_and_a_folder_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    (tmp_path / "d.txt").mkdir()
    for path in (tmp_path / "p.txt", tmp_path / "d.txt"):
        assert "it is a folder or a device" in told(prompts.read, path)
    assert "it is a folder or a device" in told(Suite.read, "/dev/zero")


def test_anchors_and_aliases_of_ordinary_suites_work(tmp_path):
    shared = "- {name: a, recipe: svdquant-int4, calibration: &c {samples: 40, steps: 10}}\n"
    more = "- {name: b, recipe: gptq-int4-weight, calibration: {<<: *c, seed: 3}}\n"
    (tmp_path / "s.yaml").write_text(
        "pipelines: {tiny-sd: }\nprompts: {scenes: 2}\nrecipes:\n" + shared + more + "timing: null\nmetrics: null\n"
    )
    suite = Suite.read(tmp_path / "s.yaml")
    assert suite.entry("b").calibration == {"samples": 40, "steps": 10, "seed": 3}
    assert suite.name == "s" and suite.timing == {"repeats": 0} and suite.metrics is None
    assert Suite.from_dict(json.loads(json.dumps(suite.to_dict()))) == suite


LINES = {
    "deep.json": ("[" * 100_000, "nested too deep"),
    "deep.jsonl": ('{"prompt": ' * 100_000, "nested too deep"),
    "number.jsonl": ("9" * 5000, "is damaged"),
    "values.json": ("[" + "[]," * 2_500_001 + "[]]", "holds more than"),
    "lines.txt": ("\n" * 2_000_001, "holds more than"),
    "list.json": ('[["a"]]', "a row is a list of 1, expected a text"),
    "images.json": ('{"annotations": [{"image_id": [1], "caption": 3}]}', "column 'caption' holds 3, expected text"),
    "half.json": ('["\\ud800"]', "expected texts of at most 10000 characters"),
    "long.txt": ("x" * 10_001, "expected texts of at most 10000 characters"),
    "many.txt": ("a\n" * (MOST_PICTURES + 1), "set prompts: limit"),
    "quote.csv": ('prompt\n"' + "x" * 200_000, "is damaged: field larger"),
    "empty.csv": ("", "holds no prompt"),
    "head.tsv": ("prompt\n", "holds no prompt"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_hostile_prompt_file_is_one_line_at_once(name, tmp_path):
    text, message = LINES[name]
    (tmp_path / name).write_text(text)
    assert message in told(prompts.read, tmp_path / name)


def test_short_rows_below_a_long_header_cost_nothing(tmp_path):
    """A mapping a row, with a place for every head, would hold 20 000 times 20 000 values."""
    heads = ",".join([f"c{i}" for i in range(20_000)] + ["prompt"])
    (tmp_path / "p.csv").write_text(f"prompt,{heads}\n" + "a\n" * 20_000)
    began = time.monotonic()
    assert prompts.read(tmp_path / "p.csv") == ["a"] * 20_000
    assert time.monotonic() - began < SECONDS


def test_a_limit_is_enough_for_a_large_file(tmp_path):
    (tmp_path / "many.txt").write_text("a\n" * (MOST_PICTURES + 1))
    assert prompts.read(tmp_path / "many.txt", limit=3) == ["a"] * 3
    suite = made_runs.suite(prompts={"file": str(tmp_path / "many.txt"), "limit": 150_000})
    assert "expected at most 200000 pictures" in told(prompts.items, suite)


@pytest.fixture
def run(tmp_path):
    return made_runs.make(tmp_path / "run", made_runs.PROMPTS[:2], side=32)


def latents(run, index=1):
    """The path of an item's latents, which are there for every item."""
    import torch

    for item in run.items:
        for entry in ("full", "int8"):
            run.write_trajectory("tiny-pixart", entry, item.index, torch.zeros(2, 3))
    return run.latents_path("tiny-pixart", "int8", index)


def again(run):
    """All that reads a run: opened, measured, reported."""
    found = Run(run.folder)
    report.write(found)
    score.score(found, "tiny-pixart", "int8")
    compare.compare(found, found)


GARBAGE = {"empty": b"", "bytes": b"\x93\x00\xff" * 9, "null": b"null", "list": b"[1]", "deep": b"[" * 100_000}


@pytest.mark.parametrize("what", ["manifest.json", "items.jsonl", "figures", "scores", "picture", "latents"])
def test_a_damaged_file_of_a_run_is_named_with_what_to_delete(what, run):
    names = ("tiny-pixart", "int8")
    places = {"picture": run.image_path(*names, 3), "latents": latents(run)}
    places |= {room: run.folder / room / names[0] / f"{names[1]}.json" for room in ("figures", "scores")}
    place = places.get(what, run.folder / what)
    for data in GARBAGE.values():
        place.write_bytes(data)
        said = told(again, run)
        assert str(place) in said and "delete" in said and "free space" not in said, said


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: cut(run.image_path("tiny-pixart", "int8", 3)), "00003.png' cannot be read"),
        (lambda run: Image.new("RGB", (8, 8)).save(run.image_path("tiny-pixart", "int8", 3)), "1 x 8 x 8 and 1 x 32"),
        (lambda run: cut(latents(run)), "latents .*00001.safetensors' cannot be read.*00001.png"),
        (lambda run: latents(run).unlink(), "00001.safetensors' are not those of a run; delete .*00001.png"),
        (lambda run: edit(run.folder / "manifest.json", suite={}), "manifest.json.*pipelines is missing.*put it back"),
        (lambda run: edit(run.folder / "manifest.json", commit=3), "commit is 3, expected text.*put it back"),
        (lambda run: scored(run, value="high"), "psnr: value is 'high', expected a number; delete it"),
        (lambda run: scored(run, per_item=["a"]), "psnr: per_item: 0 is 'a', expected a number; delete it"),
        (lambda run: scored(run, better="up"), "better is 'up', expected 'higher' or 'lower'"),
        (lambda run: scored(run, unit=None), "unit is None, expected text"),
        (lambda run: edit(figures(run), kernels=[1]), "kernels is a list of 1, expected keys and values; delete it"),
        (lambda run: edit(figures(run), bytes="many"), "bytes is 'many', expected an integer; delete it"),
        (lambda run: reitemed(run, scene={"items": 3}), "scene of an item: items is 3"),
        (lambda run: reitemed(run, prompt=5), "prompt is 5, expected text"),
        (lambda run: reitemed(run, index=7), "not numbered from 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_inside_a_file_of_a_run_is_named(change, message, run):
    change(run)
    said = told(again, run)
    assert re.search(message, said), said


def figures(run):
    return run.folder / "figures" / "tiny-pixart" / "int8.json"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def scored(run, **changes):
    path = run.folder / "scores" / "tiny-pixart" / "int8.json"
    found = json.loads(path.read_text())
    edit(path, psnr=found["psnr"] | changes)


def reitemed(run, **changes):
    """Another first item, with a checksum that agrees."""
    first, *rest = (run.folder / "items.jsonl").read_text().splitlines()
    text = "\n".join([json.dumps(json.loads(first) | changes), *rest]) + "\n"
    (run.folder / "items.jsonl").write_text(text)
    edit(run.folder / "manifest.json", items_crc32=f"{zlib.crc32(text.encode()):08x}")


def test_a_lost_list_of_items_is_written_again(run):
    before = (run.folder / "items.jsonl").read_bytes()
    items = run.items
    (run.folder / "items.jsonl").unlink()
    Run.create(run.folder, run.suite, items)
    assert (run.folder / "items.jsonl").read_bytes() == before


def test_a_lost_frame_of_a_video_is_named(tmp_path):
    run = made_runs.make(tmp_path / "run", frames=3)
    folder = run.image_path("tiny-pixart", "int8", 2).with_suffix("")
    (folder / "001.png").unlink()
    assert str(folder) in told(again, run)


def test_entries_of_different_sizes_have_a_report_without_differences(run):
    for item in run.items:
        run.write_frames("tiny-pixart", "int8", item.index, Image.new("RGB", (40, 40)))
    report.write(Run(run.folder))
    assert "missing" in score.score(Run(run.folder), "tiny-pixart", "int8")["psnr"]


def test_statistics_that_say_they_hold_terabytes_are_refused_before_they_are_read(tmp_path):
    import zipfile

    for name, head in {"huge": (10**6, 10**6), "odd": (3,)}.items():
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as file:
            for key in ("mu", "sigma"):
                with file.open(f"{key}.npy", "w") as part:
                    given = {"descr": "<f8", "fortran_order": False, "shape": head}
                    np.lib.format.write_array_header_1_0(part, given)
        assert "cannot be read" in told(features.Statistics.load, tmp_path / f"{name}.npz")
    for name, data in GARBAGE.items():
        (tmp_path / f"{name}.npz").write_bytes(data)
        assert "cannot be read" in told(features.Statistics.load, tmp_path / f"{name}.npz")
    np.savez(tmp_path / "nan.npz", mu=[np.nan, 0], sigma=np.eye(2), count=5)
    assert "NaN" in told(features.Statistics.load, tmp_path / "nan.npz")


def test_a_damaged_picture_among_real_ones_is_named(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    said = told(features.of_folder, tmp_path, features.RECOGNISER)
    assert "b.png" in said and "remove it" in said


def test_a_damaged_result_file_is_named(tmp_path):
    for data in GARBAGE.values():
        (tmp_path / "eval.json").write_bytes(data)
        assert "eval.json" in told(rows.read, tmp_path / "eval.json")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few of them changed, cut, doubled or replaced by what means something in YAML and JSON."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(found) + 1)
        what = rng.choice([b"", b"[", b"{", b"&a *a", b"-1", b"1e999", b"null", b'"', b"\xff", b"\0", b"!!set", b": "])
        found[place : place + rng.choice([0, 1, 5])] = what * rng.choice([1, 1, 40])
    return bytes(found)


def test_mutated_files_are_read_or_refused_in_one_line(run, tmp_path):
    rng = random.Random(0)
    suite = yaml.safe_dump(made_runs.suite().to_dict()).encode()
    lines = b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n'
    scores = run.folder / "scores" / "tiny-pixart" / "int8.json"
    whole = {path: path.read_bytes() for path in (run.folder / "manifest.json", figures(run), scores)}
    for _ in range(150):
        (tmp_path / "s.yaml").write_bytes(mutated(suite, rng))
        name = tmp_path / rng.choice(["p.jsonl", "p.json", "p.csv", "p.tsv", "p.txt"])
        name.write_bytes(mutated(lines, rng))
        path = rng.choice(list(whole))
        path.write_bytes(mutated(whole[path], rng))
        for work in (
            lambda: json.dumps(Suite.read(tmp_path / "s.yaml").to_dict()),
            lambda name=name: prompts.read(name),
            lambda: report.markdown(report.summary(Run(run.folder))),
        ):
            try:
                work()
            except DQError as error:
                assert "\n" not in str(error)
        path.write_bytes(whole[path])
