"""Trees on disk: all comes back bit for bit, shared tensors cost once, and no half-written entry is ever read."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import time
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dq import DQError
from dq.trace import classes, records
from dq.trace.observe import Sums
from dq.trace.records import Store
from dq.trace.seen import Needs
from dq.trace.units import Hollow, Laid

DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)


class Pair(NamedTuple):
    left: torch.Tensor
    right: int


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def used(store):
    """Bytes of all files of a store, each file once whatever the number of its names."""
    files = {path.stat().st_ino: path.stat().st_size for path in store.folder.rglob("*") if path.is_file()}
    return sum(files.values())


def values(dtype, n=24):
    """`n` items of random bytes as a dtype; None for one this torch cannot make."""
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.bool:
        return torch.randint(0, 2, (n,), generator=generator).bool()
    raw = torch.randint(0, 256, (n * 16,), dtype=torch.uint8, generator=generator)
    try:
        return torch.empty(0).to(dtype) if n == 0 else raw.view(dtype)[:n]
    except (RuntimeError, TypeError):
        return None


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)


def same(a, b):
    """Equal in type, structure and to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@pytest.mark.parametrize("share", [True, False])
def test_every_leaf_and_container_comes_back(store, share):
    tree = {
        "plain": [None, True, 3, -0.5, float("inf"), float("nan"), 2**70, "tést", ""],
        "types": (torch.float8_e4m3fn, torch.device("cuda:1"), torch.Size([2, 3])),
        "nested": {"empty": {}, "none": (), "list": [[], ({"a": (1,)},)], 7: "int key"},
        "named": Pair(torch.arange(3), 4),
        "output": Transformer2DModelOutput(sample=torch.randn(2, 3000)),
        "kept order": OrderedDict(z=1, a=torch.ones(1)),
    }
    store.write("a/b", tree, share)
    back = store.read("a/b")
    assert same(tree, back)
    assert torch.equal(back["output"].sample, tree["output"].sample) and back["named"].right == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 24, 5000])
def test_every_dtype_comes_back(store, dtype, n):
    value = values(dtype, n)
    if value is None:
        pytest.skip("torch makes no such tensor")
    store.write("x", value)
    assert same(store.read("x"), value)


@pytest.mark.parametrize("share", [True, False])
def test_any_layout_in_memory_comes_back_by_value(store, share):
    base = torch.randn(40, 60)
    tree = [
        base.t(),
        base[::2, 3:],
        torch.randn(1, 60).expand(5000, 60),
        torch.tensor(4.0),
        torch.empty(0, 7),
        base[5],
        base[5],
        base,
        torch.randn(3000, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex128).imag,
        torch.nn.Parameter(torch.ones(2)),
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    ]
    store.write("x", tree, share)
    back = store.read("x")
    assert all(
        torch.equal(a, b) and b.is_contiguous() and not b.requires_grad for a, b in zip(tree, back, strict=True)
    )


def test_one_object_twice_comes_back_as_one_object_and_equal_ones_stay_apart(store):
    x, y = torch.zeros(2000), torch.zeros(2000)
    store.write("x", {"a": (x, y), "b": [x]})
    back = store.read("x")
    assert back["a"][0] is back["b"][0] and back["a"][0] is not back["a"][1]
    back["a"][0].add_(1)
    assert back["a"][1].eq(0).all() and store.read("x")["a"][0].eq(0).all()  # neither its twin nor the file


def test_a_tensor_that_many_entries_share_costs_its_bytes_once(store):
    text = torch.randn(100_000)
    for i in range(20):
        store.write(f"calls/{i:05d}", {"text": text.clone(), "own": torch.full((4,), i)})
    assert used(store) < 1.1 * text.nbytes
    assert all(same(store.read(f"calls/{i:05d}")["text"], text) for i in range(20))
    store.write("alone", text, share=False)
    assert used(store) > 2 * text.nbytes


def test_equal_bytes_of_another_dtype_or_shape_are_shared_and_told_apart(store):
    x = torch.randn(2000)
    store.write("x", [x, x.view(torch.int32), x.reshape(40, 50)])
    assert same(store.read("x"), [x, x.view(torch.int32), x.reshape(40, 50)])
    assert used(store) < 1.2 * x.nbytes


def test_dropping_frees_what_nobody_else_refers_to(store):
    empty, text = used(store), torch.randn(100_000)
    store.write("a", [text, torch.randn(100_000)])
    store.write("b", [text])
    store.drop("a")
    assert not store.has("a") and same(store.read("b")[0], text)
    store.write("c", [text])
    assert text.nbytes <= used(store) < 1.1 * text.nbytes
    store.drop("c")
    store.drop("b")
    store.drop("b")
    assert used(store) == empty and store.keys() == []


def test_a_new_value_replaces_the_old_one(store):
    store.write("a", [torch.zeros(10_000)])
    store.write("a", [torch.ones(2000)])
    assert store.read("a")[0].eq(1).all() and used(store) < 20_000


def test_keys_are_sorted_and_begin_with_the_prefix(store):
    for key in ("full/10/1", "full/1/2", "full/1/1", "hat/1", "a"):
        store.write(key, 0)
    assert store.keys() == ["a", "full/1/1", "full/1/2", "full/10/1", "hat/1"]
    assert store.keys("full/1/") == ["full/1/1", "full/1/2"] and store.keys("full/1") == store.keys("full/")
    assert store.keys("no/such") == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "../a", "a/../b", "a//b", ".lock", "a b", "ä"])
def test_a_key_that_could_leave_the_folder_is_refused(store, key):
    with pytest.raises(DQError, match="expected parts of letters"):
        store.write(key, 1)


def test_what_cannot_come_back_is_refused_with_its_place(store):
    class Local(NamedTuple):
        x: int

    wrong = {"object": object(), "local": Local(1), "set": {1}, "sparse": torch.eye(3).to_sparse()}
    wrong |= {"meta": torch.empty(2, device="meta"), "key": {(1, 2): 3}, "function": len, "default": defaultdict(list)}
    for name, value in wrong.items():
        with pytest.raises(DQError, match=rf"x\.0\.{name}") as error:
            store.write("x", [{name: value}])
        assert "\n" not in str(error.value)
    assert store.keys() == []


def test_classes_of_dq_stand_in_files_by_kind_so_that_their_modules_may_move(store):
    assert classes.KINDS == {"hollow": Hollow, "laid": Laid, "sums": Sums}
    tree = {"shape": Hollow((2, 3), torch.float16, "cpu"), "turned": Laid.of(torch.ones(3, 2).t())}
    store.write("x", {**tree, "sums": Sums("layer", gram=torch.eye(2), rows=4)})
    assert b"dq." not in (store.folder / "x.entry" / records.TREE).read_bytes()
    back = store.read("x")
    assert type(back["turned"]) is Laid and same(dict(tree), {name: back[name] for name in tree})
    assert back["sums"].source == "layer" and back["sums"].rows == 4 and same(back["sums"].gram, torch.eye(2))


def test_a_class_of_dq_without_a_kind_is_refused(store):
    with pytest.raises(DQError, match=r"x: cannot store a Needs"):
        store.write("x", Needs())


def test_a_folder_of_another_format_is_refused_in_one_line(store):
    store.write("x", torch.arange(3))
    (store.folder / f".format-{records.VERSION}").rename(store.folder / f".format-{records.VERSION - 1}")
    before = sorted(store.folder.rglob("*"))
    with pytest.raises(
        DQError, match=r"store' holds records in the format of another version.*delete the folder"
    ) as e:
        Store(store.folder)
    assert "\n" not in str(e.value) and sorted(store.folder.rglob("*")) == before


def test_a_missing_entry_is_named(store):
    with pytest.raises(DQError, match=r"calls/00003\.entry.*missing"):
        store.read("calls/00003")


@pytest.mark.parametrize("share", [True, False])
def test_any_truncation_and_any_changed_byte_is_found(store, share):
    tree = {"x": torch.arange(1200.0), "note": "words", "n": 12}
    store.write("x", tree, share)
    path = max((store.folder / "x.entry").iterdir(), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    for length in (0, 7, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DQError, match=r"x\.entry"):
            store.read("x")
    header = int.from_bytes(whole[:8], "little") + 8
    for place in [*range(8, header, 5), header, header + 1001, len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert same(store.read("x"), tree), f"byte {place}"  # padding, and names that JSON does not need
        except DQError as error:
            assert "x.entry" in str(error)


def test_a_full_disk_is_one_line_and_leaves_nothing(store, monkeypatch):
    store.write("old", torch.ones(5000))
    before = sorted(path.relative_to(store.folder) for path in store.folder.rglob("*"))

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for share in (True, False):
        monkeypatch.setattr(records, "save_file", full)
        with pytest.raises(DQError, match=r"No space left.*free space") as error:
            store.write("new", torch.zeros(5000), share)
        assert "\n" not in str(error.value)
    monkeypatch.undo()
    real, count = records.save_file, itertools.count()
    monkeypatch.setattr(records, "save_file", lambda *a, **k: (full if next(count) else real)(*a, **k))
    with pytest.raises(DQError, match="No space left"):  # the tree fits, the shared tensor does not
        store.write("old", torch.zeros(5000))
    assert before == sorted(path.relative_to(store.folder) for path in store.folder.rglob("*"))
    assert store.read("old").eq(1).all()


def test_files_depend_on_the_content_only(tmp_path):
    tree = {"a": torch.arange(5000), "b": [torch.ones(3), "x"], "c": torch.zeros(3, dtype=torch.bool)}
    contents = []
    for name in ("one", "two"):
        store = Store(tmp_path / name)
        store.write("k", tree)
        contents.append({p.relative_to(store.folder): p.read_bytes() for p in store.folder.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]


def test_links_refused_by_the_file_system_cost_space_only(store, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    tree = [torch.randn(5000)]
    store.write("a", tree)
    store.write("b", tree)
    assert same(store.read("a"), tree)
    store.drop("a")
    assert same(store.read("b"), tree)


def test_leftovers_are_removed_on_opening_but_not_while_another_has_the_store_open(store):
    store.write("a", torch.ones(5000))
    half = store.folder / ".partial" / "half"
    half.mkdir()
    (half / "tree.safetensors").write_bytes(b"half")
    (store.folder / ".shared" / "orphan").write_bytes(b"whole but nobody's")
    Store(store.folder)
    assert half.exists()
    folder = store.folder
    store._lock.close()
    again = Store(folder)
    assert not half.exists() and not (folder / ".shared" / "orphan").exists()
    assert again.keys() == ["a"] and again.read("a").eq(1).all()


def work(folder, name, count):
    store, common = Store(folder), torch.arange(200_000.0)
    for i in range(count):
        store.write(f"{name}/{i % 7}", {"common": common, "own": torch.full((20_000,), float(i)), "i": i})
        if i % 3 == 0:
            store.drop(f"{name}/{(i + 4) % 7}")


def start(*args):
    """Run `work` in a process of its own; a fork, because importing takes seconds."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def check(store):
    common = torch.arange(200_000.0)
    for key in store.keys():
        tree = store.read(key)
        assert torch.equal(tree["common"], common) and tree["own"].eq(tree["i"]).all()


@pytest.mark.parametrize("seconds", [0.05, 0.11, 0.23])
def test_kill_9_at_any_moment_leaves_whole_entries_and_no_waste(tmp_path, seconds):
    process = start(tmp_path, "a", 1_000_000)
    time.sleep(seconds)
    process.kill()
    process.join()
    store = Store(tmp_path)
    check(store)
    kept = {path.name for path in tmp_path.rglob("*.entry/*")}
    assert {path.name for path in (tmp_path / ".shared").iterdir()} <= kept
    assert not list((tmp_path / ".partial").iterdir())


def test_two_processes_write_and_drop_in_one_store(tmp_path):
    processes = [start(tmp_path, name, 200) for name in ("a", "b")]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    store = Store(tmp_path)
    assert store.keys("a/") and store.keys("b/")
    check(store)
    for key in store.keys():
        store.drop(key)
    assert not list((tmp_path / ".shared").iterdir())
