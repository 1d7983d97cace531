"""The demo: its endpoints through gradio_client, its pages in a real headless Chromium.

Screenshots of the tabs are kept as out/app/*.png.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import gradio_client
import httpx
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import app
import dq
from demo import drawing, models, quantizing, waiting
from eval.metrics import psnr
from pipelines import tiny
from tests.app import app_folders

SHOTS = Path(__file__).resolve().parents[2] / "out" / "app"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1300,1250"
).split()
REBOUND = "--host-resolver-rules=MAP evil.example 127.0.0.1"
QUICK = {"prompt": "a red circle", "seed": 1, "steps": 2, "guidance": 3.0, "width": 64, "height": 64}
FILM = {"width": 32, "height": 32, "frames": 9}
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver are installed")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    found = app_folders.places(tmp_path_factory.mktemp("app"))
    app_folders.small_run(found["runs"] / "small")
    app_folders.small_video(found["models"] / "film")
    return found


@pytest.fixture(scope="module")
def page(places):
    page = app.build([places["models"]], [places["runs"]], places["made"])
    yield page
    page.close()


@pytest.fixture(scope="module")
def address(page, places):
    return app.launch(page, [places["made"], places["runs"]], wait=False)


@pytest.fixture
def client(address):
    client = gradio_client.Client(address, verbose=False)
    yield client
    client.close()


@pytest.fixture
def jobs(monkeypatch):
    """Jobs of the Quantize tab as they are started."""
    started, start = [], quantizing.Job.__init__
    monkeypatch.setattr(quantizing.Job, "__init__", lambda self, asked: (started.append(self), start(self, asked))[1])
    return started


def ask(**changes):
    """Arguments of the endpoint `compare`: two steps of tiny-sd in int8."""
    return {"model": "tiny-sd", "recipe": "int8", "api_name": "/compare"} | QUICK | changes


def test_the_compare_endpoint_returns_the_pictures_and_what_was_measured_on_them(client):
    pair, gap, clips, figures, kernels = client.predict(**ask(steps=4))
    before, after = (Image.open(path).convert("RGB") for path in pair)
    assert before.size == after.size == Image.open(gap).size == (64, 64) and clips is None
    assert figures["psnr_db"] == round(float(psnr.per_picture([after], [before])), 2) < 100
    assert Image.open(gap).convert("RGB").tobytes() == drawing.difference(before, after).tobytes()
    assert all(value > 0 for value in figures["ms_per_step"]) and figures["gib"][0] > figures["gib"][1] > 0
    assert figures["perceptual"]["name"] in ("LPIPS", "feature distance")
    assert sum(row[0] for row in kernels["data"]) == 133


def test_a_plan_file_is_applied_and_a_file_that_is_none_is_told(client, tmp_path):
    pipe = tiny.load("tiny-sd")
    dq.quantize(pipe, "int8-weight", progress=False)
    pipe.save_pretrained(tmp_path / "saved")
    ((_, plan),) = models.saved.plans(tmp_path / "saved").values()
    plan.save(tmp_path / "plan.json")
    *_, figures, _ = client.predict(**ask(plan=gradio_client.handle_file(tmp_path / "plan.json")))
    assert figures["recipe"] == "int8-weight"
    (tmp_path / "none.json").write_text("[1, 2]")
    with pytest.raises(gradio_client.exceptions.AppError) as shown:
        client.predict(**ask(plan=gradio_client.handle_file(tmp_path / "none.json")))
    assert "Traceback" not in str(shown.value) and "\n" not in str(shown.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "../secret/theirs"}, "is not known here"),
        ({"model": "nobody/nothing"}, "cannot be fetched from the Hub"),
        ({"recipe": "int9"}, "Did you mean 'int8'?"),
        ({"recipe": "svdquant-int4"}, "run it in the Quantize tab"),
        ({"steps": 1000}, "1000"),
        ({"width": 4096}, "4096"),
        ({"prompt": "x" * 5000}, "1000 characters"),
    ],
)
def test_wrong_requests_are_answered_in_one_line(client, changes, text):
    with pytest.raises(gradio_client.exceptions.AppError) as shown:
        client.predict(**ask(**changes))
    assert text in str(shown.value) and "\n" not in str(shown.value) and "Traceback" not in str(shown.value)


def test_files_outside_of_the_folders_are_not_served(address, places):
    (places["runs"] / "open.txt").write_text("open")
    served = lambda path: httpx.get(f"{address}gradio_api/file={path}")  # noqa: E731
    assert served(places["runs"] / "open.txt").text == "open"
    for path in (places["secret"] / "plan.json", places["runs"] / ".." / "secret" / "plan.json", Path(app.__file__)):
        assert served(path).status_code in (403, 404), path


@pytest.mark.slow
def test_fifty_queued_requests_lose_none(address):
    clients = [gradio_client.Client(address, verbose=False) for _ in range(2)]
    jobs = {seed: clients[seed % 2].submit(**ask(seed=seed, steps=1)) for seed in range(50)}
    found = {seed: job.result(timeout=120) for seed, job in jobs.items()}
    assert [result[3]["seed"] for result in found.values()] == list(range(50))
    pictures = {Image.open(result[0][0]).tobytes() for result in found.values()}
    assert len(pictures) == 50, "every request got the picture of its own seed"
    for each in clients:
        each.close()


def test_a_running_comparison_stops_for_its_own_user(address, client):
    job = client.submit(**ask(steps=100))
    deadline = time.monotonic() + 60
    while job.status().progress_data is None and time.monotonic() < deadline:
        time.sleep(0.05)
    other = gradio_client.Client(address, verbose=False)
    assert other.predict(api_name="/stop_compare") == "nothing was running"
    other.close()
    said = ""
    while not said.startswith("stopping") and time.monotonic() < deadline:
        said = client.predict(api_name="/stop_compare")
    with pytest.raises(gradio_client.exceptions.AppError, match="Stopped"):
        job.result(timeout=60)
    assert client.predict(**ask())[3]["seed"] == 1, "the next one runs"


def test_the_results_endpoint_says_what_the_run_says(client):
    assert client.predict(api_name="/runs") == ["runs/small"]
    pipeline, metric, entry, table, plots, gallery, remarks = client.predict(entry="int4-weight", api_name="/results")
    assert (pipeline["value"], metric["value"], entry["value"]) == ("tiny-pixart", "psnr", "int4-weight")
    rows = {row[0]: row[1:] for row in table["data"]}
    assert rows["int8"][0] == "8.9 MiB (0.33x)" and rows["int8"][-1].startswith("35.6 (34.2 to 37.0")
    assert rows["lost"][0] == "missing" and "recipe 'lost' is unknown" in remarks
    assert plots.count("<svg") == 2
    captions = [item["caption"] for item in gallery]
    assert len(captions) == 10 and captions[0].startswith("a red circle number 11 (seed 0, psnr 26.25")
    assert "lost" not in [value for _, value in entry["choices"]]
    page = Path(client.predict("runs/small", api_name="/report")).read_text("utf-8")
    assert page.lstrip().startswith("<!") and "a red circle number 11" in page
    with pytest.raises(gradio_client.exceptions.AppError, match="is not here, expected one of runs/small"):
        client.predict("../secret", api_name="/results")


@pytest.mark.slow
def test_quantizing_gives_plan_and_report_and_a_recipe_for_compare(client, places):
    asked = {"recipe": "viditq-w8a8", "prompts": "a red circle\na blue star", "samples": 2, "steps": 2, "seed": 0}
    job = client.submit(model="tiny-pixart", **asked, api_name="/quantize")
    words, plan, report, layers = job.result(timeout=300)
    assert "is done" in words and any("loading" in texts[0] for texts in job.outputs()), "progress was shown"
    assert len(dq.Plan.load(plan).layers) == 62 == sum(row[1] != "kept" for row in layers["data"])
    assert '"bytes_after"' in Path(report).read_text("utf-8")
    assert "tiny-pixart-viditq-w8a8-1" in client.predict("tiny-pixart", api_name="/recipes")
    assert "tiny-pixart-viditq-w8a8-1" not in client.predict("tiny-sd", api_name="/recipes")
    figures = client.predict(**ask(model="tiny-pixart", recipe="tiny-pixart-viditq-w8a8-1"))[3]
    assert figures["recipe"] == "viditq-w8a8" and figures["share"] < 0.3


@pytest.mark.slow
def test_a_budget_of_bits_mixes_formats_and_is_kept(client):
    asked = {"recipe": "int8-weight", "bits": 5, "prompts": "a red circle", "samples": 2, "steps": 2, "seed": 0}
    words, plan, _, _ = client.predict(model="tiny-pixart", **asked, api_name="/quantize")
    assert "tiny-pixart-int8-weight-5-bits-1" in words and "5 bits per weight: predicted" in words
    assert len({str(layer.weight) for layer in dq.Plan.load(plan).layers.values()}) > 2
    assert "tiny-pixart-int8-weight-5-bits-1" in client.predict("tiny-pixart", api_name="/recipes")
    with pytest.raises(
        gradio_client.exceptions.AppError, match="bits per weight is 1, expected a number from 2 to 16"
    ):
        client.predict(model="tiny-pixart", **(asked | {"bits": 1}), api_name="/quantize")


@pytest.mark.slow
def test_a_job_that_is_stopped_ends_and_leaves_nothing(client, places, jobs):
    before = set(places["made"].iterdir())
    asked = {"recipe": "gptq-int4-weight", "prompts": "", "samples": 500, "steps": 50, "seed": 0}
    job = client.submit(model="tiny-sd", **asked, api_name="/quantize")
    deadline = time.monotonic() + 90
    while not any("calibrate" in texts[0] for texts in job.outputs()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert client.predict(api_name="/stop_quantize") == "stopping 1"
    with pytest.raises(gradio_client.exceptions.AppError, match="Stopped"):
        job.result(timeout=60)
    assert jobs[0].process.wait(60) < 0, "a signal ended it"
    assert set(places["made"].iterdir()) == before


def test_a_video_pipeline_gives_clips_of_every_frame(client):
    pair, _, clips, figures, _ = client.predict(**ask(model="film", recipe="int8-weight", **FILM))
    assert [clip["label"] for clip in clips["clips"]] == ["original", "quantized", "difference x8"]
    assert {len(clip["frames"]) for clip in clips["clips"]} == {9} == {figures["frames"]}
    assert Image.open(pair[0]).size == (32, 32) and all(value > 0 for value in figures["ms_per_step"])


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory, downloads):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, REBOUND, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a user does and sees in one tab of the browser."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.all("#compare-go"))

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        """The first such element, as soon as it can be used: parts of a page come and fold open late."""
        return self.wait(lambda: next((found for found in self.all(selector) if found.is_displayed()), None))

    def named(self, selector, name):
        """The first such element with this text."""
        return self.wait(lambda: next((found for found in self.all(selector) if found.text.startswith(name)), None))

    def text(self, selector="body"):
        return " ".join(found.text for found in self.all(selector))

    def run(self, script):
        return self.driver.execute_script(script)

    def wait(self, ready, seconds=60):
        again = [StaleElementReferenceException]  # the page drew a part anew between its being found and read
        return WebDriverWait(self.driver, seconds, 0.1, again).until(lambda _: ready())

    def type(self, selector, text):
        """Replace what a field holds."""
        field = self.one(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def choose(self, selector, name):
        """Type a name into a list and take it."""
        field = self.one(f"{selector} input")
        self.type(f"{selector} input", name)
        time.sleep(0.3)  # the list is filtered
        field.send_keys(Keys.ENTER)
        self.wait(lambda: field.get_attribute("value") == name)

    def press(self, selector):
        button = self.one(selector)
        self.run("window.scrollTo(0, 0)")
        button.click()

    def open(self, tab):
        self.named("button[role=tab]", tab).click()

    def shown(self, selector):
        """Sizes of the pictures that have arrived there."""
        script = f"return [...document.querySelectorAll('{selector}')].map(x => [x.naturalWidth, x.naturalHeight])"
        return [tuple(size) for size in self.run(script) if size[0]]

    def keep(self, name):
        """A screenshot of the whole page."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        time.sleep(0.6)  # what slides in has arrived
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))


@needs_chromium
def test_compare_in_a_browser(browser, address):
    page = Page(browser, address)
    page.type("#compare-prompt textarea", "a big yellow ring left of a green star")
    page.press("#compare-go")
    page.wait(lambda: len(page.shown("#pair img")) == 2 and page.all(".tile"))
    assert page.shown("#pair img") == [(64, 64)] * 2 and page.wait(lambda: page.shown("#difference img")) == [(64, 64)]
    figures = page.text(".tiles")
    assert re.search(r"[\d.]+ dB PSNR", " ".join(figures.split())) and "ms per step" in figures and "GiB" in figures
    assert re.search("LPIPS|feature distance", figures) and "int8/channel" in page.text("#kernels")
    hosts = "return performance.getEntriesByType('resource').map(x => new URL(x.name).host)"
    assert set(page.run(hosts)) == {address.split("/")[2]}, "nothing comes from elsewhere"
    page.keep("compare")


@needs_chromium
def test_a_name_that_was_made_to_point_here_shows_a_refusal_and_no_page(browser, address):
    browser.get(f"http://evil.example:{address.split(':')[2]}")
    shown = browser.find_element(By.TAG_NAME, "body").text
    assert "does not go by 'evil.example:" in shown and not browser.find_elements(By.CSS_SELECTOR, "gradio-app")
    script = "fetch(arguments[0], {mode: 'no-cors'}).then(() => arguments[1]('sent'), () => arguments[1]('kept away'))"
    assert browser.execute_async_script(script, f"{address}config") == "kept away"


@needs_chromium
def test_a_user_with_too_many_requests_is_told_so_in_the_page(browser, address, monkeypatch):
    page = Page(browser, address)
    monkeypatch.setattr(waiting, "MOST_OF_SESSION", 0)
    page.press("#compare-go")
    page.wait(lambda: "You have 0 requests waiting, the most there may be." in page.text())
    page.keep("limit")
    monkeypatch.undo()
    page.press("#compare-go")
    page.wait(lambda: len(page.shown("#pair img")) == 2)


@needs_chromium
def test_both_tabs_have_their_buttons_alike(browser, address):
    page = Page(browser, address)
    for tab in ("Compare", "Quantize"):
        page.open(tab)
        go, stop = (page.one(f"#{tab.lower()}-{name}") for name in ("go", "stop"))
        assert all(abs(go.rect[key] - stop.rect[key]) < 1 for key in ("y", "width", "height")), tab
    page.keep("quantize-tab")


@needs_chromium
def test_a_bad_model_id_shows_text_and_the_page_goes_on(browser, address):
    page = Page(browser, address)
    page.choose("#compare-model", "../secret/theirs")
    page.press("#compare-go")
    page.wait(lambda: "is not known here" in page.text())
    assert "Traceback" not in page.text() and "DQError" not in page.text()
    page.keep("error")
    page.choose("#compare-model", "tiny-sd")
    page.press("#compare-go")
    page.wait(lambda: len(page.shown("#pair img")) == 2)


@needs_chromium
def test_two_users_at_once_each_see_their_own(browser, address):
    first = browser.current_window_handle
    users = {}
    for seed in (11, 12):
        browser.switch_to.new_window("tab")
        users[browser.current_window_handle] = seed
        page = Page(browser, address)
        page.type("#compare-prompt textarea", "a red circle")
        page.type("input[aria-label='Seed']", str(seed))
        page.type("input[aria-label='Steps']", "2")
        page.press("#compare-go")
    pictures = set()
    for window, seed in users.items():
        browser.switch_to.window(window)
        page.wait(lambda seed=seed: f"seed {seed}" in page.text(".what"))
        page.wait(lambda: len(page.shown("#pair img")) == 2)
        pictures.add(page.one("#pair img").get_attribute("src"))
        browser.close()
    browser.switch_to.window(first)
    assert len(pictures) == 2


@needs_chromium
def test_clips_keep_to_one_clock(browser, address):
    page = Page(browser, address)
    page.choose("#compare-model", "film")
    page.choose("#compare-recipe", "int4-weight")
    for label, value in {"Steps": 2, "Width": 32, "Height": 32, "Frames": 9}.items():
        if label == "Width":
            page.named("button.label-wrap", "Size").click()
        page.type(f"input[aria-label='{label}']", str(value))
    page.press("#compare-go")
    page.wait(lambda: len(page.shown("#clips img")) == 3)
    page.keep("video")
    sources = "[...document.querySelectorAll('#clips img')].map(x => x.src).slice(0, 2).join(' ')"
    playing = {page.run(f"return {sources}") for _ in range(60) if not time.sleep(0.02)}
    at = "const at = document.querySelector('#clips .at'); at.value = {}; "
    at += "at.dispatchEvent(new Event('input', {{bubbles: true}})); return "
    paused = [page.run(at.format(number) + sources) for number in range(9)]
    assert len(set(paused)) == 9 and len(playing) > 2, "every frame is there, and it moves"
    assert playing <= set(paused), "both clips always show the same frame"


@needs_chromium
def test_results_in_a_browser(browser, address):
    page = Page(browser, address)
    page.open("Results")
    page.wait(lambda: "int4-weight" in page.text("#results") and len(page.all("#plots svg")) == 2)
    assert page.wait(lambda: len(page.shown("#worst img")) == 10) and "a red circle number 11" in page.text("#worst")
    page.keep("results")


@needs_chromium
@pytest.mark.slow
def test_quantize_in_a_browser(browser, address, downloads):
    page = Page(browser, address)
    page.open("Quantize")
    page.press("#quantize-go")
    page.wait(lambda: page.all(".job .track"))
    page.press("#quantize-stop")
    page.wait(lambda: "Stopped." in page.text("#progress"))
    page.choose("#quantize-recipe", "int8-weight")
    page.press("#quantize-go")
    page.wait(lambda: "is done" in page.text("#progress"), 120)
    assert "int8/channel" in page.text("#layers")
    for name in ("Plan (JSON)", "Report (JSON)"):
        page.named("button", name).click()
    page.wait(lambda: {"plan.json", "report.json"} <= {path.name for path in downloads.iterdir()})
    assert len(dq.Plan.load(downloads / "plan.json").layers) == 62
    page.keep("quantize")


@needs_chromium
def test_the_page_fits_a_phone(browser, address):
    before = browser.get_window_size()
    browser.set_window_size(500, 1000)
    page = Page(browser, address)
    page.keep("phone")
    wide = page.run("return document.documentElement.scrollWidth - innerWidth")
    browser.set_window_size(before["width"], before["height"])
    assert wide <= 0


@needs_chromium
@pytest.mark.slow
def test_leaving_the_page_ends_its_job(browser, address, jobs):
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    page = Page(browser, address)
    page.open("Quantize")
    page.press("#quantize-go")
    page.wait(lambda: page.all(".job .track"))
    assert jobs[0].process.poll() is None
    browser.close()
    browser.switch_to.window(first)
    assert jobs[0].process.wait(60) < 0, "a signal ended it"
