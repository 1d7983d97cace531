"""Scores of a run: known answers, the reference library's figures, intervals, and a reason for all that is missing."""

import dataclasses
import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.multimodal import clip_score as reference_clip_score
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dq.errors import DQError
from eval import features, intervals, metrics, prompts
from eval import score as scoring
from eval.features import RECOGNISER, TINY_CLIP, Statistics
from eval.metrics import clip_score, fid, flicker, frame_consistency, kid, lpips, psnr, ssim
from eval.runs import Run
from eval.suite import Suite
from pipelines import tiny
from pipelines.tiny import scenes
from pipelines.tiny.recogniser import as_tensor

COUNT = 24
ENTRIES = {"full": 0, "blurred": 1, "smeared": 4}  # how often each entry's pictures are blurred
PIPELINE = "tiny-sd"


def blurred(images: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images


def as_files(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in features.as_bytes(images)]


def make_run(folder, pictures=None, **changes) -> Run:
    """A run whose pictures are renders of its scenes, blurred more from entry to entry."""
    asked = {"name": "t", "pipelines": {PIPELINE: {}}, "prompts": {"scenes": COUNT, "seed": 3}}
    recipes = [{"name": name, "recipe": "int8"} for name in ENTRIES if name != "full"]
    suite = Suite.from_dict(asked | {"recipes": recipes} | changes)
    run = Run.create(folder, suite, prompts.items(suite))
    for entry, times in ENTRIES.items():
        drawn = pictures
        if pictures is None:
            drawn = as_tensor(scenes.render([prompts.scene(item.scene) for item in run.items]))
        for item, picture in zip(run.items, as_files(blurred(drawn, times)), strict=True):
            run.write_frames(PIPELINE, entry, item.index, picture)
    return run


def asking(run: Run, **changes) -> Run:
    """The same pictures under another suite."""
    other = Run(run.folder)
    other.suite = dataclasses.replace(run.suite, **changes)
    return other


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer renders and resamples than a user gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SCENES", 300)
        patch.setattr(scoring, "RESAMPLES", 5)
        features.of_real.cache_clear()
        yield
        features.of_real.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), fid={"real": "scenes", "features": RECOGNISER})


@pytest.fixture(scope="module")
def renders():
    return as_tensor(scenes.render([scenes.sample(i, scenes.HELD_OUT)[0] for i in range(40)]))


@pytest.fixture(scope="module")
def scored(run):
    return {entry: scoring.score(run, PIPELINE, entry) for entry in ENTRIES}


class Recogniser(nn.Module):
    """The features as the reference library asks for them."""

    num_features = 256

    def forward(self, images):
        return tiny.load_recogniser().features(images)


# known answers


def gaussian(count: int, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Samples whose own mean and covariance are exactly these."""
    drawn = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn -= drawn.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(drawn.T)), drawn.T, upper=False)
    return mean + (torch.linalg.cholesky(covariance) @ white).T


def test_fid_of_identical_sets_is_zero(renders):
    found = features.network(RECOGNISER).features(renders)
    assert fid.score(found, found)["fid"] == pytest.approx(0, abs=1e-3)
    assert fid.score(found, found.flip(0))["fid"] == pytest.approx(0, abs=1e-3), "order says nothing"


def test_fid_of_two_gaussians_is_the_closed_form():
    one, two = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 1.0]).double()
    a, b = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double(), torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    # of two by two matrices: (tr (AB)^(1/2))^2 = tr AB + 2 (det AB)^(1/2)
    root = math.sqrt(torch.trace(a @ b) + 2 * math.sqrt(torch.linalg.det(a @ b)))
    wanted = float((one - two).square().sum() + torch.trace(a + b)) - 2 * root
    samples = gaussian(50, one, a)
    assert fid.score(samples, gaussian(70, two, b))["fid"] == pytest.approx(wanted, rel=1e-6)
    assert fid.score(samples, Statistics(two, b))["fid"] == pytest.approx(wanted, rel=1e-6)


def test_kid_of_two_pairs_is_the_sum_its_docstring_gives():
    x, y = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    # k(x1, x2) = 1, k(y1, y2) = (8 / 2 + 1)^3, every k(x, y) = 1
    assert kid.score(x, y)["kid"] == pytest.approx(1 + 125 - 2)


def test_kid_of_more_than_a_subset_is_the_same_each_time(monkeypatch):
    monkeypatch.setattr(kid, "SUBSET", 10)
    x, y = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0)).unbind()
    torch.manual_seed(5)
    first, state = kid.score(x, y), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state()), "nobody else's random numbers change"
    torch.manual_seed(6)
    assert kid.score(x, y) == first


def test_blur_makes_every_metric_worse(scored):
    for name in ("psnr", "ssim", "feature_distance", "fid (scene-recogniser)"):
        rows = [scored[entry][name] for entry in ENTRIES if name in scored[entry]]
        sign = 1 if rows[0]["better"] == "lower" else -1
        values = [sign * row["value"] for row in rows]
        assert len(values) >= 2 and values == sorted(values) and values[0] < values[-1], name
    to_full = [scored[entry]["fid_to_full (scene-recogniser)"]["value"] for entry in ("blurred", "smeared")]
    assert 0 < to_full[0] < to_full[1]


def test_kid_grows_with_blur_and_is_nothing_between_sets_of_one_kind(renders):
    net = features.network(RECOGNISER)
    found = [kid.score(net.features(blurred(renders[20:], n)), net.features(renders[:20]))["kid"] for n in (0, 6, 20)]
    assert found[0] < found[1] < found[2]
    x, y = torch.randn(2, 800, 4, generator=torch.Generator().manual_seed(0)).unbind()
    assert abs(kid.score(x, y)["kid"]) < 0.02 < kid.score(x, y + 0.5)["kid"]


def test_flicker_counts_change_that_the_reference_does_not_have():
    reference = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    assert flicker.score([reference + 0.25], [reference])["flicker"] == pytest.approx(0, abs=1e-6)
    blinking = reference + torch.tensor([0.0, 0.2, 0.0, 0.2]).reshape(4, 1, 1, 1)
    assert flicker.score([blinking], [reference])["flicker"] == pytest.approx(0.2, abs=1e-6)
    with pytest.raises(ValueError, match="2 frames or more"):
        flicker.per_item([reference[:1]], [reference[:1]])


def test_frame_consistency_is_one_for_a_still_picture_and_falls_with_cuts(renders):
    still, cuts = renders[:1].expand(3, -1, -1, -1), renders[:3]
    moving = torch.stack([renders[0].roll(shift, 2) for shift in range(3)])
    found = frame_consistency.per_item([still, moving, cuts], RECOGNISER)
    assert found[0] == pytest.approx(1) and 0.9999 > found[1] > found[2]
    with pytest.raises(ValueError, match="2 frames"):
        frame_consistency.per_item([renders[:1]], RECOGNISER)


def test_clip_score_finds_the_right_captions(renders):
    captions = [scenes.sample(i, scenes.HELD_OUT)[1] for i in range(40)]
    right = clip_score.score(renders, captions, TINY_CLIP)["clip_score"]
    assert right > 20 + clip_score.score(renders, captions[1:] + captions[:1], TINY_CLIP)["clip_score"]
    assert clip_score.per_item(renders[:1], ["a red circle " * 40], TINY_CLIP), "long prompts are cut"


# agreement with the reference library


def test_fid_and_kid_equal_the_library_on_the_same_pictures(renders):
    real, fake = renders[:20], blurred(renders[20:], 2)
    distance = FrechetInceptionDistance(Recogniser(), normalize=True)
    kernel = KernelInceptionDistance(Recogniser(), subsets=1, subset_size=20)
    for measure in (distance, kernel):
        measure.update(real, real=True)
        measure.update(fake, real=False)
    net = features.network(RECOGNISER)
    mine = net.features(fake), net.features(real)
    assert fid.score(*mine)["fid"] == pytest.approx(float(distance.compute()), rel=1e-4)
    assert kid.score(*mine)["kid"] == pytest.approx(float(kernel.compute()[0]), rel=1e-4)


def test_ssim_and_psnr_equal_the_library_on_the_same_pictures(renders):
    images = blurred(renders, 1)
    wanted = structural_similarity_index_measure(images, renders, data_range=1.0)
    assert ssim.score(images, renders)["ssim"] == pytest.approx(float(wanted), abs=1e-4)
    wanted = peak_signal_noise_ratio(images, renders, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    assert psnr.score(images, renders)["psnr_db"] == pytest.approx(float(wanted), abs=1e-4)


def test_clip_score_equals_the_library_on_the_same_pictures(renders):
    captions = [scenes.sample(i, scenes.HELD_OUT)[1] for i in range(12)]
    model, processor = clip_score._model(TINY_CLIP)

    def tensors(call):  # the library was written for a transformers whose models answered with tensors
        return lambda *args: call(*args).pooler_output

    answering = SimpleNamespace(
        to=lambda device: answering,
        config=model.config,
        get_image_features=tensors(model.get_image_features),
        get_text_features=tensors(model.get_text_features),
    )
    pixels = [torch.from_numpy(array).permute(2, 0, 1) for array in features.as_bytes(renders[:12])]
    wanted = reference_clip_score(pixels, captions, lambda: (answering, processor))
    assert clip_score.score(renders[:12], captions, TINY_CLIP)["clip_score"] == pytest.approx(float(wanted), abs=1e-4)


# every metric


def arguments(module, run: Run) -> list:
    """What a metric takes: of the run, or videos and latents made up."""
    feed = scoring.Feed(run, PIPELINE, "blurred", run.items[:4])
    own = {"trajectory": [torch.rand(4, 2, 3) for _ in range(5)], "clips": [torch.rand(8, 3, 64, 64)] * 2}
    own |= {f"reference_{key}": value[::-1] for key, value in own.items()}
    own["motions"] = [clip for _, clip in tiny.motions(2)]
    return [own[need] if need in own else getattr(feed, need) for need in module.NEEDS]


@pytest.mark.parametrize("name", [name for name in metrics.names() if hasattr(metrics.load(name), "per_item")])
def test_the_mean_over_items_is_the_headline(name, run):
    module = metrics.load(name)
    judges = [list(module.JUDGES)[1]] if hasattr(module, "JUDGES") else []
    if not judges and hasattr(module, "why_not") and module.why_not():
        pytest.skip(module.why_not())
    given = [*arguments(module, run), *judges]
    headline = module.score(*given)[next(iter(module.UNITS))]
    assert intervals.mean(module.per_item(*given)) == pytest.approx(headline, rel=1e-6)


def test_lpips_asks_the_library_for_one_value_a_picture(monkeypatch, renders):
    seen = []
    library = SimpleNamespace(
        reset=seen.clear,
        update=lambda x, y: seen.append((x - y).abs().flatten(1).mean(1).squeeze()),
        compute=lambda: torch.cat([part.reshape(-1) for part in seen]),
    )
    monkeypatch.setattr(lpips, "_measure", lambda: library)
    found = [lpips.per_item(blurred(part, 1), part) for part in (renders[:3], renders[:1])]
    assert [len(row) for row in found] == [3, 1] and found[0][0] == pytest.approx(found[1][0])
    with pytest.raises(ValueError, match="equal shape"):
        lpips.per_item(renders[:2], renders[:1])


@pytest.mark.parametrize("name", ["fid", "kid", "ssim", "lpips"])
def test_a_missing_library_is_named(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if "torch" in package else find(package))
    module = metrics.load(name)
    reason = getattr(module.why_not, "__wrapped__", module.why_not)(*[RECOGNISER] * hasattr(module, "JUDGES"))
    assert "torchmetrics" in reason and "not installed" in reason


# rows of a run


def test_rows_of_pictures_hold_a_value_for_each_item(scored, run):
    row = scored["blurred"]["psnr"]
    assert set(row) == {"value", "low", "high", "unit", "better", "count", "per_item", "note"}
    pairs = [[run.picture(PIPELINE, entry, i) for i in range(COUNT)] for entry in ("blurred", "full")]
    assert row["per_item"] == pytest.approx(psnr.per_item(*pairs)) and row["count"] == COUNT
    assert row["low"] < row["value"] < row["high"] and (row["unit"], row["better"]) == ("dB", "higher")
    json.dumps(scored, allow_nan=False)


def test_a_row_of_sets_says_through_which_network_and_that_pictures_are_few(scored):
    row = scored["smeared"]["fid (scene-recogniser)"]
    assert "through scene-recogniser, not inception" in row["note"]
    assert "24 pictures are too few for a covariance of 256 features" in row["note"]
    assert row["per_item"] is None and row["low"] < row["value"] < row["high"] and row["low"] >= 0
    assert "fid" not in scored["smeared"], "the plain name belongs to Inception"


def test_resamples_keep_pairs_of_the_same_seed_together(renders):
    found, task = features.network(RECOGNISER).features(renders), scoring.Task("fid", fid, RECOGNISER)
    row = scoring._against_full(task, found, found.clone(), list(range(len(found))))
    assert (row["value"], row["high"]) == pytest.approx((0, 0), abs=1e-3), "equal pairs differ in no resample"


def test_full_precision_is_not_compared_with_itself(scored):
    assert not {"psnr", "ssim", "feature_distance", "fid_to_full (scene-recogniser)"} & set(scored["full"])
    assert {"caption_accuracy", "fid (scene-recogniser)"} <= set(scored["full"])
    assert scored["full"]["caption_accuracy"]["value"] == 1.0


def test_what_a_machine_lacks_is_missing_of_every_entry(run, monkeypatch):
    monkeypatch.setattr(lpips, "why_not", lambda: "no")
    found = scoring.score(asking(run, metrics=("psnr", "lpips")), PIPELINE, "full")
    assert found == {"lpips": {"missing": "no", "instead": "feature_distance"}}


def test_without_libraries_and_weights_rows_are_missing_and_name_their_stand_in(run, monkeypatch):
    monkeypatch.setattr(lpips, "why_not", lambda: "needs torchvision, not installed here")
    usual = {next(iter(module.JUDGES)): module for module in (fid, clip_score)}
    fetched = []

    def absent(name, fetch=True):
        if name not in usual:
            return None
        fetched.append(fetch)
        return "no"

    for module in usual.values():
        monkeypatch.setattr(module, "why_not", absent)
    found = scoring.score(
        asking(run, fid={"real": "scenes"}, metrics=("lpips", "fid", "clip_score")), PIPELINE, "blurred"
    )
    missing = {name: row["instead"] for name, row in found.items() if "missing" in row}
    assert missing == {
        "lpips": "feature_distance",
        "fid": "fid (scene-recogniser)",
        "fid_to_full": "fid_to_full (scene-recogniser)",
        "clip_score": "clip_score (tiny-clip)",
    }
    assert set(found) == set(missing) | set(missing.values()), "each stand-in is there, and nothing else"
    assert found["lpips"]["missing"] == "needs torchvision, not installed here"
    assert fetched == [False, False], "nothing is fetched that the suite does not name"


def test_a_network_is_taken_from_this_machine_alone_unless_the_suite_names_it(monkeypatch):
    asked = []

    def absent(place, **how):
        asked.append(how["local_files_only"])
        raise OSError("no connection.")

    kind = SimpleNamespace(from_pretrained=absent, __name__="Net")
    with pytest.raises(DQError, match="name it in the suite"):
        features.pretrained(kind, "some/model", fetch=False)
    with pytest.raises(DQError, match=r"Net 'some/model' cannot be had: no connection$"):
        features.pretrained(kind, "some/model")
    assert asked == [True, True, False]


def test_tiny_clip_stands_in_only_for_scenes(run, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    other = make_run(tmp_path / "run", torch.rand(2, 3, 64, 64), prompts={"file": str(tmp_path / "p.txt")})
    found = scoring.score(other, PIPELINE, "blurred")
    assert found["clip_score"]["instead"] is None and "clip_score (tiny-clip)" not in found
    assert "caption_accuracy" not in found and "psnr" in found


def test_a_metric_that_the_run_cannot_feed_is_missing_only_when_named(run, scored):
    asked = ("trajectory_error", "flicker", "noise_sqnr", "kid")
    found = scoring.score(asking(run, metrics=asked, fid={"features": RECOGNISER}), PIPELINE, "blurred")
    assert set(found) == {"trajectory_error", "flicker", "noise_sqnr", "kid (scene-recogniser)"}
    assert "latents" in found["trajectory_error"]["missing"] and "videos" in found["flicker"]["missing"]
    assert "fid: real" in found["kid (scene-recogniser)"]["missing"]
    assert not {"trajectory_error", "flicker", "noise_sqnr"} & set(scored["blurred"])


def test_pictures_of_another_size_are_refused_by_the_metric_and_not_by_the_run(tmp_path):
    run = make_run(tmp_path / "run", torch.rand(COUNT, 3, 40, 40))
    found = scoring.score(asking(run, metrics=("caption_accuracy", "psnr")), PIPELINE, "blurred")
    assert "64" in found["caption_accuracy"]["missing"] and found["psnr"]["value"] > 0


def test_trajectories_are_scored_where_the_run_kept_them(tmp_path):
    run = make_run(tmp_path / "run", metrics=["trajectory_error"])
    for item in run.items:
        run.write_trajectory(PIPELINE, "full", item.index, torch.zeros(5, 4, 2, 2))
        run.write_trajectory(PIPELINE, "blurred", item.index, torch.full((5, 4, 2, 2), float(item.index)))
    row = scoring.score(run, PIPELINE, "blurred")["trajectory_error"]
    assert row["per_item"] == [float(i * i) for i in range(COUNT)] and row["better"] == "lower"


def test_an_unfinished_entry_is_scored_over_what_is_there(tmp_path):
    run = make_run(tmp_path / "run", metrics=["psnr"])
    for index in (0, 7):
        run.image_path(PIPELINE, "blurred", index).unlink()
    row = scoring.score(run, PIPELINE, "blurred")["psnr"]
    assert row["count"] == COUNT - 2 and row["note"] == "22 of 24 pictures."
    assert [i for i, value in enumerate(row["per_item"]) if value is None] == [0, 7]
    for item in run.items:
        run.image_path(PIPELINE, "blurred", item.index).unlink(missing_ok=True)
    with pytest.raises(DQError, match="no picture to score"):
        scoring.score(run, PIPELINE, "blurred")


def test_videos_are_scored_frame_by_frame_and_as_videos(tmp_path):
    run = make_run(tmp_path / "run", prompts={"scenes": 3, "seed": 3}, fid={"features": RECOGNISER})
    for item in run.items:
        drawn = as_tensor(scenes.render([prompts.scene(item.scene)] * 3))
        for entry, times in ENTRIES.items():
            run.image_path(PIPELINE, entry, item.index).unlink()
            frames = torch.cat([blurred(drawn[:1], times * (1 + number % 2)) for number in range(3)])
            run.write_frames(PIPELINE, entry, item.index, as_files(frames))
    found = {entry: scoring.score(run, PIPELINE, entry) for entry in ENTRIES}
    row = found["smeared"]
    assert len(row["psnr"]["per_item"]) == 3 and row["fid_to_full (scene-recogniser)"]["count"] == 9
    frames = [run.frames(PIPELINE, entry, 0) for entry in ("smeared", "full")]
    assert row["psnr"]["per_item"][0] == pytest.approx(sum(psnr.per_item(*frames)) / 3)
    assert 0 < found["blurred"]["flicker"]["value"] < row["flicker"]["value"] and "flicker" not in found["full"]
    assert row["frechet_clip_to_full"]["count"] == 3 and row["frechet_clip_to_full"]["value"] > 0
    consistency = [found[entry]["frame_consistency (scene-recogniser)"]["value"] for entry in ENTRIES]
    assert consistency[0] == pytest.approx(1) and consistency == sorted(consistency, reverse=True)


def test_a_suite_is_checked_before_any_work(run, tmp_path):
    scoring.check(run.suite)
    for changes, text in (
        ({"metrics": ("psnr", "fidd")}, "unknown metric 'fidd'.*fid"),
        ({"fid": {"real": str(tmp_path / "nowhere")}}, "fid: real"),
        ({"fid": {"features": str(tmp_path)}}, "fid: features: .*cannot be had"),
    ):
        with pytest.raises(DQError, match=text):
            scoring.check(asking(run, **changes).suite)


def test_statistics_of_a_file_give_the_same_fid_as_the_pictures(run, renders, tmp_path, monkeypatch, capsys):
    folder, file = tmp_path / "real", tmp_path / "real.npz"
    (folder / "deeper").mkdir(parents=True)
    for i, picture in enumerate(as_files(renders)):
        picture.save(folder / ("deeper" if i % 2 else ".") / f"{i}.png")
    monkeypatch.setattr(sys, "argv", ["features", str(folder), str(file), "--network", RECOGNISER])
    features.main()
    assert "40 pictures, 256 features of scene-recogniser" in capsys.readouterr().out
    key, values = "fid (scene-recogniser)", []
    for real in (folder, file):
        options = {"real": str(real), "features": RECOGNISER}
        found = scoring.score(asking(run, metrics=("fid", "kid"), fid=options), PIPELINE, "blurred")
        values.append(found[key]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert "holds statistics alone" in found["kid (scene-recogniser)"]["missing"]
