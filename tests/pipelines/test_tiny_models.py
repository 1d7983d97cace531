"""The shipped models: they load with plain diffusers and transformers, are small, and do what their captions say."""

import diffusers
import pytest
import torch
from PIL import Image

from eval.metrics import caption_accuracy
from pipelines import tiny
from pipelines.tiny import scenes
from pipelines.tiny.recogniser import Recogniser, as_tensor, is_right, loss, targets

CLASSES = {"tiny-pixart": "PixArtSigmaPipeline", "tiny-sd": "StableDiffusionPipeline"}


@pytest.fixture(scope="module")
def held_out():
    drawn = [scenes.sample(i, scenes.HELD_OUT)[0] for i in range(7_000, 7_500)]
    return drawn, as_tensor(scenes.render(drawn))


@pytest.fixture(scope="module", params=tiny.NAMES)
def pipeline(request):
    pipe = getattr(diffusers, CLASSES[request.param]).from_pretrained(tiny.folder(request.param))
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


def test_recogniser_is_right_on_held_out_renders(held_out):
    drawn, images = held_out
    found = tiny.load_recogniser().find(images)
    assert sum(map(is_right, found, drawn)) / len(drawn) >= 0.98


def test_recogniser_knows_the_place_and_size(held_out):
    drawn, images = held_out
    for scene, found in zip(drawn[:50], tiny.load_recogniser().find(images[:50]), strict=True):
        by_name = {(f.colour, f.shape): f for f in found}
        for item in scene.items:
            seen = by_name[item.colour, item.shape]
            assert abs(seen.x - item.x) < 3 and abs(seen.y - item.y) < 3
            assert seen.size == item.size


def test_features_are_one_vector_per_picture_and_tell_pictures_apart(held_out):
    features = tiny.load_recogniser().features(held_out[1][:8])
    assert features.shape[0] == 8 and features.ndim == 2
    assert torch.pdist(features).min() > 0.1


def test_recogniser_round_trip_and_loss(tmp_path, held_out):
    net = Recogniser(width=8, feature_dim=16)
    net.save_pretrained(tmp_path)
    again, images = Recogniser.from_pretrained(tmp_path), held_out[1][:2]
    assert torch.equal(again(images), net(images))
    wanted = targets(held_out[0][:2])
    assert loss(tiny.load_recogniser()(images), wanted) < 0.5 * loss(net(images), wanted)


def test_metric_sees_a_wrong_colour_a_missing_and_an_extra_object(held_out):
    drawn, images = held_out
    rows = [i for i, scene in enumerate(drawn) if len(scene.items) == 1][:10]
    right = caption_accuracy.score(images[rows], [drawn[i] for i in rows])
    assert right["caption_accuracy"] == right["exact"] == right["object_recall"] == 1
    swapped = images[rows][:, [2, 0, 1]]
    assert caption_accuracy.score(swapped, [drawn[i] for i in rows])["caption_accuracy"] < 0.5
    two = next(i for i, scene in enumerate(drawn) if len(scene.items) == 2)
    one = scenes.Scene(drawn[two].items[:1], "grey", "graded", (1.0, 0.0), 0.05, 0.0)
    extra = caption_accuracy.score(images[two : two + 1], [one])
    assert extra["caption_accuracy"] == 1 and extra["exact"] == 0
    missing = caption_accuracy.score(as_tensor(scenes.render([one])), [drawn[two]])
    assert missing["caption_accuracy"] == 0 and missing["object_recall"] == 0.5


def test_metric_takes_pil_pictures_and_refuses_other_shapes(held_out):
    drawn, _ = held_out
    pictures = [Image.fromarray(array) for array in scenes.render(drawn[:4])]
    assert caption_accuracy.score(pictures, drawn[:4])["exact"] == 1
    with pytest.raises(ValueError, match="64, 64"):
        caption_accuracy.score(torch.zeros(1, 3, 32, 32), drawn[:1])
    with pytest.raises(ValueError, match="as many scenes"):
        caption_accuracy.score(pictures, drawn[:3])


def test_a_plain_pipeline_gives_a_picture_in_two_steps(pipeline):
    name, pipe = pipeline
    assert type(pipe).__name__ == CLASSES[name]
    call = tiny.CALL[name] | {"num_inference_steps": 2, "output_type": "pt"}
    first = pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images
    again = pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images
    other = pipe("a blue star", generator=torch.Generator().manual_seed(0), **call).images
    assert first.shape == (1, 3, 64, 64) and torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.005


@pytest.mark.slow
def test_pictures_show_what_their_captions_say(pipeline):
    name, pipe = pipeline
    captions, drawn = zip(*tiny.prompts(16, objects=1, seed=3), strict=True)
    images = tiny.pictures(pipe, name, list(captions), batch=16)
    accuracy = caption_accuracy.score(images, drawn)["caption_accuracy"]
    assert accuracy >= 0.75
    shuffled = caption_accuracy.score(images, drawn[1:] + drawn[:1])["caption_accuracy"]
    assert shuffled < 0.3


def test_clip_finds_the_caption_of_a_picture(held_out):
    from transformers import CLIPModel, CLIPProcessor

    drawn, captions = zip(*[scenes.sample(i, scenes.HELD_OUT) for i in range(8_000, 8_050)], strict=True)
    folder = tiny.folder("tiny-clip")
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pictures = [Image.fromarray(array) for array in scenes.render(drawn)]
    inputs = CLIPProcessor.from_pretrained(folder)(
        text=list(captions), images=pictures, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    assert (logits.argmax(1) == torch.arange(50)).float().mean() > 0.5


def test_every_folder_has_a_card_and_stays_small():
    total = 0
    for name in (*tiny.NAMES, *tiny.JUDGES, *tiny.shipped(tiny.VIDEOS)):
        files = [path for path in tiny.folder(name).rglob("*") if path.is_file()]
        assert (tiny.folder(name) / "README.md").exists()
        assert all(path.stat().st_size < 30e6 for path in files)
        assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
        total += sum(path.stat().st_size for path in files)
    assert total < 80e6


def test_prompts_are_repeatable_disjoint_and_counted():
    one = tiny.prompts(20, objects=1)
    assert one == tiny.prompts(20, objects=1) and all(len(scene.items) == 1 for _, scene in one)
    assert not {scene for _, scene in one} & {scene for _, scene in tiny.prompts(20, objects=1, seed=1)}
    assert {len(scene.items) for _, scene in tiny.prompts(60)} == {1, 2, 3}


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="tiny-sd"):
        tiny.folder("tiny-flux")
    with pytest.raises(ValueError, match="tiny-pixart"):
        tiny.load("tiny-clip")
