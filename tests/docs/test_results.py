"""Tables, plots and the picture are what committed rows give; old rows are marked; recipes keep to their status."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from PIL import Image

import dq
from dq import cookbook
from eval.experiments import headline, matrix, methods, pictures, plots, quality, recipe_tables, rows, tables

TABLES = tables.tables()
ROW = {"recipe": "int8", "model": "m", "dtype": "float32", "bytes_share": 0.5, "psnr_db": 40.0, "psnr_db_worst": 20.0}
ROW |= {"caption_accuracy": 0.5, "caption_accuracy_fp32": 0.5, "kernels": {}}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_made_from_the_committed_rows(name):
    page, make = TABLES[name]
    assert tables.current(page.read_text(), name) == make(), "run `make table`"


@pytest.mark.parametrize("page", sorted({page for page, _ in TABLES.values()}), ids=lambda page: page.name)
def test_markers_of_a_page_are_those_of_tables(page):
    mine = [name for name, (place, _) in TABLES.items() if place == page]
    assert sorted(re.findall(r"^<!-- (\w+) -->$", page.read_text(), re.MULTILINE)) == sorted(mine)


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the lines <!-- speed --> and <!-- /speed -->"):
        tables.written("# Speed\n<!-- speed -->\n", "speed", "| a |")


def test_writing_a_table_twice_changes_nothing():
    text = "a\n<!-- speed -->\n<!-- /speed -->\nb\n"
    once = tables.written(text, "speed", "| x |")
    assert once == "a\n<!-- speed -->\n\n| x |\n\n<!-- /speed -->\nb\n" == tables.written(once, "speed", "| x |")


@pytest.mark.parametrize("module", [quality, methods])
def test_rows_are_of_the_models_that_are_shipped(module):
    for row in rows.read(module.FILE):
        assert row["weights"] == quality.fingerprint(row["model"]), f"run `python -m {module.__name__}`, `make table`"


def test_quality_rows_are_of_todays_code():
    old = [row["recipe"] for row in rows.read(quality.FILE) if row.get("version") != quality.version()]
    assert old == [], "run `python -m eval.experiments.quality` and `make table`"


def test_rows_of_older_code_are_marked():
    entry = methods.ENTRIES[0]
    row = next(row for row in rows.read(methods.FILE) if row["row"] == entry.name)
    found = [row | {"version": methods.version(entry)}, row | {"model": "tiny-x", "version": "00000000"}]
    fresh, old = tables.methods(found)[2:4]
    assert tables.OLD not in fresh and f"| {entry.name}{tables.OLD} |" in old
    fresh, old, never = tables.quality([ROW | {"version": "now"}, ROW | {"version": "then"}, ROW], "now")[2:]
    assert tables.OLD not in fresh and tables.OLD in old and tables.OLD in never


def test_every_committed_row_of_older_code_is_marked_and_no_other():
    entries = {entry.name: entry for entry in methods.ENTRIES}
    for row in rows.read(methods.FILE):
        line = tables.methods([row])[2]
        assert (tables.OLD in line) == (row["version"] != methods.version(entries[row["row"]])), row["row"]


def test_a_mark_is_explained_where_it_stands():
    assert tables._with(["| int8 † |"], "Below.").endswith(f"Below. {tables.OLD_SAYS}")
    assert tables.OLD_SAYS not in tables._with(["| int8 |"], "Below.")


def test_an_interval_is_shown_where_a_row_has_one():
    assert tables.decibels({"psnr_db": 40.0}) == "40.0"
    assert tables.decibels({"psnr_db": 40.0, "psnr_db_low": 39.24, "psnr_db_high": 41.0}) == "40.0 (39.2 to 41.0)"


def test_a_method_that_does_not_beat_plain_rounding_says_why():
    assert "no reason known" not in "".join(tables.methods(rows.read(methods.FILE))), "add to methods.REASONS"


def test_emulated_arithmetic_gets_no_row_of_speeds():
    row = {"what": "x", "machine": "m", "full_ms": 1.0, "quantized_ms": 2.0, "dtype": "float32", "recipe": "fp8"}
    found = [row | {"kernel": "decode fp8", "emulated": True}, row | {"kernel": "torch._scaled_mm"}]
    lines = tables.speed(found)[2:]
    assert len(lines) == 1 and "torch._scaled_mm" in lines[0] and "| 0.50 |" in lines[0]


@pytest.mark.parametrize("name", dq.recipes())
def test_a_recipe_keeps_to_its_status(name):
    recipe = cookbook.get(name)
    assert recipe.status == recipe_tables.status(recipe), "by the rule in docs/recipes.md"


def test_every_recipe_has_a_line_with_its_source():
    lines = recipe_tables.recipes()[2:]
    assert [re.match(r"\| `(.+?)` \|", line)[1] for line in lines] == dq.recipes()
    for line, name in zip(lines, dq.recipes(), strict=True):
        recipe = cookbook.get(name)
        fitted = recipe.needs_calibration
        assert line.endswith(f" | {'yes' if fitted else 'no'} | {recipe.status} |")
        assert (re.search(r"\(.*(arXiv|\d{4}).*\)", line) is not None) == (fitted or bool(recipe.attention))


@pytest.mark.parametrize("name", plots.PLOTS)
def test_plots_show_the_committed_rows(name):
    data, _, _ = plots.PLOTS[name]
    assert plots.plotted(name) == json.loads(json.dumps(data())), "run `make table`"


def test_every_method_and_recipe_with_rows_is_plotted():
    for model, points in plots.quality_size().items():
        found = [row for row in rows.read(methods.FILE) if row["model"] == model and row["row"] == row["recipe"]]
        assert {row["row"] for row in found} <= {point["name"] for point in points}


def test_names_in_a_plot_keep_their_order_and_distance():
    assert plots.spread([1.0, 5.0], 2) == [1.0, 5.0]
    assert plots.spread([1.0, 1.0, 1.0], 2) == [-1.0, 1.0, 3.0]
    found = plots.spread([0.0, 1.0, 1.5, 6.0, 6.1], 2)
    assert all(b - a >= 2 - 1e-9 for a, b in pairwise(found))


def test_the_picture_shows_the_committed_rows():
    with Image.open(pictures.FILE) as sheet:
        told = json.loads(sheet.text["figures"])
    assert told == pictures.shown(), "run `python -m eval.experiments.pictures`"


def test_needs_are_answered_by_recipes_that_there_are():
    assert {recipe for _, recipe, _, _ in headline.NEEDS} <= set(dq.recipes())
    assert len(headline.NEEDS) == 6 and all(cookbook.get(name).status == "stable" for _, name, _, _ in headline.NEEDS)


def test_pages_say_that_no_gpu_was_measured_until_a_row_is_of_one():
    gpus = [processor for processor in matrix.PROCESSORS if processor.device == "cuda"]
    measured = any(processor.owns(row) for processor in gpus for row, _ in matrix._timed_rows())
    page, readme = tables.ROOT / "docs" / "results" / "gpu.md", tables.ROOT / "README.md"
    assert ("Nothing here was measured on a GPU yet" in page.read_text()) != measured
    assert ("[no GPU](docs/results/gpu.md) ran anything yet" in readme.read_text()) != measured
