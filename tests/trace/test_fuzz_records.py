"""Folders of records written by somebody else: read or refused in one line; no code of theirs runs."""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from typing import ClassVar, NamedTuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import safe_open
from safetensors.torch import save_file

from dq.disk import write_json
from dq.errors import DQError
from dq.trace import capture, classes
from dq.trace.records import META, TREE, Store
from dq.trace.units import Hollow
from tests import mutated


class Pair(NamedTuple):
    left: torch.Tensor
    right: int


@dataclasses.dataclass
class Derived:
    """Its constructor tells that it ran."""

    a: int
    b: int = dataclasses.field(init=False)
    ran: ClassVar[list] = []

    def __post_init__(self):
        self.ran.append(self.a)
        self.b = 2 * self.a


def stated(store, key, head):
    """Write an entry whose head is `head`, with a right checksum."""
    entry = store.folder / f"{key}.entry"
    entry.mkdir(exist_ok=True)
    text = json.dumps(head)
    save_file({"0": torch.zeros(4)}, entry / TREE, metadata={META: f"{zlib.crc32(text.encode()):08x}{text}"})


def head(tree, **row):
    row = {"dtype": "float32", "shape": [4], "crc32": f"{zlib.crc32(bytes(16)):08x}", "cpu": True, "file": None} | row
    return {"tree": json.dumps(tree), "tensors": [row]}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "payload.py").write_text(
        "open('RAN', 'w')\nfrom typing import NamedTuple\nclass X(NamedTuple): a: int\n"
    )
    return Store(tmp_path / "seen")


@pytest.mark.parametrize(
    "tree",
    [
        ["object", ["payload:X", [1]]],
        ["object", ["seen.payload:X", [1]]],
        ["object", ["os:system", ["touch RAN"]]],
        ["object", ["subprocess:Popen", [["touch", "RAN"]]]],
        ["mapping", ["collections:defaultdict", ["dict", []]]],
        ["object", ["dq.plan:Plan", [{}]]],
        ["object", ["dq.trace.records:Store", ["elsewhere"]]],
        ["object", ["torch:nn.Linear", [1, 1]]],
        ["dtype", "load"],
        ["dtype", "__builtins__"],
        ["device", "nowhere"],
        ["object", [5, [1]]],
        ["object", ["hollow", [1]]],
        ["tensor", 7],
        ["tensor", "0"],
        ["Size", ["a"]],
        ["list"],
        ["what", [1]],
        ["dict", [[[1], 2]]],
        ["dict", 3],
        [],
    ],
    ids=str,
)
def test_a_structure_that_names_what_is_not_on_the_list_is_refused(store, tmp_path, tree):
    stated(store, "k", head(tree))
    with pytest.raises(DQError, match=r"k\.entry|is not here") as error:
        store.read("k")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "RAN").exists() and "payload" not in sys.modules and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "row",
    [
        {"file": "../../outside.safetensors"},
        {"file": "/etc/passwd"},
        {"file": "tree.safetensors"},
        {"dtype": "load"},
        {"dtype": "../x"},
        {"shape": [-1]},
        {"shape": [10**30]},
        {"shape": "4"},
        {"shape": [5]},
        {"crc32": 5},
        {"cpu": "yes"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_tensor_that_is_stated_wrongly_is_refused(store, tmp_path, row):
    save_file({"0": torch.zeros(4)}, tmp_path / "outside.safetensors")
    stated(store, "k", head(["tensor", 0], **row))
    with pytest.raises(DQError, match=r"k\.entry"):
        store.read("k")


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_deep_structures_are_refused_whatever_the_limit_of_the_interpreter(store, limit):
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)  # torch.compile raises it for the whole process
    try:
        _refuse_deep_structures(store)
    finally:
        sys.setrecursionlimit(before)


def _refuse_deep_structures(store):
    stated(store, "k", head(1) | {"tree": mutated.DEEP})
    with pytest.raises(DQError, match=r"k\.entry"):
        store.read("k")
    stated(store, "k", head(1) | {"tree": '["list",[' * 900 + "1" + "]]" * 900})
    with pytest.raises(DQError, match=r"k\.entry"):
        store.read("k")
    deep = []
    for _ in range(150):
        deep = [deep]
    with pytest.raises(DQError, match="more than 200 objects and arrays inside each other"):
        store.write("deep", deep)
    store.write("less", [[[[1, "[" * 900]]]])
    assert store.read("less") == [[[[1, "[" * 900]]]]


def test_classes_are_made_without_their_code(store):
    store.write("k", {"pair": Pair(torch.ones(3), 4), "derived": Derived(3)})
    assert Derived.ran == [3]
    back = store.read("k")
    assert Derived.ran == [3] and back["derived"] == Derived(3) and back["derived"].b == 6
    assert isinstance(back["pair"], Pair) and back["pair"].right == 4


def test_a_value_with_more_than_its_fields_is_refused(store):
    value = Derived(3)
    value.more = 1
    with pytest.raises(DQError, match="cannot store a Derived"):
        store.write("k", value)


def test_outputs_of_the_hosts_stay_whole(store):
    store.write("k", Transformer2DModelOutput(sample=torch.ones(2)))
    back = store.read("k")
    assert back["sample"].eq(1).all() and back.sample is back[0]


def test_the_list_of_classes_is_closed():
    assert classes.find("hollow") is Hollow and classes.find("dq.trace.units:Hollow") is None
    assert classes.find("xml.dom.minidom:Node") is None or "xml.dom.minidom" in sys.modules
    assert classes.find("torch:nn.Linear.__init__") is None


@pytest.mark.parametrize("share", [True, False])
def test_any_damage_to_an_entry_is_found_or_harmless(store, share):
    tree = {"x": torch.arange(1200.0), "pair": Pair(torch.ones(3), 1), "n": [1, (2, None)]}
    store.write("k", tree, share)
    for path in sorted((store.folder / "k.entry").iterdir()):
        content = path.read_bytes()
        for seed in range(60):
            path.unlink()
            path.write_bytes(mutated.bytes_of(content, seed))
            try:
                back = store.read("k")
            except DQError as error:
                assert "k.entry" in str(error) and "\n" not in str(error)
            else:
                assert torch.equal(back["x"], tree["x"]) and back["n"] == tree["n"]
        path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_any_head_is_read_or_refused(store, seed):
    good = {"info": {"run": 1, "step": 2, "timestep": 3.5, "branches": [0]}, "args": (torch.zeros(4),), "kwargs": {}}
    store.write("k", good)
    text = _head(store)
    tree = json.loads(text["tree"])
    assert store.read("k", kind="call")["info"] == good["info"]
    for data in mutated.values({"tree": tree, "tensors": text["tensors"]}, 200, seed):
        stated(store, "k", data | {"tree": json.dumps(data.get("tree"))})
        try:
            back = store.read("k", kind="call")
        except DQError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(back["args"], tuple) and isinstance(back["info"], dict)


def _head(store):
    with safe_open(store.folder / "k.entry" / TREE, "pt") as file:
        return json.loads(file.metadata()[META][8:])


@pytest.mark.parametrize("seed", range(2))
def test_notes_of_a_calibration_are_read_or_refused(tmp_path, seed):
    identity = {"models": {"": "X 00000000"}, "seed": 0, "target": "X"}
    write_json(tmp_path / "calibration.json", identity)
    capture.claim_folder(tmp_path, identity)
    content = (tmp_path / "calibration.json").read_bytes()
    for number in range(100):
        (tmp_path / "calibration.json").write_bytes(mutated.bytes_of(content, 100 * seed + number))
        try:
            capture.claim_folder(tmp_path, identity)
        except DQError as error:
            assert "\n" not in str(error)


def test_counts_of_a_run_are_read_or_refused(tmp_path):
    session = capture._Session.__new__(capture._Session)
    session.folder, session.stores = tmp_path, {"unet": Store(tmp_path / "unet")}
    path = tmp_path / "runs" / "00000.json"
    write_json(path, {"unet": 0})
    assert session.finished("00000", "00000-")
    for value in ("x", None, -1, 1.5, [0]):
        write_json(path, {"unet": value})
        with pytest.raises(DQError, match=r"00000\.json.*unet is .*, expected"):
            session.finished("00000", "00000-")
