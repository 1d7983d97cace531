"""Clips in motion and the training of tiny-video: exact labels, words that are known, a start from tiny-pixart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention

from eval.metrics import motion_accuracy
from pipelines import tiny
from pipelines.tiny import folder, motion, scenes, train_video, training

CLIPS = [motion.sample(index) for index in range(300)]


def test_objects_do_what_the_caption_says_and_stay_in_the_picture():
    for clip, text in CLIPS:
        for item, moves in zip(clip.scene.items, clip.motions, strict=True):
            assert any(words in text for words in motion.WORDS[moves.kind]) and item.colour in text
            assert moves.kind != "turn" or item.shape in motion.TURNING
        for n in range(motion.FRAMES):
            for item in clip.frame(n).items:
                assert item.radius < min(item.x, item.y) and max(item.x, item.y) < scenes.SIDE - item.radius


def test_labels_are_those_of_the_pixels():
    """The centre of the pixels that a lone moving object changes from its background moves as its label says."""
    lone = [clip for clip, _ in CLIPS if len(clip.motions) == 1 and clip.motions[0].kind in motion.DIRECTIONS][:12]
    for clip, frames in zip(lone, motion.render(lone), strict=True):
        empty = scenes.render([replace(clip.scene, items=())])[0].astype(float)
        centres = []
        for frame in frames:
            rows, columns = np.nonzero(np.abs(frame - empty).sum(-1) > 60)
            centres.append((columns.mean(), rows.mean()))
        seen = np.array(centres[-1]) - np.array(centres[0])
        assert np.abs(seen - (motion.FRAMES - 1) * np.array(clip.motions[0].step)).max() < 0.7


def test_every_kind_is_drawn_and_held_out_clips_are_others():
    kinds = [moves.kind for clip, _ in CLIPS for moves in clip.motions]
    assert set(kinds) == set(motion.KINDS)
    assert motion.sample(5) == motion.sample(5)
    assert motion.sample(5)[0].scene != motion.sample(5, motion.HELD_OUT)[0].scene
    assert all(len(motion.sample(i, objects=2)[0].motions) == 2 for i in range(20))


def test_old_words_keep_their_places_and_no_caption_has_an_unknown_one():
    words, known = (
        train_video.tokenizer(),
        train_video.T5Tokenizer.from_pretrained(folder("tiny-pixart") / "tokenizer"),
    )
    assert all(words.get_vocab()[piece] == place for piece, place in known.get_vocab().items())
    for _, text in CLIPS:
        pieces = words.tokenize(text)
        assert words.unk_token not in pieces and len(pieces) <= len(text.replace(",", " ,").split()), text
    before = train_video.T5EncoderModel.from_pretrained(folder("tiny-pixart") / "text_encoder").shared.weight
    after = train_video.text_encoder(words).shared.weight
    assert torch.equal(after[: len(known)], before[: len(known)])


@torch.no_grad()
def test_without_temporal_blocks_the_start_is_tiny_pixart_frame_by_frame():
    model = train_video.latte().eval()
    base = PixArtTransformer2DModel.from_pretrained(folder("tiny-pixart") / "transformer", torch_dtype=torch.float32)
    x, states, t = torch.randn(2, 4, 8, 16, 16), torch.randn(2, 120, 128), torch.tensor([10, 900])
    y = model(x, t, encoder_hidden_states=states, enable_temporal_attentions=False, return_dict=False)[0]
    sizes = {"resolution": None, "aspect_ratio": None}
    for n in (0, 7):
        frame = base.eval()(x[:, :, n], states, t, sizes, return_dict=False)[0]
        torch.testing.assert_close(y[:, :4, n], frame, atol=1e-4, rtol=1e-4)
    assert not y[:, 4:].any(), "the half that the pipeline drops"


def test_training_goes_a_few_steps_stops_goes_on_and_writes_a_pipeline(tmp_path, monkeypatch):
    for module in (train_video, training):
        monkeypatch.setattr(module, "RUNS", tmp_path)
    monkeypatch.setattr(train_video, "BATCH", 2)
    train_video.train_text(0.02)
    train_video.train_video(0.02)
    first = torch.load(tmp_path / "video" / "last.pt", weights_only=True)["run"]["step"]
    assert first >= 1
    pipe = DiffusionPipeline.from_pretrained(train_video.train_video(0.06), torch_dtype=torch.float32)
    assert torch.load(tmp_path / "video" / "last.pt", weights_only=True)["run"]["step"] > first
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "video_length": 8, "mask_feature": False, "clean_caption": False}
    frames = pipe("a red star moving left", num_inference_steps=2, output_type="pt", **call).frames
    assert frames.shape[-4:] == (8, 3, 64, 64) and frames.isfinite().all()


def test_text_shared_by_frames_and_chosen_frames_give_what_the_model_itself_gives():
    torch.manual_seed(0)
    model = train_video.latte()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    clips, text, times = torch.randn(2, 4, 8, 16, 16), torch.randn(2, 120, 128), torch.tensor([3, 500])
    places, chosen = model.temp_pos_embed, torch.tensor([0, 3, 4, 7])
    with torch.no_grad():
        whole = model(clips, times, encoder_hidden_states=text).sample
        model.temp_pos_embed = places[:, chosen]
        few = model(clips[:, :, chosen], times, encoder_hidden_states=text).sample
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(train_video.SharedText(8))
        train_video.seeing(model, places, torch.arange(8))
        torch.testing.assert_close(model(clips, times, encoder_hidden_states=text).sample, whole, rtol=1e-4, atol=1e-4)
        train_video.seeing(model, places, chosen)
        shared = model(clips[:, :, chosen], times, encoder_hidden_states=text).sample
    torch.testing.assert_close(shared, few, rtol=1e-4, atol=1e-4)


def test_prompts_of_motion_are_repeatable_disjoint_and_counted():
    one = tiny.motions(20, objects=1)
    assert one == tiny.motions(20, objects=1) and all(len(clip.motions) == 1 for _, clip in one)
    assert not {text for text, _ in one} & {text for text, _ in tiny.motions(20, objects=1, seed=1)}
    assert {len(clip.motions) for _, clip in tiny.motions(40)} == {1, 2}


def test_a_model_that_is_not_shipped_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "folder", lambda name: tmp_path / name)
    assert tiny.shipped(tiny.VIDEOS) == []
    with pytest.raises(ValueError, match=r"^embedded pipeline 'tiny-video': its files are not in .*") as error:
        tiny.load("tiny-video")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_clips_show_what_their_captions_say():
    if not tiny.shipped(tiny.VIDEOS):
        pytest.skip("needs the weights of tiny-video")
    captions, labels = zip(*tiny.motions(12, objects=1, seed=3), strict=True)
    drawn = tiny.clips(tiny.load("tiny-video"), "tiny-video", list(captions), batch=12)
    mine = motion_accuracy.score(drawn, labels)
    others = motion_accuracy.score(drawn, labels[1:] + labels[:1])
    assert mine["objects_right"] >= 0.8 > 0.3 > others["objects_right"]


def test_a_clip_depends_on_its_seed_and_not_on_its_batch():
    if not tiny.shipped(tiny.VIDEOS):
        pytest.skip("needs the weights of tiny-video")
    pipe, captions = tiny.load("tiny-video"), [caption for caption, _ in tiny.motions(2)]
    call = {"num_inference_steps": 2}
    both = tiny.clips(pipe, "tiny-video", captions, seed=3, **call)
    assert both.shape == (2, 8, 3, 64, 64) and both.min() >= 0 and both.max() <= 1
    torch.testing.assert_close(tiny.clips(pipe, "tiny-video", captions, 3, batch=1, **call), both, atol=1e-3, rtol=0)
    other = tiny.clips(pipe, "tiny-video", captions, seed=4, **call)
    assert (other - both).abs().mean() > 0.01
