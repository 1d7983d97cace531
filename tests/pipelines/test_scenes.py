"""Scenes: the same for the same seed, labelled as drawn, with smooth edges and captions that name every object."""

import numpy as np
import pytest

from pipelines.tiny import scenes


@pytest.fixture(scope="module")
def drawn():
    return [scenes.sample(i, scenes.HELD_OUT) for i in range(3_000, 3_200)]


@pytest.fixture(scope="module")
def pictures(drawn):
    return scenes.render([scene for scene, _ in drawn])


def test_a_scene_depends_on_stream_and_index_alone(drawn, pictures):
    again = [scenes.sample(i, scenes.HELD_OUT) for i in (3_199, 3_000)]
    assert again == [drawn[199], drawn[0]]
    assert np.array_equal(scenes.render([scene for scene, _ in again]), pictures[[199, 0]])
    assert scenes.sample(3_000, scenes.TRAIN) != drawn[0]
    assert scenes.sample(3_001, scenes.HELD_OUT) != drawn[0]


def test_pictures_are_64_pixels_square(pictures):
    assert pictures.shape == (200, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert scenes.render([]).shape == (0, 64, 64, 3)


def _colour_at(picture, x, y):
    return picture[int(y), int(x)].astype(float) / 255


def test_labels_agree_with_pixels(drawn, pictures):
    for (scene, _), picture in zip(drawn, pictures, strict=True):
        for item in scene.items:
            x = item.x + (0.8 * item.radius if item.shape == "ring" else 0)  # a ring's centre shows the background
            nearest = min(
                scenes.COLOURS, key=lambda name: np.abs(scenes.COLOURS[name] - _colour_at(picture, x, item.y)).sum()
            )
            assert nearest == item.colour
            if item.shape == "ring":
                assert np.abs(_colour_at(picture, item.x, item.y) - item.fill).max() > 0.15


def test_shapes_have_different_outlines():
    grid = np.arange(-20, 20.0)
    masks = [scenes.distance(s, grid[None, :], grid[:, None], np.float32(14)) < 0 for s in scenes.SHAPES]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert (a ^ b).sum() > 0.15 * min(a.sum(), b.sum())


def test_distances_are_in_pixels():
    """Along an axis, away from corners, the distance grows by one per pixel."""
    x, zero = np.arange(16, 22.0), np.zeros(1)
    for shape in ("circle", "square", "ring", "cross"):
        assert np.allclose(np.diff(scenes.distance(shape, x, zero, np.float32(14))), 1, atol=1e-5), shape


def test_edges_are_anti_aliased():
    item = scenes.Item("circle", "white", "large", 31.3, 32.4, 14.0, (1.0, 1.0, 1.0))
    scene = scenes.Scene((item,), "dark", "graded", (1.0, 0.0), 0.0, 0.0)
    red = scenes.render([scene])[0, :, :, 0]
    between = (red > 60) & (red < 225)
    assert 40 < between.sum() < 200  # a rim about one pixel wide, 84 pixels long


def test_objects_stay_apart_and_inside(drawn):
    for scene, _ in drawn:
        assert len({(item.shape, item.colour) for item in scene.items}) == len(scene.items)
        for i, a in enumerate(scene.items):
            assert a.radius < a.x < 64 - a.radius and a.radius < a.y < 64 - a.radius
            for b in scene.items[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > 1.1 * (a.radius + b.radius)


def test_captions_name_every_object_and_vary(drawn):
    for scene, caption in drawn:
        for item in scene.items:
            assert any(f"{item.colour} {word}" in caption for word in scenes.WORDS[item.shape])
    rng = np.random.default_rng(0)
    assert len({scenes.caption(drawn[0][0], rng) for _ in range(50)}) > 10


def test_relations_hold(drawn):
    """'A left of B' is only said when A's centre is left of B's, and so on for the other three."""
    rng, said = np.random.default_rng(1), 0
    signs = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
    for scene, _ in drawn:
        if len(scene.items) < 2:
            continue
        a, b = scene.items[:2]
        words = scenes._relation(a, b, rng)
        for name, (sx, sy) in signs.items():
            if words in scenes.WORDS[name]:
                said += 1
                assert sx * (a.x - b.x) + sy * (a.y - b.y) > 8
    assert said > 40


def test_counts_follow_their_shares():
    counts = [len(scenes.sample(i)[0].items) for i in range(1000)]
    assert 0.38 < counts.count(1) / 1000 < 0.52
    assert 0.10 < counts.count(3) / 1000 < 0.20
    assert all(len(scenes.sample(i, objects=3)[0].items) == 3 for i in range(20))
