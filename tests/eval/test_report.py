"""The report of a run: whole in one file, honest about what is missing, the same every time, readable on a phone."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dq.errors import DQError
from eval import figures, page, report, summary
from eval.experiments import quality, rows, tables
from eval.runs import Run
from pipelines import tiny
from tests.eval import made_runs

PICTURE = re.compile(r'src="data:image/jpeg;base64,([^"]+)"')


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_runs.make(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture(scope="module")
def written(run):
    return report.write(run).read_text()


def pictures(text):
    return [Image.open(io.BytesIO(base64.b64decode(found))) for found in PICTURE.findall(text)]


def test_the_page_needs_nothing_outside_of_itself(written):
    assert "<script" not in written and "@import" not in written
    assert len(re.findall("<img", written)) == len(PICTURE.findall(written)) > 0
    addresses = re.findall(r'(?:href|src)="([^"]*)"', written) + re.findall(r"url\(([^)]*)\)", written)
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", written)


def test_what_a_prompt_says_is_text_and_not_markup(written):
    assert "<b>star" not in written and "a &lt;b&gt;star&lt;/b&gt; &amp; &#34;ring&#34;" in written


def test_the_same_run_gives_the_same_files(run, written):
    before = {name: (run.folder / name).read_bytes() for name in ("report.html", "report.md", "report.json")}
    report.write(Run(run.folder))
    assert before == {name: (run.folder / name).read_bytes() for name in before}


def test_plots_do_not_share_ids(written):
    ids = re.findall(r'\bid="([^"]+)"', written)
    assert len(ids) == len(set(ids)) > 3
    assert set(re.findall(r"url\(#([^)]+)\)", written)) <= set(ids)


def test_pictures_shrink_until_the_page_is_small_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plots", lambda *given: [])
    run = made_runs.make(tmp_path / "large", prompts=["a red circle"], side=320)
    found = summary.summary(run)
    whole = page.render(run, found)
    assert {max(picture.size) for picture in pictures(whole)} == {256}
    monkeypatch.setattr(page, "PAGE_BYTES", len(whole) // 2)
    small = page.render(run, found)
    assert len(small) <= len(whole) // 2 and {max(picture.size) for picture in pictures(small)} <= {160, 96}


def test_videos_are_strips_of_their_frames_that_the_page_plays(tmp_path):
    run = made_runs.make(tmp_path / "video", prompts=["a red circle"], frames=5, side=32)
    text = page.render(run, summary.summary(run))
    assert {picture.size for picture in pictures(text)} == {(160, 32)}
    assert text.count('<div class="clip" style="--n: 5">') == text.count("<img") > 0
    assert "steps(var(--n))" in text and "prefers-reduced-motion" in text and "Clips play" in text
    first, last = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    strip = figures.strip([first, first, first, last], 32)
    assert strip.getpixel((70, 5)) == (255, 0, 0) and strip.getpixel((100, 5)) == (0, 0, 255)
    many = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(81)]
    kept = [frame.getpixel((0, 0))[0] for frame in figures.chosen(many)]
    assert len(kept) == figures.MOST_FRAMES and kept[0] == 0 and kept[-1] == 80 and kept == sorted(set(kept))


def test_the_page_of_pictures_plays_nothing(written):
    assert 'class="clip"' not in written and "Clips play" not in written


def test_differences_are_eight_times_what_differs_with_no_wrap():
    one = Image.new("RGB", (2, 2), (10, 200, 0))
    other = Image.new("RGB", (2, 2), (7, 100, 1))
    (found,) = figures.difference([one], [other])
    assert found.getpixel((0, 0)) == (24, 255, 8)


def test_the_front_holds_what_no_other_beats():
    points = [
        figures.Point(*point) for point in [("a", 4, 30), ("b", 5, 28), ("c", 5, 35), ("d", 9, 35), ("e", 12, 50)]
    ]
    assert [point.name for point in figures.front(points, "higher")] == ["a", "c", "e"]
    assert [point.name for point in figures.front(points, "lower")] == ["a", "b"]


def test_labels_of_a_plot_do_not_cover_each_other():
    points = [figures.Point("one", 5, 30), figures.Point("two", 5, 30), figures.Point("far", 9, 40)]
    text = figures.pareto(points, "MiB", "PSNR, dB", "higher")
    places = [re.search(rf'<text [^>]*x="([^"]+)" y="([^"]+)"[^>]*>{name}<', text) for name in ("one", "two", "far")]
    assert len({place.groups() for place in places}) == 3


def test_missing_metrics_and_entries_come_with_reason_and_stand_in(run, written):
    markdown, data = (run.folder / "report.md").read_text(), json.loads((run.folder / "report.json").read_text())
    assert "No LPIPS, SSIM: needs torchvision, not installed here; in its place: feature distance" in markdown
    assert "`mixed` is missing: budget: this version of dq has no dq.Budget" in markdown
    assert "12 pictures are too few for a covariance" in markdown
    pixart = data["pipelines"]["tiny-pixart"]
    assert pixart["missing"][0]["instead"] == ["feature_distance"] and "lpips" not in pixart["metrics"]
    for text in ("needs torchvision", "In its place: <strong>feature distance", "has no dq.Budget", "12 pictures are"):
        assert text in written


def test_emulated_kernels_get_no_milliseconds(run, written):
    found = summary.summary(run)["pipelines"]["tiny-pixart"]
    heads, cells = summary.columns(found["metrics"], found["entries"])
    at = heads.index("ms per step")
    assert [str(cells[name][at]) for name in cells] == ["18.0 (17.5 to 18.5)", "14.0 (13.5 to 14.5)", "emulated"]
    drawn = page.plots("psnr", found["metrics"]["psnr"], found["entries"])
    assert len(drawn) == 1 and "MiB" in drawn[0], "one entry alone is no plot over time"


def test_the_worst_prompts_are_those_the_metric_names(run):
    worst = summary.summary(run)["pipelines"]["tiny-pixart"]["entries"]["int8"]["worst"]
    assert worst["metric"] == "feature_distance" and len(worst["items"]) == 10
    assert worst["items"][0] | {"scene": None} == vars(run.items[5]) | {"value": 3.25}
    values = [item["value"] for item in worst["items"]]
    assert values == sorted(values, reverse=True)
    decibels = {"psnr": run.scores("tiny-pixart", "int8")["psnr"]}
    assert summary._worst(run, decibels)["items"][0]["index"] == 3


def test_items_without_a_value_are_not_among_the_worst(run):
    values = [None] * 10 + [1.0, 2.0]
    found = summary._worst(run, {"psnr": made_runs.score(values, "dB", value=1.5)})
    assert [item["index"] for item in found["items"]] == [10, 11] and found["median"] == 1.5


def test_a_figure_is_bold_only_out_of_reach_of_the_others():
    def entries(low, high):
        rival = {"value": 9.0, "low": low, "high": high}
        return {"full": {"scores": {}}, "a": {"scores": {"m": {"value": 10.0}}}, "b": {"scores": {"m": rival}}}

    assert summary._best("m", {"better": "higher"}, entries(8.0, 9.9)) == "a"
    assert summary._best("m", {"better": "higher"}, entries(8.0, 10.1)) is None
    assert summary._best("m", {"better": "lower"}, entries(8.0, 9.9)) == "b"


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (47.649, "dB", "47.6"),
        (0.04588, "1", "0.0459"),
        (1234.5, "", "1234"),
        (0.0, "1", "0.0"),
        (-0.00251, "", "-0.00251"),
    ],
)
def test_figures_are_shown_with_three_digits_that_count(value, unit, shown):
    assert str(summary._score({"value": value, "unit": unit})) == shown


def test_a_run_that_is_not_finished_says_so_and_is_not_committed(tmp_path):
    run = made_runs.make(tmp_path / "half", prompts=["a red circle"])
    run.image_path("tiny-pixart", "int8", 1).unlink()
    text = report.write(run).read_text()
    assert "1 of 2 pictures drawn" in text and "not drawn" in text
    with pytest.raises(DQError, match=r"int8: 1 of 2 pictures drawn; run the suite again"):
        report.commit(run, tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()


@pytest.fixture
def committed(run, tmp_path, monkeypatch):
    file = tmp_path / "eval.json"
    monkeypatch.setattr(report, "FILE", file)
    report.commit(run, file)
    return file


def test_committing_replaces_the_rows_of_the_suite_alone(run, committed):
    mine = rows.read(committed)
    committed.write_text(json.dumps({"rows": [{"suite": "other"}, *mine, mine[0] | {"entry": "gone since"}]}))
    report.commit(run, committed)
    assert rows.read(committed) == [{"suite": "other"}, *mine]
    assert {"commit", "machine", "versions", "weights", "seeds"} <= set(mine[0]) and "per_item" not in str(mine)


def test_the_results_page_gets_the_table_of_the_committed_rows(committed):
    text = "<!-- speed -->\n<!-- /speed -->\n<!-- eval -->\nold\n<!-- /eval -->\n"
    _, make = tables.tables()["eval"]
    assert tables.current(text, "eval") != make()
    text = tables.written(text, "eval", make())
    assert tables.current(text, "eval") == make() and tables.current(text, "speed") == ""
    assert "| tiny-pixart | `int8` | 7.3 MiB (0.28x) | 14.0 (13.5 to 14.5) |" in text
    assert "| tiny-pixart | `mixed` | missing: budget: this version of dq has no dq.Budget |" in text
    assert "needs torchvision" in text and "12 pictures are too few" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[-6:]}) == 1, "every row has all columns"
    found = json.loads(committed.read_text())
    found["rows"][1]["figures"]["ms_per_step"] = 13.0
    committed.write_text(json.dumps(found))
    assert tables.current(text, "eval") != make(), "a changed row shows"


def test_committed_rows_are_of_the_models_that_are_shipped():
    for row in rows.read(rows.FOLDER / "eval.json"):
        if row["path"] in tiny.NAMES:
            assert row["weights"] == quality.fingerprint(row["path"]), "run `make eval` and `make table`"


@pytest.fixture
def chrome(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"):
        options.add_argument(argument)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def test_the_page_fits_a_phone_and_a_desk_in_both_colours(chrome, run, written):
    backs = [_looked_at(chrome, run, width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]
    assert np.mean(backs[0]) > 200 > 60 > np.mean(backs[1])


def test_clips_play_frame_by_frame_and_together_unless_the_reader_wants_no_motion(chrome, tmp_path):
    clips = made_runs.make(tmp_path / "clips", prompts=["a red circle"], frames=5, side=32)
    report.write(clips)
    _looked_at(chrome, clips, 1280, "light")
    places = "return [...document.querySelectorAll('.item .clip img')].map(i => i.getAnimations()[0].%s)"
    assert {timing["duration"] for timing in chrome.execute_script(places % "effect.getTiming()")} == {5 * 125}
    # set to the middle of each frame: the strip stands at that frame's left edge
    shift = """return [...document.querySelectorAll('.item .clip')].map(box => {
        const image = box.firstElementChild, playing = image.getAnimations()[0];
        playing.pause(); playing.currentTime = arguments[0];
        return (box.getBoundingClientRect().left - image.getBoundingClientRect().left)
            / box.getBoundingClientRect().width;})"""
    for frame in range(5):
        left = chrome.execute_script(shift, 125 * frame + 60)
        assert len(left) > 4 and np.allclose(left, frame, atol=0.02)
    wish = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
    still = "return [...document.querySelectorAll('.clip img')].every(i => i.getAnimations().length == 0)"
    assert chrome.execute_script(still)


def _looked_at(chrome, run, width, scheme):
    """Background of the page at a width; nothing overflows, all pictures are there, no complaint of the browser."""
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    chrome.get((run.folder / "report.html").resolve().as_uri())
    assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
    fits = "return [...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)"
    assert chrome.execute_script(fits), "no table has to be scrolled to be read"
    assert chrome.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert chrome.get_log("browser") == []
    colour = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in re.findall(r"\d+", colour)][:3]
