"""The demo among strangers: whose requests are answered, how much one may ask at once, how long work may take."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers

import app
import dq
from demo import compare, guard, models, sessions, waiting
from dq.errors import DQError
from dq.host import mark
from pipelines import tiny
from tests.lines import told_by

ROOT = Path(__file__).resolve().parents[2]
ASKED = {"Pipeline": "tiny-sd", "Recipe": "int8", "Plan (JSON)": None, "Prompt": "a red circle", "Negative prompt": ""}
ASKED |= {"Seed": 1, "Steps": 1, "Guidance": 3.0, "Width": 64, "Height": 64, "Frames": 0}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    made = app.build([], [tmp_path_factory.mktemp("runs")], tmp_path_factory.mktemp("made"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(page, tmp_path_factory):
    return app.launch(page, [], wait=False, names=["demo.example"])


def refused(guarded, host, server=("127.0.0.1", 7860), **more):
    given = [(b"host", host.encode())] * (host is not None)
    given += [(name.replace("_", "-").encode(), value.encode()) for name, value in more.items()]
    return guarded.refusal(Headers(raw=given), server) is not None


OWN = ["localhost:7860", "LocalHost:7860", "localhost.", "127.0.0.1:7860", "127.0.0.1", "[::1]:7860"]
FOREIGN = [
    "evil.example",
    "evil.example:7860",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1@evil.example",
]
FOREIGN += ["", "evil.example#localhost", "localhost:7860:evil", "0.0.0.0:7860", "192.168.0.1:7860", "127.0.0.1 evil"]


def test_only_its_own_and_loopback_names_are_answered():
    mine = guard.Guard(None, "127.0.0.1")
    assert not any(refused(mine, host) for host in OWN)
    assert all(refused(mine, host) for host in FOREIGN)
    assert refused(mine, "evil.example", server=("evil.example", 80)), "not started on every address"


def test_a_server_on_every_address_answers_to_the_one_it_was_reached_at_and_to_allowed_names():
    mine = guard.Guard(None, "0.0.0.0", ["Demo.example"])
    reached = {"server": ("192.168.0.7", 7860)}
    for host in (*OWN, "192.168.0.7:7860", "demo.example", "0.0.0.0:7860"):
        assert not refused(mine, host, **reached), host
    assert refused(mine, "192.168.0.8:7860", **reached) and refused(mine, "evil.example:7860", **reached)
    assert not refused(mine, "[fe80::1]:7860", server=("fe80::1", 7860))
    assert not refused(guard.Guard(None, "box.local"), "box.local:7860")


@pytest.mark.parametrize(
    ("origin", "answered"),
    [
        ("http://localhost:7860", True),
        ("http://127.0.0.1:7860", True),
        ("https://demo.example", True),  # a proxy speaks for it, on another port
        ("http://localhost:3000", False),
        ("http://localhost", False),
        ("http://evil.example:7860", False),
        ("http://localhost:7860.evil.example", False),
        ("null", False),
        ("file://", False),
    ],
)
def test_a_page_of_another_origin_is_not_answered(origin, answered):
    mine = guard.Guard(None, "127.0.0.1", ["demo.example"])
    assert refused(mine, "localhost:7860", origin=origin) is not answered


def test_forwarded_names_are_held_to_the_same():
    mine = guard.Guard(None, "127.0.0.1", ["demo.example"])
    assert refused(mine, "localhost:7860", x_forwarded_host="evil.example")
    assert refused(mine, "localhost:7860", x_gradio_server="http://evil.example/")
    assert not refused(mine, "localhost:7860", x_forwarded_host="demo.example, localhost:7860")


PLACES = ["", "config", "gradio_api/info", "gradio_api/queue/data?session_hash=a", "gradio_api/heartbeat/a"]
PLACES += ["gradio_api/file=x", "theme.css", "gradio_api/queue/status", "gradio_api/startup-events"]


def test_every_place_of_the_server_is_behind_the_guard(address):
    """Streams and uploads too, and what gradio's own middleware answers without asking the page."""
    posts = [
        f"gradio_api/{place}" for place in ("queue/join", "upload", "run/stop_compare", "cancel", "component_server")
    ]
    evil = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for headers in ({"Host": "evil.example"}, evil):
        for method, places in (("GET", PLACES), ("POST", posts), ("OPTIONS", posts)):
            for place in places:
                found = httpx.request(method, address + place, headers=headers)
                assert found.status_code == 403 and "\n" not in found.text.strip(), (method, place)
                assert not [name for name in found.headers if name.startswith("access-control")], (method, place)
    for name in ("localhost", "demo.example"):
        found = httpx.get(address + "config", headers={"Host": f"{name}:{address.split(':')[2].strip('/')}"})
        assert found.status_code == 200 and "evil" not in found.text


def test_a_websocket_of_a_stranger_is_closed():
    import asyncio

    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/", "headers": [(b"host", b"evil.example")], "server": ("127.0.0.1", 1)}
    asyncio.run(guard.Guard(None, "127.0.0.1")(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def chunks(size):
    for _ in range(size // 10_000):
        yield b"x" * 10_000


def test_large_requests_are_refused_whether_they_say_so_or_not(address):
    for content in (b"x" * (guard.BODY + 1), chunks(guard.BODY + 20_000)):
        found = httpx.post(f"{address}gradio_api/queue/join", content=content)
        assert found.status_code == 413 and "2048 KiB" in found.text
    large = {"files": ("a.json", b"x" * (9 * 2**20))}
    assert httpx.post(f"{address}gradio_api/upload", files=large).status_code == 413
    fits = {"files": ("a.json", b"x" * (7 * 2**20))}
    assert httpx.post(f"{address}gradio_api/upload", files=fits).status_code == 200


def join(page, address, session, client=None, **changes):
    """Ask for a comparison, as a browser does, without waiting for it."""
    (fn,) = [fn for fn in page.fns.values() if fn.api_name == "compare"]
    data = [(ASKED | changes)[block.label] for block in fn.inputs]
    asked = {"data": data, "fn_index": fn._id, "session_hash": session}
    return (client or httpx).post(f"{address}gradio_api/queue/join", json=asked)


@pytest.fixture
def drawn(page, monkeypatch):
    """Seeds in the order in which they are drawn, after the event is set."""
    order, go = [], threading.Event()

    def draw(shelf, chosen, wish, stop, tell):
        go.wait(30)
        order.append(wish.seed)
        raise DQError("drawn")

    monkeypatch.setattr(compare, "compare", draw)
    yield order, go
    go.set()
    emptied(page)


def emptied(page, seconds=30):
    until = time.monotonic() + seconds
    while (len(page._queue) or any(page._queue.active_jobs)) and time.monotonic() < until:
        time.sleep(0.02)


def new():
    return uuid.uuid4().hex


def test_one_user_keeps_no_other_waiting_for_more_than_a_turn(page, address, drawn):
    order, go = drawn
    busy, second, third = new(), new(), new()
    for seed in range(20):
        assert join(page, address, busy, Seed=seed).status_code == 200
    assert join(page, address, second, Seed=100).status_code == 200
    assert join(page, address, third, Seed=200).status_code == 200
    assert join(page, address, third, Seed=201).status_code == 200
    go.set()
    emptied(page)
    assert sorted(order) == [*range(20), 100, 200, 201], "none is lost"
    assert [seed for seed in order if seed < 100] == list(range(20)), "of one user first come, first served"
    assert order.index(100) <= 2 and order.index(200) <= 3 and order.index(201) <= 6, order


def test_many_sessions_of_one_address_share_its_turns(page, address, drawn):
    order, go = drawn
    for seed in range(10):
        assert join(page, address, new(), Seed=seed).status_code == 200
    elsewhere = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"))
    for seed in (100, 101):
        assert join(page, address, new(), elsewhere, Seed=seed).status_code == 200
    go.set()
    emptied(page)
    assert order.index(100) <= 2 and order.index(101) <= 4, order


def test_what_one_user_and_one_address_may_have_waiting_is_bounded_and_said_in_one_line(page, address, drawn):
    _, go = drawn
    mine = new()
    assert join(page, address, new()).status_code == 200  # runs, and does not wait
    time.sleep(0.2)
    found = [join(page, address, mine) for _ in range(100)]
    assert [answer.status_code for answer in found].count(200) == waiting.MOST_OF_SESSION
    assert found[-1].json()["detail"].startswith(f"You have {waiting.MOST_OF_SESSION} requests waiting")
    rest = [join(page, address, new()) for _ in range(30)]
    assert [answer.status_code for answer in rest].count(200) == waiting.MOST_OF_ADDRESS - waiting.MOST_OF_SESSION
    assert "Your address has" in rest[-1].json()["detail"] and "\n" not in rest[-1].json()["detail"]
    elsewhere = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"))
    assert join(page, address, new(), elsewhere).status_code == 200
    go.set()


def test_there_is_no_way_past_the_queue(page, address):
    assert httpx.post(f"{address}gradio_api/run/compare", json={"data": list(ASKED.values())}).status_code == 404


def answer(page, address, **changes):
    """What a request is told in the end."""
    session = new()
    assert join(page, address, session, **changes).status_code == 200
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash={session}", timeout=30) as stream:
        for line in stream.iter_lines():
            if "process_completed" in line:
                return re.search(r'"error": ?("(?:[^"\\]|\\.)*"|null)', line)[1]
    return None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Steps": "many"}, "Steps: got a str, expected a number"),
        ({"Seed": [1]}, "Seed: got a list, expected a number"),
        ({"Seed": True}, "Seed: got a bool, expected a number"),
        ({"Seed": 2**70}, "is greater than maximum value"),
        ({"Pipeline": ["a"]}, "is not known here"),
        ({"Prompt": ["x" * 2000]}, "at most 1000 characters"),
        (
            {"Plan (JSON)": {"path": "http://127.0.0.1:9/plan.json", "meta": {"_type": "gradio.FileData"}}},
            "expected an uploaded file",
        ),
        (
            {"Prompt": {"path": "http://127.0.0.1:9/plan.json", "meta": {"_type": "gradio.FileData"}}},
            "expected an uploaded file",
        ),
    ],
)
def test_values_of_a_wrong_type_and_addresses_are_told_in_one_line(page, address, changes, said):
    assert said in answer(page, address, **changes)


def test_work_ends_when_its_time_is_over():
    found = sessions.Sessions(minutes=0.001)
    with pytest.raises(DQError, match=re.escape("took longer than the 0.001 minutes")), found.working(None) as stop:
        assert stop.wait(10)
        raise sessions.Stopped
    with pytest.raises(sessions.Stopped), sessions.Sessions().working(None) as stop:
        raise sessions.Stopped
    assert not found._stops


def test_a_plan_that_does_not_fit_is_refused_while_another_uses_the_model(tmp_path):
    shelf = models.Shelf([], tmp_path)
    with shelf.borrow("tiny-sd") as model:
        pipe = tiny.load("tiny-sd")
        dq.quantize(pipe, "int8-weight", progress=False)
        name, layer = next(iter(mark.plan_of(pipe.unet).layers.items()))
        broken = dq.Plan({f"{name}.no": layer})
        assert model.lock.locked()
        with pytest.raises(DQError, match="is not in"), shelf.borrow("tiny-sd", broken):
            pass


def test_a_result_that_takes_the_name_of_another_is_loaded_anew(tmp_path):
    shelf = models.Shelf([], tmp_path)
    for recipe in ("int8-weight", "int4-weight"):
        pipe = tiny.load("tiny-sd")
        dq.quantize(pipe, recipe, progress=False)
        pipe.save_pretrained(tmp_path / "result-1")
        with shelf.borrow("tiny-sd") as model:
            assert dq.explain(shelf.form(model, "result-1")).recipe == recipe


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--foo"], "No such option: --foo"),
        (["--port", "x"], "Invalid value for '--port'"),
        (["--port", "99999"], "65535"),
        (["--most", "0"], "Invalid value for '--most'"),
        (["--models", "nowhere"], "does not exist"),
        (["--host", "nowhere.invalid"], "cannot listen on 'nowhere.invalid'"),
        (["more"], "unexpected extra argument"),
    ],
)
def test_wrong_options_are_one_line_and_code_2_without_importing_gradio(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app.py", *words])
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == 2 and said in told_by("app", capsys.readouterr().err)


def test_a_port_that_is_taken_is_one_line_and_code_2(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(sys, "argv", ["app.py", "--port", str(taken.getsockname()[1])])
        with pytest.raises(SystemExit) as left:
            app.main()
    assert left.value.code == 2 and "cannot listen on '127.0.0.1'" in told_by("app", capsys.readouterr().err)


def test_options_are_read_before_anything_heavy_is_imported():
    code = "import sys, app; sys.argv = ['app.py', '--foo']\ntry: app.main()\nexcept SystemExit as left: "
    code += "print(left.code, *sorted({'torch', 'gradio', 'diffusers', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["2"]
