"""Feature networks and statistics files are read or refused in one line; intervals cover what they say they cover."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dq.errors import DQError
from eval import features, intervals
from eval.features import RECOGNISER, TINY_CLIP, Statistics
from eval.metrics import fid
from pipelines import tiny
from pipelines.tiny import scenes
from pipelines.tiny.recogniser import as_tensor
from tests.lines import told_by


@pytest.fixture(scope="module")
def renders():
    return as_tensor(scenes.render([scenes.sample(i, scenes.HELD_OUT)[0] for i in range(8)]))


def as_files(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in features.as_bytes(images)]


def gaussian(count: int, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Samples whose own mean and covariance are exactly these."""
    drawn = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn -= drawn.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(drawn.T)), drawn.T, upper=False)
    return mean + (torch.linalg.cholesky(covariance) @ white).T


def test_any_model_of_transformers_gives_features(renders):
    net = features.network(str(tiny.folder(TINY_CLIP)))
    assert net.name == TINY_CLIP and net.features(renders[:3]).shape == (3, 128)
    assert torch.equal(net.features(renders[:3]), features.network(TINY_CLIP).features(renders[:3]))


def test_the_recogniser_takes_pictures_of_any_size(renders):
    net = features.network(RECOGNISER)
    large = F.interpolate(renders[:4], (128, 128), mode="nearest")
    near = (net.features(large) - net.features(renders[:4])).norm(dim=1)
    assert (near < 0.2 * (net.features(renders[4:8]) - net.features(renders[:4])).norm(dim=1)).all()


def test_published_statistics_are_read_and_others_refused(tmp_path):
    mean, covariance = np.array([1.0, 2.0]), np.array([[2.0, 0.5], [0.5, 1.0]])
    np.savez(tmp_path / "published.npz", mu=mean, sigma=covariance)
    found = Statistics.load(tmp_path / "published.npz")
    assert found.count is None and fid.score(gaussian(9, found.mean, found.covariance), found)["fid"] < 1e-6
    np.savez(tmp_path / "part.npz", mu=mean)
    np.savez(tmp_path / "odd.npz", mu=mean, sigma=mean)
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=covariance)
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("part", "odd", "pickled", "damaged", "nowhere"):
        with pytest.raises(DQError, match=f"{name}.npz"):
            Statistics.load(tmp_path / f"{name}.npz")
    Statistics(found.mean, found.covariance, 9, "inception").save(tmp_path / "inception.npz")
    with pytest.raises(DQError, match="are of inception, expected scene-recogniser"):
        features.of_real(str(tmp_path / "inception.npz"), RECOGNISER)
    with pytest.raises(ValueError, match=r"needs features \(2 or more, 2\)"):
        fid.score(torch.rand(5, 3), found)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(DQError, match="holds no picture"):
        features.of_folder(tmp_path, RECOGNISER)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DQError, match=r"broken\.png"):
        features.of_folder(tmp_path, RECOGNISER)


def test_real_pictures_of_different_sizes_are_read_in_order(renders, tmp_path):
    for i, side in enumerate((64, 64, 32, 64)):
        as_files(renders[i : i + 1])[0].resize((side, side)).save(tmp_path / f"{i}.png")
    found, net = features.of_folder(tmp_path, RECOGNISER), features.network(RECOGNISER)
    for i in (0, 1, 3):
        assert torch.allclose(found[i], net.features(renders[i : i + 1])[0], atol=1e-4)


# intervals


def test_intervals_of_means_cover_the_truth_as_often_as_they_say():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        low, high = intervals.of_mean(rng.normal(3.0, 1.0, 60).tolist(), range(60))
        hits += low < 3.0 < high
    assert 88 <= hits <= 99


def test_intervals_resample_prompts_with_all_their_seeds():
    values = np.random.default_rng(0).normal(size=30).tolist()
    once = intervals.of_mean(values, range(30))
    assert intervals.of_mean(values * 4, [*range(30)] * 4) == pytest.approx(once), "copies add no knowledge"
    assert intervals.of_mean(values, range(30)) == once, "always the same"
    assert intervals.of_mean(values[:4], ["one prompt"] * 4) is None
    for rows in intervals.resamples([0, 0, 1, 1, 2, 2], 20):
        assert all(rows.count(2 * k) == rows.count(2 * k + 1) for k in range(3)) and len(rows) == 6


def test_the_interval_of_a_distance_lies_around_it_and_narrows_with_more_pictures():
    reference = Statistics(torch.zeros(2).double(), torch.eye(2).double())
    widths = []
    for count in (20, 500):
        found = gaussian(count, torch.ones(2).double(), torch.eye(2).double())

        def measure(rows, found=found):
            return fid.score(found[rows], reference)["fid"]

        low, high = intervals.of_distance(2.0, measure, intervals.resamples(range(count), 30))
        assert low < 2.0 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--foo"], "required: folder, out"),
        (["scenes", "x.txt"], "ends in .npz"),
        (["nowhere", "x.npz", "--network", RECOGNISER], "holds no picture"),
        (["scenes", "{}/file/x.npz", "--network", RECOGNISER], "cannot write"),
    ],
)
def test_wrong_use_of_the_program_is_one_line(words, said, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["features", *(word.format(tmp_path) for word in words)])
    with pytest.raises(SystemExit) as left:
        features.main()
    assert left.value.code == 2 and said in told_by("features", capsys.readouterr().err)
