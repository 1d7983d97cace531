"""Saved models with any damage load as they were saved, or are refused in one line; nothing outside is touched."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dq
from dq.errors import DQError
from dq.host import files, header, saved
from tests import mutated
from tests.models import WEIGHTS, load

HOSTS_OWN = (OSError, ValueError)  # what diffusers itself says of its config or of a file it cannot open


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 48), nn.Linear(48, 64)])})


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A module of no library, saved by `dq.save`."""
    folder, model = tmp_path_factory.mktemp("bare") / "model", plain()
    dq.quantize(model, "int4-weight", progress=False)
    dq.save(model, folder)
    return folder


def copied(folder: str | Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder, place))


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", [files.PLAN_FILE, files.WEIGHTS_FILE])
def test_any_damage_to_a_bare_model_is_found_or_harmless(bare, tmp_path, name):
    folder = copied(bare, tmp_path / "inside" / "model")
    state, content = load_file(bare / files.WEIGHTS_FILE), (bare / name).read_bytes()
    for seed in range(150):
        (folder / name).write_bytes(mutated.bytes_of(content, seed))
        try:
            model = dq.load(folder, plain())
        except DQError as error:
            assert "\n" not in str(error), seed
        else:
            assert same(model, state), seed
        try:
            saved.report(folder)
        except DQError as error:
            assert "\n" not in str(error), seed
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize("seed", range(2))
def test_any_plan_in_a_bare_model_loads_as_saved_or_is_refused(bare, tmp_path, seed):
    folder, good = copied(bare, tmp_path / "model"), json.loads((bare / files.PLAN_FILE).read_text())
    for data in mutated.values(good, 150, seed):
        (folder / files.PLAN_FILE).write_text(json.dumps(data))
        model = plain()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            dq.load(folder, model)
        except DQError as error:
            assert "\n" not in str(error) and same(model, before)
        else:
            model["blocks"][0](torch.ones(1, 64))


@pytest.mark.parametrize("seed", range(2))
def test_any_quantization_config_loads_as_saved_or_is_refused(quantized, tmp_path, seed):
    folder, good = copied(quantized, tmp_path / "model"), json.loads(Path(quantized, "config.json").read_text())
    for data in mutated.values(good["quantization_config"], 60, seed):
        (folder / "config.json").write_text(json.dumps(good | {"quantization_config": data}))
        try:
            load(folder)
        except DQError as error:
            assert "\n" not in str(error)
        except HOSTS_OWN as error:  # no dq checkpoint any more
            assert data.get("quant_method") != "dq", error
        for checked in (True, False):
            try:
                saved.plans(folder, checked)
            except DQError as error:
                assert "\n" not in str(error)


def test_any_header_is_read_or_refused(bare, tmp_path):
    content = (bare / files.WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    good, path = json.loads(content[8 : 8 + length]), tmp_path / "model.safetensors"
    for seed in range(2):
        for data in mutated.values(good, 200, seed):
            text = json.dumps(data).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
            try:
                entries, metadata = header.read(path)
            except DQError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert all(isinstance(text, str) for text in metadata.values()) and entries
    with pytest.raises(DQError, match="its header would take"):
        path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
        header.read(path)
    with pytest.raises(DQError, match="is missing or damaged"):
        path.write_bytes(len(mutated.DEEP).to_bytes(8, "little") + mutated.DEEP.encode())
        header.read(path)


@pytest.mark.parametrize("table", ["[]", "5", "{", '{"a": 5}', '{"blocks.0.weight": "../x"}', '"x"', mutated.DEEP])
def test_any_table_of_checksums_is_read_or_refused(bare, tmp_path, table):
    folder = copied(bare, tmp_path / "model")
    with safe_open(folder / files.WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata() | {files.CHECKSUMS: table}
    save_file(load_file(folder / files.WEIGHTS_FILE), folder / files.WEIGHTS_FILE, metadata=metadata)
    with pytest.raises(DQError, match=files.CHECKSUMS) as error:
        dq.load(folder, plain())
    assert "\n" not in str(error.value)


def test_an_index_that_leads_out_of_the_folder_is_refused(quantized, base, tmp_path):
    model = load(quantized)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    shards[0].rename(tmp_path / shards[0].name)
    place = next((tmp_path / "model").glob("*.index.json"))
    for leading in (f"../{shards[0].name}", str(tmp_path / shards[0].name)):
        text = place.read_text()
        place.write_text(text.replace(f'"{shards[0].name}"', json.dumps(leading)))
        with pytest.raises(ValueError, match=r"folder|path separator"):
            load(tmp_path / "model")
        place.write_text(text)


def test_a_pickle_beside_a_plan_is_not_loaded(quantized, tmp_path):
    folder = copied(quantized, tmp_path / "model")
    torch.save(load_file(folder / WEIGHTS), folder / WEIGHTS.replace(".safetensors", ".bin"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(DQError, match="is no safetensors file"):
        load(folder, use_safetensors=False)


def test_a_config_without_a_plan_reads_no_other_file(quantized, tmp_path):
    folder, data = copied(quantized, tmp_path / "model"), json.loads(Path(quantized, "config.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(data["quantization_config"]["plan"]))
    data["quantization_config"] |= {"plan": None, "recipe": str(tmp_path / "plan.json")}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(DQError, match="quantization_config has no plan, and recipe"):
        load(folder)


def test_names_of_components_are_no_paths(bare, tmp_path):
    (tmp_path / "pipe").mkdir()
    copied(bare, tmp_path / "outside")
    names = {"../outside": ["diffusers", "X"], str(tmp_path / "outside"): ["diffusers", "X"], "..": [1, 2]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(names))
    assert saved.plans(tmp_path / "pipe") == {}


def test_a_whole_file_says_nothing(bare):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dq.load(bare, plain())


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_any_damage_to_a_diffusers_model_is_found_or_harmless(quantized, tmp_path, name):
    """By the way that the command line and the demo load."""
    folder, state = copied(quantized, tmp_path / "inside" / "model"), load(quantized).state_dict()
    content = (folder / name).read_bytes()
    for seed in range(60):
        (folder / name).write_bytes(mutated.bytes_of(content, seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = saved.load(str(folder))
            except DQError as error:
                assert "\n" not in str(error), seed
            else:
                assert same(model, state), seed
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize("seed", range(2))
def test_any_config_of_a_diffusers_model_loads_or_is_refused(quantized, tmp_path, seed):
    folder, good = copied(quantized, tmp_path / "model"), json.loads(Path(quantized, "config.json").read_text())
    own = {key: value for key, value in good.items() if key != "quantization_config"}
    for data in mutated.values(own, 40, seed):
        (folder / "config.json").write_text(json.dumps({"quantization_config": good["quantization_config"]} | data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                saved.load(str(folder))
            except DQError as error:
                assert "\n" not in str(error)
