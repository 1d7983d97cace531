"""Calibration with inputs of each run's own: pictures with instructions, from Python, a .jsonl and a folder."""

import json

import pytest
import torch
from PIL import Image

from dq.errors import DQError
from dq.trace import inputs
from dq.trace.calibration import Calibration
from dq.trace.capture import capture
from tests import zoo

COLOURS = ("red", "green", "blue")


class Edit:
    """A pipeline that draws from a picture and an instruction, and notes what it was called with."""

    def __init__(self):
        self.unet = zoo.build("UNet2DModel")
        self.components, self.called = {"unet": self.unet}, []

    def __call__(self, image, prompt="", mask_image=None, strength=1.0, num_inference_steps=2, generator=None):
        self.called.append((prompt, image.getpixel((0, 0)), mask_image and mask_image.mode, strength))
        for t in range(num_inference_steps):
            given = zoo.ENTRIES["UNet2DModel"].inputs(torch.Generator().manual_seed(t), torch.float32)
            self.unet(**given)


@pytest.fixture
def folder(tmp_path):
    """Three pictures of one colour each."""
    place = tmp_path / "pairs"
    place.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (4, 4), colour).save(place / f"{colour}.png")
    return place


def run(prompts, tmp_path, **call):
    pipe = Edit()
    given = Calibration(prompts, steps=2, samples=6, call_kwargs=call)
    capture(pipe, pipe.components, given, tmp_path / "work", progress=False)
    return pipe.called


def test_each_run_gets_its_own_picture_and_arguments(folder, tmp_path):
    pairs = [{"prompt": f"from {colour}", "image": folder / f"{colour}.png"} for colour in COLOURS]
    pairs[1] |= {"strength": 0.25, "mask_image": str(folder / "blue.png")}
    pairs[2] |= {"image": Image.new("RGB", (4, 4), "white")}
    assert run(pairs, tmp_path, strength=0.5) == [
        ("from red", (255, 0, 0), None, 0.5),
        ("from green", (0, 128, 0), "L", 0.25),
        ("from blue", (255, 255, 255), None, 0.5),
    ]


def test_pairs_come_from_a_jsonl_or_a_folder(folder, tmp_path):
    for colour in COLOURS:
        (folder / f"{colour}.txt").write_text(f" from {colour}\n")
    Image.new("L", (4, 4)).save(folder / "red.mask_image.png")
    expected = [("from blue", (0, 0, 255), None, 1.0), ("from green", (0, 128, 0), None, 1.0)]
    expected += [("from red", (255, 0, 0), "L", 1.0)]
    assert run(folder, tmp_path / "folder") == expected
    rows = [{"text": f"from {colour}", "file_name": f"{colour}.png"} for colour in ("blue", "green")]
    rows += [{"prompt": "from red", "image": "red.png", "mask_image": "red.mask_image.png"}]
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run(path, tmp_path / "file") == run(str(folder), tmp_path / "again") == expected


def test_other_pictures_of_the_same_names_are_another_calibration(folder, tmp_path):
    pairs = [{"prompt": "a", "image": folder / "red.png"}]
    run(pairs, tmp_path)
    Image.new("RGB", (4, 4), "black").save(folder / "red.png")
    with pytest.raises(DQError, match="prompts differs"):
        run(pairs, tmp_path)


def test_clips_become_frames(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in COLOURS]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    opened = inputs.arguments({"prompt": "p", "video": tmp_path / "clip.gif", "num_frames": 3})
    assert len(opened["video"]) == 3 and opened["num_frames"] == 3
    many = inputs.arguments({"image": [frames[0], frames[1]]})["image"]
    assert many[0] is frames[0]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"prompt": "a", "image": "nowhere.png"}], "image 'nowhere.png' is not there"),
        ([{"prompt": ["a", "b"]}], '"prompt" of a run is a list'),
        ([{}], "expected names and values"),
        ([3], "a prompt is 3"),
        ([" "], "a prompt is ' '"),
    ],
)
def test_wrong_entries_are_refused_at_the_door(prompts, message):
    with pytest.raises(DQError, match=message) as error:
        Calibration(prompts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red circle", "line 1 of .* is no JSON object"),
        ('{"image": "red.png"}\n[1]', "line 2 of .* is no JSON object"),
        ("[" * 100_000, "is no JSON object"),
        ('{"image": "../secret.png"}', "is not inside of the file's folder"),
        ('{"image": ["red.png", "/etc/hostname"]}', "is not inside of the file's folder"),
        ('{"image": "a\\u0000b"}', "is not inside of the file's folder"),
        ("", "is empty"),
    ],
)
def test_files_of_pairs_read_nothing_outside_of_their_folder(folder, text, message):
    (folder.parent / "secret.png").write_bytes(b"")
    path = folder / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(DQError, match=message) as error:
        Calibration(path)
    assert "\n" not in str(error.value)


def test_a_link_out_of_the_folder_is_not_followed(folder):
    (folder.parent / "secret.png").write_bytes(b"")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "pairs.jsonl").write_text('{"image": "link.png"}')
    with pytest.raises(DQError, match="is not inside"):
        Calibration(folder / "pairs.jsonl")


def test_a_damaged_picture_and_an_unknown_argument_are_named(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DQError, match=r"bad\.png' cannot be opened"):
        run([{"prompt": "a", "image": folder / "bad.png"}], tmp_path)
    with pytest.raises(DQError, match=r"prompts: Edit takes no 'imag'.*'image'"):
        run([{"prompt": "a", "imag": folder / "red.png"}], tmp_path)
