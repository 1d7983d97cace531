"""Headers of safetensors files: what safetensors itself reads, and one clear error for a file that is damaged."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dq.errors import DQError
from dq.host import header


@pytest.fixture
def path(tmp_path):
    """A file with tensors of several sizes, one of them empty."""
    place = tmp_path / "model.safetensors"
    tensors = {"b": torch.ones(2, 3), "a": torch.ones(5, dtype=torch.int8), "none": torch.ones(0, 4)}
    save_file(tensors | {"half": torch.ones(3, 1, dtype=torch.bfloat16)}, place, metadata={"made": "here"})
    return place


def test_it_says_what_safetensors_says(path):
    entries, metadata = header.read(path)
    with safe_open(path, "pt") as file:
        assert metadata == file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert entries == {name: (tuple(value.shape), value.nbytes) for name, value in tensors.items()}


def rewritten(change):
    """A damage: the header changed, its length put right."""

    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return damage


DAMAGES = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:60],
    "cut in a tensor": lambda content: content[:-1],
    "longer": lambda content: content + b"more",
    "no JSON": lambda content: content[:8] + b"#" + content[9:],
    "another kind of file": lambda content: b"PK\x03\x04" + b"\xff" * 100,
    "a list": rewritten(lambda found: [found]),
    "a gap": rewritten(lambda found: {name: row for name, row in found.items() if name != "b"}),
    "no place": rewritten(lambda found: found | {"c": {"dtype": "F32", "shape": [1]}}),
    "no shape": rewritten(lambda found: found | {"none": {"dtype": "F32", "data_offsets": [0, 0]}}),
    "no row": rewritten(lambda found: found | {"b": 3}),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_named(path, case):
    path.write_bytes(DAMAGES[case](path.read_bytes()))
    with pytest.raises(DQError, match=rf"weights file '{path}' is missing or damaged: .*; copy it again"):
        header.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DQError, match=r"nowhere\.safetensors' is missing or damaged"):
        header.read(tmp_path / "nowhere.safetensors")
