"""The tables of docs/results/time.md say what rows say, and mark those of older code."""

from __future__ import annotations

import pytest

from eval.experiments import around, attention, caches, curve, rows, tables, thirds, time_tables

HOW = {"prompts": 64, "commit": "abc", "machine": "m", "version": "then"}
PICTURES = {"psnr_db": 40.0, "psnr_db_low": 39.0, "psnr_db_high": 41.0, "caption_accuracy": 0.5}
ATTENTION = {"model": "tiny-pixart", "steps": 20}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """write(module, rows...): they are the rows of a module's file."""

    def write(module, *found):
        monkeypatch.setattr(module, "FILE", tmp_path / f"{module.__name__}.json")
        for index, row in enumerate(found):
            rows.add(module.FILE, HOW | row | {"index": index}, ("index",))

    return write


def test_formats_along_the_run_stand_with_their_mean_bits(written):
    noise = {f"noise_sqnr_{third}_db": 30.0 + i for i, third in enumerate(("early", "middle", "late"))}
    row = {"model": "tiny-pixart", "row": "by thirds", "act_bits": 5.4, "formats": {"4-4-8": 3, "8": 1}}
    written(thirds, row | noise | PICTURES, row | noise | PICTURES | {"version": thirds.version("tiny-pixart")})
    old, new = time_tables.along()[2:]
    assert f"by thirds{tables.OLD} | 5.4 | 3 of 4-4-8, 1 of 8 | 40.0 (39.0 to 41.0) | 30.0 / 31.0 / 32.0 |" in old
    assert tables.OLD not in new


def test_attention_has_a_table_of_calls_and_one_of_pictures(written):
    label, drawn = next(iter(attention.CALLS)), next(iter(attention.PICTURES))
    calls = {"picture_db": 20.0, "picture_least_cosine": 0.99, "text_db": 30.0, "text_least_cosine": 0.999}
    modules = {"q int4/thread": 12, "in floating point": 2}
    written(
        attention,
        ATTENTION | {"kind": "calls", "row": label} | calls,
        ATTENTION | {"kind": "pictures", "row": drawn, "modules": modules} | PICTURES,
    )
    assert time_tables.attention_calls()[2:] == [
        f"| tiny-pixart | {label}{tables.OLD} | 20.0 (0.9900) | 30.0 (0.9990) |"
    ]
    assert time_tables.attention_pictures()[2].endswith("| 50 % | 12 x q int4/thread; 2 x in floating point |")


def test_caches_say_what_the_correction_found(written):
    row = {"model": "tiny-pixart", "recipe": "int8+interval:2", "policy": "", "steps": 20, "said": ["qandc: kept"]}
    written(caches, row | PICTURES)
    assert time_tables.caching()[2].endswith("| 20 | 40.0 (39.0 to 41.0) | 50 % | qandc: kept |")


def test_corrections_stand_with_errors_over_seeds(written):
    figures = dict.fromkeys(("psnr_db", "caption_accuracy", "clip_score", "fid"), 1.0)
    errors = {f"{name}_se": 0.25 for name in figures}
    row = {"model": "tiny-sd-4step", "steps": 4, "rounded": "svdquant-int4", "values": {"output": [0.99, 1.01]}}
    written(around, row | figures | errors | {"score": "clip"}, row | figures | errors | {"score": "", "values": {}})
    found, plain = time_tables.corrected()[2:]
    assert "| clip | 1.00 ± 0.25 | 1.000 ± 0.250 | 1.00 ± 0.25 | 1.00 ± 0.25 | 0.990, 1.010 |" in found
    assert "| none |" in plain


def test_what_is_saved_is_beside_full_precision_of_the_same_conditions(written):
    row = {"model": "m", "dtype": "bfloat16", "batch": 4, "steps": 20, "level": "AVX2", "threads": 2}
    full = row | {"recipe": "", "ms_per_picture": 100.0, "caption_accuracy": 0.5}
    int8 = row | {"recipe": "int8", "ms_per_picture": 40.0, "error_db": 30.0}
    written(curve, full, int8, full | {"batch": 1, "ms_per_picture": 200.0})
    assert time_tables.saved()[2:4] == [
        "| m | 20 | full precision, bf16 | 100.0 | 1.00 |  | 50 % |",
        "| m | 20 | `int8` | 40.0 | 2.50 | 30.0 |  |",
    ]
