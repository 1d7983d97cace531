"""The judge of motion reads rendered clips, whose labels are exact, and sees when a clip is not what was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipelines import tiny
from pipelines.tiny import motion
from pipelines.tiny.motion_judge import judge


@pytest.fixture(scope="module")
def recogniser():
    return tiny.load_recogniser()


@pytest.fixture(scope="module")
def clips():
    found = [motion.sample(index, motion.HELD_OUT)[0] for index in range(120)]
    return found, torch.from_numpy(motion.render(found)).permute(0, 1, 4, 2, 3).float() / 255


def share(said):
    return sum(said) / len(said)


def test_rendered_clips_are_read_as_they_are_labelled(clips, recogniser):
    said = [
        (verdict, m.kind)
        for c, f in zip(*clips, strict=True)
        for verdict, m in zip(judge(f, c, recogniser), c.motions, strict=True)
    ]
    assert share([right for (right, _), _ in said]) > 0.99
    assert share([seen == kind for (_, seen), kind in said]) > 0.95


def test_frozen_clips_stand_still_and_clips_backwards_do_the_opposite(clips, recogniser):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}
    frozen, backwards = [], []
    for clip, frames in zip(*clips, strict=True):
        still = judge(frames[:1].expand_as(frames), clip, recogniser)
        frozen += [seen == "still" for _, seen in still]
        for (_, seen), moves in zip(judge(frames.flip(0), clip, recogniser), clip.motions, strict=True):
            if moves.kind in opposite:
                backwards.append(seen == opposite[moves.kind])
    assert share(frozen) > 0.99 and share(backwards) > 0.9


def test_another_colour_is_not_the_object_and_empty_frames_have_none(clips, recogniser):
    clip = next(clip for clip in clips[0] if len(clip.motions) == 1 and clip.motions[0].kind == "left")
    item = clip.scene.items[0]
    other = replace(
        clip, scene=replace(clip.scene, items=(replace(item, colour="red" if item.colour != "red" else "blue"),))
    )
    frames = torch.from_numpy(motion.render([clip])[0]).permute(0, 3, 1, 2).float() / 255
    assert judge(frames, clip, recogniser) == [(True, "left")]
    assert judge(frames, other, recogniser) == [(False, "")]
    assert judge(torch.full_like(frames, 0.4), clip, recogniser) == [(False, "")]
