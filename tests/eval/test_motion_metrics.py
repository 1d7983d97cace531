"""Figures of motion: known answers on rendered clips that move, stand still, are shuffled or run at double speed."""

import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch

from eval import features, flow
from eval.features import RECOGNISER
from eval.metrics import (
    background_consistency,
    dynamic_degree,
    frechet_clip,
    motion_accuracy,
    motion_smoothness,
    subject_consistency,
    vbench,
    warp_error,
)
from pipelines.tiny import motion, scenes
from pipelines.tiny.recogniser import as_tensor

FRAMES, STEP = 8, 2
SHUFFLED = [3, 0, 6, 1, 7, 4, 2, 5]


def moving(step: float, item=None, brightness=(0.0,) * FRAMES, frames: int = FRAMES) -> torch.Tensor:
    """A render (T, 3, 64, 64) of one star that moves right by `step` pixels a frame, on a background that stands."""
    scene = scenes.sample(11, scenes.HELD_OUT, 1)[0]
    item = item or replace(scene.items[0], shape="star", size="small", radius=9.5, x=14.0, y=32.0)
    drawn = [replace(scene, items=(replace(item, x=item.x + step * n),)) for n in range(frames)]
    return as_tensor(scenes.render(drawn)) + torch.tensor(brightness)[:frames].reshape(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def clips():
    """normal, frozen, shuffled, and double speed over the same number of frames."""
    normal = moving(STEP)
    return normal, normal[:1].expand(FRAMES, -1, -1, -1), normal[SHUFFLED], moving(2 * STEP)


def test_flow_is_the_step_where_there_is_texture_and_nothing_on_the_background(clips):
    wide = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = flow.between(wide[..., 5:37, 5:37], wide[..., 2:34, 6:38])[..., 8:24, 8:24]  # 3 down, 1 left
    assert (found == torch.tensor([-1.0, 3.0]).reshape(1, 2, 1, 1)).all()
    half = flow.midway(wide[..., 4:36, 4:36], wide[..., 4:36, 0:32])[..., 8:24, 8:24]  # 4 to the right
    assert (half == torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1)).all()
    found = flow.between(clips[0][:-1], clips[0][1:])
    assert not found[..., :12, :].any() and not found[..., 54:, :].any()


def test_warping_by_the_flow_takes_the_motion_back():
    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 12, 12)
    assert torch.equal(flow.warped(image, steps), flow.shifted(image, 2, -1))
    assert torch.equal(flow.shifted(image, 2, -1)[..., 1:, :-2], image[..., :-1, 2:])


def test_dynamic_degree_is_the_step_and_doubles_with_the_speed(clips):
    normal, frozen, shuffled, double = dynamic_degree.per_item(clips)
    assert frozen == 0
    assert normal == pytest.approx(STEP, rel=0.15) and double == pytest.approx(2 * STEP, rel=0.15)
    assert shuffled > 1.5 * normal


def test_warp_error_is_nothing_for_whole_steps_and_grows_with_flicker(clips):
    normal, frozen, _, _ = warp_error.per_item(clips)
    blinking = moving(STEP, brightness=(0.0, 0.1) * (FRAMES // 2))
    assert frozen == 0 and normal < 1e-4
    # a step of 0.1 everywhere: no displacement can take it back on a flat background
    assert warp_error.per_item([blinking])[0] > 10 * normal and warp_error.per_item([blinking])[0] > 1e-3


def test_motion_smoothness_is_one_for_even_motion_and_falls_when_frames_are_shuffled(clips):
    normal, frozen, shuffled, double = motion_smoothness.per_item(clips)
    assert 1 == frozen > normal > double > shuffled
    assert 1 - shuffled > 2 * (1 - double)


def test_subject_consistency_falls_when_the_subject_becomes_another_one(clips):
    item = scenes.sample(12, scenes.HELD_OUT, 1)[0].items[0]
    item = replace(item, shape="ring", colour="cyan", fill=scenes.COLOURS["cyan"], radius=14.0, x=30.0, y=32.0)
    changed = torch.cat([clips[1][:4], moving(0, item)[:4]])
    normal, frozen, other = subject_consistency.per_item([clips[0], clips[1], changed], RECOGNISER)
    assert frozen == pytest.approx(1) and 1 > normal > other


def test_background_consistency_does_not_count_the_object_and_counts_the_rest(clips):
    normal, frozen, shuffled, double = background_consistency.per_item(clips)
    assert frozen == 1 and normal == shuffled == double == 1
    drifting = moving(STEP, brightness=[0.01 * n for n in range(FRAMES)])
    # mean over frames 2 to 8 of 0.01 n is 0.04
    assert background_consistency.per_item([drifting])[0] == pytest.approx(0.96, abs=1e-3)


def test_frechet_clip_distance_is_nothing_between_equal_sets_and_grows_when_motion_changes():
    net = features.network(RECOGNISER)
    rows = range(20, 32)
    items = [replace(scenes.sample(i, scenes.HELD_OUT, 1)[0].items[0], radius=9.5, x=14.0, y=32.0) for i in rows]
    normal = [moving(STEP, item) for item in items]
    sets = {"normal": normal, "frozen": [clip[:1].expand_as(clip) for clip in normal]}
    sets |= {"shuffled": [clip[SHUFFLED] for clip in normal], "double": [moving(2 * STEP, item) for item in items]}
    vectors = {k: torch.stack([frechet_clip.vector(net.features(c)) for c in clips]) for k, clips in sets.items()}
    found = {k: frechet_clip.score(v, vectors["normal"])["frechet_clip"] for k, v in vectors.items()}
    assert found["normal"] == pytest.approx(0, abs=1e-6)
    assert min(found[name] for name in ("frozen", "shuffled", "double")) > 0.01
    # equal covariances leave the distance of the means alone: 3^2 + 4^2
    away = torch.zeros(1, 4, dtype=torch.float64)
    away[0, :2] = torch.tensor([3.0, 4.0])
    drawn = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert frechet_clip.score(drawn + away, drawn)["frechet_clip"] == pytest.approx(25, rel=1e-4)


def test_motion_accuracy_falls_when_a_clip_freezes_is_shuffled_or_does_what_another_caption_says():
    labels = [clip for clip, _ in (motion.sample(i, motion.HELD_OUT, 1) for i in range(40))]
    labels = [clip for clip in labels if clip.motions[0].kind in motion.DIRECTIONS][:8]
    drawn = [as_tensor(frames) for frames in motion.render(labels)]
    normal = motion_accuracy.score(drawn, labels)
    assert normal == {"motion_accuracy": 1, "objects_right": 1, "both": 1}
    frozen = motion_accuracy.score([clip[:1].expand_as(clip) for clip in drawn], labels)
    assert frozen == {"motion_accuracy": 0, "objects_right": 1, "both": 0}
    assert motion_accuracy.score([clip[SHUFFLED] for clip in drawn], labels)["motion_accuracy"] <= 0.25
    backwards = motion_accuracy.score([clip.flip(0) for clip in drawn], labels)
    assert backwards["motion_accuracy"] == 0 and backwards["objects_right"] == 1
    # every other frame and then the last one: the same way at double speed
    fast = [clip[[0, 2, 4, 6, 7, 7, 7, 7]] for clip in drawn]
    assert motion_accuracy.score(fast, labels)["motion_accuracy"] == 1
    assert motion_accuracy.score(drawn, labels[1:] + labels[:1])["objects_right"] < 0.5
    with pytest.raises(ValueError, match=r"needs clips \(8, 3, 64, 64\), got \(4, 3, 64, 64\)"):
        motion_accuracy.per_item([drawn[0][:4]], labels[:1])


def test_vbench_is_asked_for_its_dimensions_of_the_files(monkeypatch, tmp_path):
    """A stand-in for the package, which cannot be installed beside today's torch: files go in, a file comes out."""
    seen = []

    class VBench:
        def __init__(self, device, info, place):
            self.place = place

        def evaluate(self, videos, name, dimension_list, mode):
            seen.append((len(list(Path(videos).iterdir())), mode))
            rows = {dimension: [0.5 + place, []] for place, dimension in enumerate(dimension_list)}
            (Path(self.place) / f"{name}_eval_results.json").write_text(json.dumps(rows))

    package, utils = ModuleType("vbench"), ModuleType("vbench.utils")
    package.VBench, package.__file__ = VBench, str(tmp_path / "__init__.py")
    package.__spec__, utils.CACHE_DIR = ModuleSpec("vbench", None), str(tmp_path / "weights")
    assert "needs vbench, not installed here" in vbench.why_not()
    monkeypatch.setitem(sys.modules, "vbench", package)
    monkeypatch.setitem(sys.modules, "vbench.utils", utils)
    assert "VBench's weights" in vbench.why_not()
    Path(utils.CACHE_DIR).mkdir()
    assert vbench.why_not() is None
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda frames, path, fps: Path(path).touch())
    found = vbench.score([torch.rand(8, 3, 16, 16)] * 3)
    assert seen == [(3, "custom_input")]
    assert list(found) == list(vbench.UNITS) and found["vbench_background_consistency"] == 1.5


@pytest.mark.parametrize(
    "module", [dynamic_degree, warp_error, motion_smoothness, background_consistency, subject_consistency]
)
def test_a_video_of_too_few_frames_is_refused(module):
    judge = [RECOGNISER] if hasattr(module, "JUDGES") else []
    with pytest.raises(ValueError, match="frames or more"):
        module.per_item([torch.rand(1, 3, 64, 64)], *judge)
