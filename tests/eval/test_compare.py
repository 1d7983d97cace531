"""Two runs or entries side by side: tests on pairs, corrected, refused when the pairs are none."""

import numpy as np
import pytest
from scipy import stats

from dq.errors import DQError
from eval import compare
from tests.eval import made_runs
from tests.eval.made_runs import score

HEAD = ("tiny-pixart", "int8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same items; in the second int8 is a little worse by psnr and needs fewer bytes."""
    home = tmp_path_factory.mktemp("runs")
    one, two = made_runs.make(home / "one"), made_runs.make(home / "two", steps=10, batch=8)
    scores, figures = two.scores(*HEAD), two.figures(*HEAD)
    rng = np.random.default_rng(0)
    scores["psnr"] = score([value - rng.uniform(0.5, 1.5) for value in scores["psnr"]["per_item"]], "dB")
    scores["feature_distance"] = score([v + 0.01 for v in scores["feature_distance"]["per_item"]], "1", "lower")
    two.write_scores(*HEAD, scores)
    two.write_figures(*HEAD, figures | {"bytes": figures["bytes"] - 1000})
    return one, two


def rows(a, b, metric=None):
    return {(row.entry, row.metric): row for row in compare.compare(a, b, metric)}


def scored(a, b, better="higher", prompts=None):
    prompts = prompts or [f"prompt {index}" for index in range(len(a))]
    return compare._scored(HEAD, "m", score(list(a), "dB", better), score(list(b), "dB", better), prompts)


def test_what_got_worse_and_what_stayed(runs):
    found = rows(runs[0].folder, runs[1].folder)
    row = found["int8", "psnr"]
    assert (row.wins, row.losses) == (0, 6) and row.low <= row.change <= row.high < 0
    assert row.change == pytest.approx(row.b - row.a)
    assert row.p == stats.wilcoxon([-1, -2, -3, -4, -5, -6]).pvalue
    assert found["int4-weight", "psnr"].verdict == found["full", "caption_accuracy"].verdict == "same"
    assert found["int8", "bytes"].verdict == "better" and found["int8", "bytes"].change == -1000
    assert found["int8", "ms_per_step"].verdict == "not tested"


@pytest.mark.parametrize(("better", "verdict"), [("higher", "worse"), ("lower", "better")])
def test_the_direction_of_the_metric_decides(better, verdict):
    rng = np.random.default_rng(1)
    a = rng.normal(40, 5, 30)
    (row,) = compare._corrected([scored(a, a - rng.uniform(0.1, 1, 30), better)])
    assert row.verdict == verdict and row.p_holm < 1e-6


def test_p_is_corrected_after_holm_over_all_rows():
    made = [
        compare.Row(*HEAD, "m", "", 0, 0, 0, wins=20, losses=5, p=p, verdict="better")
        for p in (0.04, 0.01, None, 0.03, 0.004)
    ]
    found = compare._corrected(made)
    assert [row.p_holm for row in found] == [pytest.approx(p) if p else None for p in (0.06, 0.03, None, 0.06, 0.016)]
    assert [row.verdict == "better" for row in found] == [False, True, True, False, True]


def test_noise_alone_is_rarely_called_a_difference():
    rng, false = np.random.default_rng(2), 0
    for _ in range(100):
        family = []
        for _ in range(6):
            pair = rng.normal(size=(2, 25))
            family.append(
                compare.Row(
                    *HEAD, "m", "", 0, 0, 0, wins=20, losses=5, p=compare._p(pair[1] - pair[0]), verdict="worse"
                )
            )
        false += any(row.verdict == "worse" for row in compare._corrected(family))
    assert false <= 10  # 5 expected of 100 families; 10 or fewer in 99 % of such hundreds


def test_seeds_of_a_prompt_are_no_evidence_of_their_own():
    a = np.zeros(100)
    b = np.random.default_rng(3).uniform(1, 2, 100)
    assert compare._corrected([scored(a, b)])[0].verdict == "better"
    few = scored(a, b, prompts=["one", "two"] * 50)
    assert few.wins == 2 and compare._corrected([few])[0].verdict == "too few differ"


def test_no_difference_shown_is_said_only_where_one_could_be():
    gaps = np.array([1.0, -1.5] * 10)
    assert compare._corrected([scored(np.zeros(20), gaps)])[0].verdict == "no difference shown"
    eight = scored(np.zeros(20), [*np.arange(1.0, 9.0), *[0.0] * 12])  # p = 2 / 2^8
    assert {row.verdict for row in compare._corrected([eight] * 6)} == {"better"}
    assert {row.verdict for row in compare._corrected([eight] * 7)} == {"too few differ"}


def test_a_mean_pulled_by_a_few_against_the_rest_is_mixed():
    gaps = np.array([1.0] * 30 + [-40.0] * 2)
    (row,) = compare._corrected([scored(np.zeros(32), gaps)])
    assert row.change < 0 and row.wins == 30 and row.verdict == "mixed"


def test_few_changed_items_are_tested_exactly():
    changed = np.array([0.0] * 95 + [1.0] * 5)
    assert compare._p(changed) == pytest.approx(2 / 2**5)


def test_items_that_one_side_could_not_score_are_left_out():
    row = scored([1.0, None, 3.0, 4.0], [2.0, 9.0, None, 5.0])
    assert row.change == 1.0 and row.wins == 2


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((5, 6), "intervals apart: worse"), ((3, 6), "intervals overlap"), ((None, None), "not tested")],
)
def test_figures_of_whole_sets_set_their_intervals_side_by_side(ends, verdict):
    a, b = score(None, "1", "lower", value=3.0), score(None, "1", "lower", value=5.5)
    row = compare._scored(HEAD, "fid", a | {"low": 2, "high": 4}, b | {"low": ends[0], "high": ends[1]}, ["x"] * 12)
    assert (row.verdict, row.p) == (verdict, None)


def test_two_entries_of_one_run(runs):
    one = runs[0].folder
    found = rows(one / "tiny-pixart" / "int8", one / "tiny-pixart" / "int4-weight", "psnr")
    assert list(found) == [("int8 → int4-weight", "psnr")]
    assert found["int8 → int4-weight", "psnr"].change < -20
    both = rows(one / "tiny-pixart" / "int8", one / "tiny-pixart" / "int4-weight")
    assert ("int8 → int4-weight", "ms_per_step") not in both, "a kernel is emulated"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": ["a red circle", "a green square"]},
            r"item 2 is 'a blue square' \(seed 0\) in one run and 'a green",
        ),
        ({"prompts": ["a red circle", "a blue square"], "seeds": [0, 2]}, r"item 1 is 'a red circle' \(seed 1\)"),
        ({"prompts": ["a red circle"]}, "the runs have 4 and 2 items; .* same prompts and seeds"),
    ],
)
def test_runs_of_other_items_are_refused(tmp_path, changes, message):
    made_runs.make(tmp_path / "a", prompts=["a red circle", "a blue square"])
    made_runs.make(tmp_path / "b", **changes)
    with pytest.raises(DQError, match=message):
        compare.compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("b", "metric", "message"),
    [
        ("nowhere", None, "is no evaluation run and lies in none"),
        ("one/tiny-sd", None, "has no 'tiny-sd'; expected one of tiny-pixart"),
        ("one/tiny-pixart/int9", None, "Did you mean 'int8'"),
        ("one/tiny-pixart/int8/0", None, "expected RUN, RUN/PIPELINE or RUN/PIPELINE/ENTRY"),
        ("one/tiny-pixart/int8", None, "give two runs, two pipelines or two entries"),
        ("two", "pnsr", "do not both have 'pnsr'; .* Did you mean 'psnr'"),
    ],
)
def test_what_is_not_there_is_named(runs, b, metric, message):
    home = runs[0].folder.parent
    with pytest.raises(DQError, match=message):
        compare.compare(home / "one", home / b, metric)


def test_half_scored_entries_are_refused(tmp_path):
    one, two = made_runs.make(tmp_path / "a"), made_runs.make(tmp_path / "b")
    two.write_scores(*HEAD, {"psnr": score([1.0, 2.0], "dB")})
    with pytest.raises(DQError, match="psnr of tiny-pixart int8 has 12 and 2 values for 12 items; finish both"):
        compare.compare(one, two)


def test_the_table_ends_with_how_the_runs_differ(runs):
    text = compare.text(compare.compare(*runs, "psnr"), compare.differences(*runs))
    lines = text.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "B is better in 0 and worse in 0 of 2 rows; 2 are equal, undecided or not tested." in lines
    assert "note: steps: 20 in A, 10 in B" in lines and not any("created" in line for line in lines)
    alone = compare.text(compare.compare(*runs, "bytes"), [])
    assert "-1,000" in alone and "B is better in 1 and worse in 0 of 3 rows" in alone
