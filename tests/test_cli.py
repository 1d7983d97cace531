"""The command line: what it writes, what it prints, and one clear line with exit code 2 for wrong use.

What needs no model is answered without torch; that is looked up in `sys.modules`, not timed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

import dq
from dq import cli
from dq.host import saved
from pipelines import tiny
from tests.lines import told_by

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A Hub id that is not in the cache is refused at once, however the tests are started."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(monkeypatch, *words) -> int:
    """`dq WORDS` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["dq", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def refused(monkeypatch, capsys, *words) -> str:
    """The line that a wrong use prints."""
    capsys.readouterr()
    code = run(monkeypatch, *words)
    assert code == 2
    return told_by("dq", capsys.readouterr().err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny-pixart, quantized by the command."""
    out = tmp_path_factory.mktemp("cli") / "made" / "int8"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "quantize", "tiny-pixart", "--recipe", "int8", "--out", out, "--dtype", "fp32") == 0
    return out


def test_quantize_saves_what_diffusers_loads_and_leaves_nothing_else(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert dq.explain(pipe).recipe == "int8"
    assert [path.name for path in folder.parent.iterdir()] == ["int8"]


def test_quantize_takes_a_lone_denoiser_with_keep(monkeypatch, tmp_path, capsys):
    source, out = tiny.folder("tiny-pixart") / "transformer", tmp_path / "out"
    words = ["--recipe", "int8-weight", "--out", out, "--keep", r"transformer_blocks\.0\."]
    assert run(monkeypatch, "quantize", source, *words) == 0
    model = PixArtTransformer2DModel.from_pretrained(out, dtype=torch.bfloat16)
    kept = [row for row in dq.explain(model).layers if row.name.startswith("transformer_blocks.0.")]
    assert kept and all(row.weight is None for row in kept)
    assert "saved to" in capsys.readouterr().out


def test_quantize_takes_further_components_and_a_plan(monkeypatch, tmp_path, folder):
    plan = tmp_path / "plan.json"
    saved.plans(folder)["transformer"][1].save(plan)
    words = ["--plan", plan, "--out", tmp_path / "out", "--component", "text_encoder=int8-weight"]
    assert run(monkeypatch, "quantize", "tiny-pixart", *words) == 0
    assert set(saved.plans(tmp_path / "out")) == {"transformer", "text_encoder"}


def test_quantize_leaves_a_denoiser_as_it_is(monkeypatch, tmp_path):
    words = ["--recipe", "int8", "--out", tmp_path / "out", "--component", "transformer=none"]
    assert run(monkeypatch, "quantize", "tiny-pixart", *words, "--component", "text_encoder=int8-weight") == 0
    assert set(saved.plans(tmp_path / "out")) == {"text_encoder"}


ONE_LAYER = r"transformer_blocks\.(?!0\.attn1\.to_out)"  # kept: all other layers
FITTED = ["--recipe", "svdquant-int4", "--dtype", "fp32", "--keep", ONE_LAYER, "--steps", 2, "--samples", 2]


def test_quantize_fits_a_recipe_on_prompts_of_a_file_and_keeps_its_work(monkeypatch, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo blue rings\n")
    words = [*FITTED, "--prompts", tmp_path / "prompts.txt", "--work", tmp_path / "work", "--seed", 3]
    words += ["--policy", "all", "--set", "height=64", "--set", "width=64", "--set", "guidance_scale=3.0"]
    for out in ("one", "two"):
        assert run(monkeypatch, "quantize", "tiny-pixart", *words, "--out", tmp_path / out) == 0
        shown = capsys.readouterr().out
        assert "candidates tried a layer; peak memory" in shown and "saved to" in shown
    assert "all units were fitted before" in shown and (tmp_path / "work" / "calibration.json").exists()
    name = "transformer/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / out / name) for out in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    plan = saved.plans(tmp_path / "one")["transformer"][1]
    assert plan.recipe == "svdquant-int4" and any(layer.rank for layer in plan.layers.values())
    other = [*words, "--set", "guidance_scale=2.0", "--out", tmp_path / "three"]
    assert "another calibration: call_kwargs differs" in refused(
        monkeypatch, capsys, "quantize", "tiny-pixart", *other
    )
    assert not (tmp_path / "three").exists()


WRONG_FIT = {
    "fewer samples than steps": (["--samples", "1"], "raise samples to 2"),
    "no prompts file": (["--prompts", "nowhere.txt"], "cannot read the prompts file 'nowhere.txt'"),
    "unknown policy": (["--policy", "al"], "Did you mean 'all'"),
    "unknown argument": (["--set", "heigth=64"], "Did you mean 'height'"),
    "no value": (["--set", "height"], "expected name=value"),
}


@pytest.mark.parametrize("case", WRONG_FIT)
def test_wrong_calibration_gets_one_line_and_leaves_nothing(case, monkeypatch, capsys, tmp_path):
    words, expected = WRONG_FIT[case]
    words = ["quantize", "tiny-pixart", "--out", tmp_path / "out", *FITTED, *words]
    assert expected in refused(monkeypatch, capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_explain_says_without_reading_weights(monkeypatch, folder, capsys):
    capsys.readouterr()
    assert run(monkeypatch, "inspect", folder, "--json", "--device", "cpu") == 0
    shown = json.loads(capsys.readouterr().out)
    report = json.loads(dq.explain(DiffusionPipeline.from_pretrained(folder)).to_json())
    assert (shown["bytes_before"], shown["bytes_after"]) == (report["bytes_before"], report["bytes_after"])
    by_name = {row["name"]: row for row in report["layers"]}
    assert {row["name"]: row for row in shown["layers"]} == by_name
    assert run(monkeypatch, "inspect", folder, "--json") == 0
    for row in json.loads(capsys.readouterr().out)["layers"]:
        assert row == by_name[row["name"]] | {"backend": "", "kernel": "", "emulated": False, "why_not": []}
    assert run(monkeypatch, "inspect", folder) == 0
    assert "add --device cpu" in capsys.readouterr().out


DAMAGED = {
    "no JSON": lambda config: "{",
    "a list": lambda config: [],
    "no plan": lambda config: config | {"quantization_config": {"quant_method": "dq"}},
    "plan is no JSON": lambda config: config | {"quantization_config": {"quant_method": "dq", "plan": "{"}},
    "newer": lambda config: changed(config, version=99),
    "layers are a list": lambda config: changed(config, layers=[]),
    "kept is a list": lambda config: changed(config, kept=[]),
    "a layer is a number": lambda config: changed(config, layers={"a": 3}),
    "no shape": lambda config: changed(config, layers={"a": {"kind": "linear", "weight": "int8/channel"}}),
    "a shape of words": lambda config: changed(config, layers={"a": ROW | {"shape": ["x", "y"]}}),
    "a number for a format": lambda config: changed(config, layers={"a": ROW | {"weight": 8}}),
    "no such scale": lambda config: changed(config, layers={"a": ROW | {"act": "int8/token/often"}}),
}
ROW = {"kind": "linear", "shape": [4, 4], "weight": "int8/channel"}


def changed(config: dict, **fields) -> dict:
    """A config whose plan has other fields."""
    mine = config["quantization_config"]
    return config | {"quantization_config": mine | {"plan": mine["plan"] | fields}}


@pytest.mark.parametrize("case", DAMAGED)
def test_inspect_says_in_one_line_what_is_wrong_with_a_plan(case, monkeypatch, folder, capsys, tmp_path):
    config = DAMAGED[case](json.loads((folder / "transformer" / "config.json").read_text()))
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    refused(monkeypatch, capsys, "inspect", tmp_path)


def test_inspect_says_in_one_line_that_weights_are_damaged(monkeypatch, folder, capsys, tmp_path):
    for path in (folder / "transformer").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: -1 if path.suffix == ".safetensors" else None])
    assert "is missing or damaged" in refused(monkeypatch, capsys, "inspect", tmp_path)


def test_generate_draws_the_same_picture_for_the_same_seed(monkeypatch, folder, tmp_path):
    pictures = []
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        words = ["--prompt", "a red circle", "--out", tmp_path / "new" / name, "--seed", seed, "--steps", 2]
        words += ["--guidance", "3", "--height", "64", "--set", "max_sequence_length=40"]
        assert run(monkeypatch, "generate", folder, *words) == 0
        pictures.append(Image.open(tmp_path / "new" / name))
    assert pictures[0].size == (64, 64)
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


def test_bench_times_the_layers_and_a_saved_pipeline(monkeypatch, folder, capsys):
    monkeypatch.setattr("dq.bench.layers.SHAPES", ((8, 64, 64),))
    for words, what in (([], "linear 8 x 64 -> 64"), ([folder], "PixArtTransformer2DModel step")):
        capsys.readouterr()
        assert run(monkeypatch, "bench", *words, "--json", "--seconds", "0", "--device", "cpu") == 0
        row = json.loads(capsys.readouterr().out)[0]
        assert row["what"] == what and "int8" in row["kernel"] and row["full_ms"] > 0 and row["quantized_ms"] > 0


WRONG = {
    "no recipe": (["quantize", "tiny-pixart", "--out", "{new}"], "--recipe NAME or --plan FILE"),
    "unknown recipe": (["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int9"], "Did you mean 'int8'"),
    "a format for a recipe": (
        ["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int4"],
        "expected with 4-bit weights one of int4-weight, ",
    ),
    "no such folder": (["quantize", "./nothing", "--out", "{new}", "--recipe", "int8"], "does not exist"),
    "no model in it": (["quantize", "{empty}", "--out", "{new}", "--recipe", "int8"], "holds no model"),
    "not on this disk": (["quantize", "no/body", "--out", "{new}", "--recipe", "int8"], "cannot be loaded"),
    "prompts": (["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int8", "--prompts", "p.txt"], "data-free"),
    "steps": (["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int8", "--steps", "4"], "leave --steps out"),
    "set": (["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int8", "--set", "eta=0"], "leave --set out"),
    "budget": (
        ["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int8", "--budget-gib", "0.001"],
        "least possible",
    ),
    "bad keep": (["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int8", "--keep", "nope"], "no layer"),
    "bad component": (["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int8", "--component", "vae"], "="),
    "bad dtype": (["quantize", "tiny-pixart", "--out", "{new}", "--recipe", "int8", "--dtype", "int"], "bf16"),
    "full folder": (["quantize", "tiny-pixart", "--out", "{full}", "--recipe", "int8"], "not empty"),
    "no model there": (["quantize", "tiny-pixart", "--out", "{full}", "--recipe", "int8", "--force"], "other than"),
    "inspect nothing": (["inspect", str(tiny.folder("tiny-pixart"))], "no quantized model"),
    "not a picture": (["generate", "tiny-pixart", "--prompt", "x", "--out", "{new}.what"], ".png"),
    "unknown argument": (
        ["generate", "tiny-pixart", "--prompt", "x", "--out", "{new}.png", "--set", "heigth=64"],
        "Did you mean 'height'",
    ),
    "unknown command": (["frobnicate"], "frobnicate"),
    "unknown option": (["inspect", "x", "--what"], "--what"),
    "missing argument": (["inspect"], "dq inspect --help"),
    "not a number": (["generate", "tiny-pixart", "--prompt", "x", "--out", "a.png", "--seed", "two"], "valid integer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_gets_one_line_and_leaves_nothing(case, monkeypatch, capsys, tmp_path):
    words, expected = WRONG[case]
    (tmp_path / "empty").mkdir(), (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    places = {name: str(tmp_path / name) for name in ("new", "empty", "full")}
    assert expected in refused(monkeypatch, capsys, *[word.format(**places) for word in words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "full" / "thesis.txt").read_text() == "dear"


def test_an_embedded_name_outside_a_clone_says_where_it_lives(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(saved, "CLONE", tmp_path)
    words = ["quantize", "tiny-pixart", "--recipe", "int8", "--out", tmp_path / "out"]
    assert "pipelines/tiny of a clone" in refused(monkeypatch, capsys, *words)


def test_force_replaces_a_saved_model_whole(monkeypatch, tmp_path):
    out = tmp_path / "out"
    source = tiny.folder("tiny-pixart") / "transformer"
    assert run(monkeypatch, "quantize", source, "--recipe", "int8", "--out", out) == 0
    (out / "stale.txt").write_text("old")
    assert run(monkeypatch, "quantize", source, "--recipe", "int4-weight", "--out", out, "--force") == 0
    assert not (out / "stale.txt").exists() and saved.plans(out)[""][1].recipe == "int4-weight"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fault_of_ours_is_not_hidden(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr("dq.api.quantize", fail)
    words = ["quantize", "tiny-pixart", "--recipe", "int8", "--out", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", ["dq", *words])
    with pytest.raises(RuntimeError, match="broken"):
        cli.main()
    assert list(tmp_path.iterdir()) == []


def process(*words, **env):
    """A fresh Python from the root of the repository."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)


def test_the_process_leaves_with_code_two_and_one_line_whatever_packages_print(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nprint('W0101 no kernels of ours', file=sys.stderr)\n")
    done = process("-m", "dq.cli", "inspect", "./nowhere", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 2 and done.stdout == "" and "W0101" in done.stderr
    assert "does not exist" in told_by("dq", done.stderr)


HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "torchao")
LIGHT = """
import json, sys
from dq import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["dq", *words]
    try:
        cli.main()
    except SystemExit as left:
        print("LEFT", json.dumps([words, left.code, [name for name in HEAVY if name in sys.modules]]), flush=True)
"""


def test_help_inspect_and_wrong_options_are_answered_without_torch(folder):
    given = ["tiny-pixart", "--out", "new", "--recipe"]
    expected = [
        ([], 2),
        (["--help"], 0),
        *([name, "--help"] for name in ("quantize", "plan", "inspect", "generate", "bench")),
    ]
    expected = [entry if isinstance(entry, tuple) else (entry, 0) for entry in expected]
    expected += [(["inspect", str(folder)], 0), (["inspect", str(folder / "transformer"), "--json"], 0)]
    expected += [
        (words, 2)
        for words in (
            ["frobnicate"],
            ["inspect"],
            ["inspect", "./nowhere"],
            ["quantize", "tiny-pixart", "--what"],
            ["quantize", "tiny-pixart", "--recipe", "int8"],
            ["quantize", *given, "int4"],
            ["quantize", *given, "svdqant-int4"],
            ["quantize", *given, "int8", "--dtype", "int"],
            ["quantize", *given, "int8", "--component", "vae"],
            ["quantize", *given, "int8", "--samples", "none"],
            ["quantize", *given, "int8", "--prompts", "p.txt"],
            ["quantize", *given, "int8", "--budget-bits", "0"],
            ["quantize", "./nowhere", "--out", "new", "--recipe", "svdquant-int4"],
            ["quantize", "tiny-pixart", "--out", str(folder), "--recipe", "svdquant-int4"],
            ["plan", "tiny-pixart", "--budget-bits", "5", "--metric", "taste"],
            ["plan", "tiny-pixart", "--steps", "4", "--samples", "2"],
            ["generate", "tiny-pixart", "--prompt", "x", "--out", "new.what"],
            ["generate", "./nowhere", "--prompt", "x", "--out", "new.png"],
            ["bench", "--dtype", "int"],
        )
    ]
    done = process("-c", f"HEAVY = {HEAVY}\n{LIGHT}", json.dumps([words for words, _ in expected]))
    found = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("LEFT ")]
    assert found == [[words, code, []] for words, code in expected], done.stderr


def test_importing_dq_imports_no_library_it_changes():
    done = process("-c", f"import sys, dq; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_help_stands_in_panels_and_names_every_choice(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    for command, panels in {
        "quantize": ("Model", "Calibration", "Budget", "Output"),
        "plan": ("Model", "Calibration", "Budget", "Output"),
        "bench": ("Model", "Peers", "Output"),
    }.items():
        assert run(monkeypatch, command, "--help") == 0
        shown = capsys.readouterr().out
        titles = [title for title in re.findall(r"^╭─ (\w+) ─", shown, re.MULTILINE) if title in panels]
        assert sorted(titles) == sorted(panels) and titles[0] == "Model"
        if command == "quantize":
            assert "Which of them: all, clustered, normal, stratified, uniform." in shown and "(stratified)" in shown


def test_dq_alone_shows_the_help_and_complains_of_nothing(monkeypatch, capsys):
    assert run(monkeypatch) == 2
    shown = capsys.readouterr()
    assert "Usage: dq" in shown.out and shown.err == ""


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("dq ins", "inspect"),
        ("dq quantize --bud", "--budget-gib --budget-bits --budget-ms"),
        ("dq quantize x --policy st", "stratified"),
        ("dq inspect --dtype", ""),
        ("dq generate x --device c", "cpu cuda"),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="the shell that is tried is bash")
def test_bash_completes_commands_options_and_choices_without_torch(typed, completed, tmp_path):
    program, watched = tmp_path / "dq", tmp_path / "loaded"
    code = f"import atexit, sys; atexit.register(lambda: open('{watched}', 'w').write(' '.join(sys.modules)))"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}; from dq.cli import main; main()" "$@"\n')
    program.chmod(0o755)
    script = f"""
    source <({program} --show-completion bash)
    COMP_WORDS=({typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    _dq_completion {program}; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == completed, done.stderr
    assert not set(HEAVY) & set(watched.read_text().split())
