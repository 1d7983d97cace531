"""Prompt files work as they are: PartiPrompts, COCO captions, MJHQ, plain lines, and the scene grammar."""

import json

import pytest

from dq.errors import DQError
from eval import prompts
from eval.suite import Suite
from pipelines import tiny

PARTI = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n"a sign that says ""Hi"""\tText\tBasic\tx\n'
COCO = {
    "images": [{"id": 7}, {"id": 9}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A bicycle. "},
        {"image_id": 7, "id": 2, "caption": "A room."},
        {"image_id": 9, "id": 3, "caption": "Another bicycle."},
    ],
}
MJHQ = {"a1": {"category": "animals", "prompt": "a fox"}, "b2": {"category": "food", "prompt": "a loaf"}}
FILES = [
    ("lines.txt", "a cat\r\n\n  a dog \n", ["a cat", "a dog"]),
    ("PartiPrompts.tsv", PARTI, ["bond", 'a sign that says "Hi"']),
    ("rows.csv", '\ufeffid,Caption\n1,"a cat, asleep"\n2,\n3,"two\nlines"\n', ["a cat, asleep", "two\nlines"]),
    ("rows.jsonl", '{"id": 1, "text": "a cat"}\n\n{"id": 2, "text": "a\u2028dog"}\n', ["a cat", "a\u2028dog"]),
    ("lines.jsonl", '"a cat"\n"a dog"\n', ["a cat", "a dog"]),
    ("captions_val2014.json", json.dumps(COCO), ["A bicycle.", "A room."]),
    ("meta_data.json", json.dumps(MJHQ), ["a fox", "a loaf"]),
    ("list.json", '["a cat", "a dog"]', ["a cat", "a dog"]),
]


def wrote(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(("name", "text", "expected"), FILES, ids=[row[0] for row in FILES])
def test_known_files_work_as_they_are(tmp_path, name, text, expected):
    assert prompts.read(wrote(tmp_path, name, text)) == expected


def test_a_column_and_a_limit_can_be_chosen(tmp_path):
    path = wrote(tmp_path, "PartiPrompts.tsv", PARTI)
    assert prompts.read(path, column="Category") == ["Abstract", "Text"]
    assert prompts.read(path, limit=1) == ["bond"]


WRONG = [
    ("a.yaml", "- a cat", {}, "unknown ending '.yaml'"),
    ("a.csv", "id,words\n1,a cat\n", {}, "no column prompt or caption or text: found id, words"),
    ("a.csv", "id,words\n1,a cat\n", {"column": "word"}, "no column 'word'.*Did you mean 'words'"),
    ("a.txt", "\n \n", {}, "holds no prompt"),
    ("a.txt", "a cat\n", {"column": "prompt"}, "has plain lines"),
    ("a.jsonl", '{"prompt": "a cat"}\n{"prompt": 3}\n', {}, "column 'prompt' holds 3"),
    ("a.jsonl", '{"prompt": "a cat"\n', {}, "is damaged"),
    ("a.json", "3", {}, "holds a JSON int"),
]


@pytest.mark.parametrize(("name", "text", "options", "message"), WRONG)
def test_a_wrong_file_is_one_line(tmp_path, name, text, options, message):
    with pytest.raises(DQError, match=message) as caught:
        prompts.read(wrote(tmp_path, name, text), **options)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_another_encoding_is_one_line(tmp_path):
    with pytest.raises(DQError, match="No such file"):
        prompts.read(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DQError, match="UTF-8"):
        prompts.read(tmp_path / "latin.txt")


def suite(**changes):
    given = {"pipelines": {"tiny-pixart": {}}, "recipes": ["int8"], "prompts": {"scenes": 4, "seed": 1}}
    return Suite.from_dict(given | changes)


def test_items_are_every_prompt_with_every_seed():
    found = prompts.items(suite(seeds=[0, 5]))
    texts = [caption for caption, _ in tiny.prompts(4, seed=1)]
    assert [(item.index, item.prompt, item.seed) for item in found] == [
        (2 * number + place, text, seed) for number, text in enumerate(texts) for place, seed in enumerate((0, 5))
    ]


def test_a_scene_comes_back_from_plain_values_as_it_was():
    found = prompts.items(suite())
    kept = json.loads(json.dumps([item.scene for item in found]))
    assert [prompts.scene(row) for row in kept] == [scene for _, scene in tiny.prompts(4, seed=1)]


def test_a_clip_comes_back_from_plain_values_with_its_motions_and_its_first_frame():
    found = prompts.items(suite(prompts={"clips": 4, "seed": 1}))
    kept = json.loads(json.dumps([item.scene for item in found]))
    labels = [clip for _, clip in tiny.motions(4, seed=1)]
    assert [prompts.clip(row) for row in kept] == labels
    assert [prompts.scene(row) for row in kept] == [clip.scene for clip in labels]
    assert not prompts.moves(prompts.items(suite())[0].scene)


@pytest.mark.parametrize("grammar", ["scenes", "clips"])
@pytest.mark.parametrize("seed", [1, prompts.OTHERS_SEED])
def test_no_prompt_of_the_suite_is_calibrated_with(seed, grammar):
    asked = suite(prompts={grammar: 300, "seed": seed})
    others = prompts.others(asked)
    assert len(set(others)) == prompts.OTHERS
    assert not set(others) & {item.prompt for item in prompts.items(asked)}
