"""The served page over raw HTTP: what a hostile client may send, and what the server keeps."""

import gc
import http.client
import json
import socket
import threading
import time
import urllib.parse

import pytest
from helpers.files import encoded, png
from helpers.models import tiny_gpt, tiny_tokenizer
from helpers.processes import served

from flextok.pipeline import remember_tokenizer

pytest.importorskip("starlette", reason="needs pip install 'flextok[demo]'")
MAX_QUEUE = 2


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    from flextok.demo.page import make_app
    from flextok.demo.studio import Studio
    from flextok.demo.upload import Limits

    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(decode={"num_steps": 1, "guidance_scale": 1.0})
    tokenizer.save_pretrained(folder / "tokenizer")
    gpt = tiny_gpt(conditioner={"name": "class", "num_classes": 3})
    gpt.metadata["class_names"] = ["cats", "dogs", "hens"]
    remember_tokenizer(gpt, folder / "gpt", tokenizer, str(folder / "tokenizer"))
    gpt.save_pretrained(folder / "gpt")
    studio = Studio([str(folder / "tokenizer"), str(folder / "gpt")])
    return make_app(studio, Limits(), MAX_QUEUE)


@pytest.fixture(scope="module")
def server(app):
    with served(app) as address:
        yield urllib.parse.urlsplit(address).netloc


def ask(server, path, message=None, **headers):
    """A request's status and answer."""
    connection = http.client.HTTPConnection(server, timeout=60)
    method = "GET" if message is None else "POST"
    body = message if isinstance(message, bytes | None) else json.dumps(message)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


GOOD = {"source": 1, "value": "dogs"}


def draw(server, **asked):
    status, text = ask(server, "/draw", {**GOOD, **asked})
    return status, [json.loads(line) for line in text.splitlines()] if status == 200 else text


def test_a_class_grows_over_plain_requests(server):
    status, answer = draw(server)
    assert status == 200
    assert len(answer[-1]["frames"]) == 5
    assert [len(part["indices"]) for part in answer if "indices" in part] == list(range(1, 9))
    status, text = draw(server, value="unicorns")
    assert (status, text.startswith("unknown class 'unicorns'")) == (400, True)


def test_the_files_of_the_page_are_served_and_nothing_else(server):
    for path in ("/", "/page.css", "/page.js", "/models.json"):
        assert ask(server, path)[0] == 200
    for path in (
        "/page.py",
        "/etc/passwd",
        "/../page.py",
        "/%2e%2e/page.py",
        "//etc/passwd",
        "/file=/etc/passwd",
        "/upload",
        "/docs",
    ):
        assert ask(server, path)[0] == 404
    assert ask(server, "/draw")[0] == 405
    assert ask(server, "/page.js", b"x")[0] == 405


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "http://127.0.0.1:9/x"])
@pytest.mark.parametrize("wrap", [lambda ref: ref, lambda ref: [ref], lambda ref: {"a": [ref]}])
def test_no_value_names_a_file_or_an_address(server, path, wrap):
    """The page that this one replaced copied a file that was named as a class, or fetched an
    address; /dev/zero never ended."""
    for key in ("source", "value", "seed", "decoding", "sampling", "task", "budget", "path"):
        for source in (0, 1):
            status, text = draw(
                server, **{"source": source, key: wrap({"path": path, "url": path})}
            )
            assert status == 400
            assert "root:" not in text
            assert draw(server, **{"source": source, key: path})[0] == 400
            edit = {"source": source, "task": "edit"}
            for kept in (path, wrap(path), wrap({"path": path})):
                assert draw(server, **edit, kept=kept)[0] == 400


@pytest.mark.parametrize(
    "message",
    [
        *(b"", b"null", b"[]", b"3", b'"x"', b"{", b"[" * 100_000, b"\xff\xfe", b"NaN"),
        *({}, {"source": 1}, {"value": "dogs"}, {**GOOD, "source": 10**30}),
        *({**GOOD, "seed": seed} for seed in (None, "x", 1.5, -1, 2**31, [], True)),
        *({**GOOD, "decoding": options} for options in (None, [], {"num_steps": 10**9}, {"": 1})),
    ],
)
def test_wrong_requests_are_the_clients_mistake(server, message):
    status, text = ask(server, "/draw", message)
    assert status == 400
    assert 0 < len(text) <= 500


def test_only_this_machines_names_are_served(server):
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert ask(server, "/", **headers)[0] == 403
        assert ask(server, "/draw", GOOD, **headers)[0] == 403
    assert ask(server, "/draw", GOOD, Origin=f"http://{server}")[0] == 200


def test_too_large_a_request_is_refused_before_it_is_read(server):
    length = f"Content-Length: {100 * 2**20}"
    with socket.create_connection(server.split(":"), timeout=60) as connection:
        connection.sendall(f"POST /draw HTTP/1.1\r\nHost: {server}\r\n{length}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(100)


@pytest.fixture
def slow(app, monkeypatch):
    """Requests whose work waits for the event: what they were, and how many parts were made."""
    from flextok.demo.page import Draw

    (endpoint,) = (route.app for route in app.app.routes if isinstance(route.app, Draw))
    go, made = threading.Event(), []

    def work(asked, limits):
        for _ in range(50):
            go.wait(60)
            made.append(asked.value)
            yield {"note": "x"}

    monkeypatch.setattr(endpoint.studio, "draw", work)
    yield go, made
    go.set()
    wait_for(lambda: endpoint.requests == 0)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(server, value):
    """Send a request and do not wait for its answer."""
    connection = http.client.HTTPConnection(server, timeout=60)
    connection.request("POST", "/draw", json.dumps({**GOOD, "value": value}))
    return connection


def test_requests_take_turns_and_more_than_may_wait_are_turned_away(server, slow):
    """A long request of one client held up all others, and each of many was kept."""
    go, made = slow
    waiting = [start(server, name) for name in "abc"]  # one works, MAX_QUEUE wait
    wait_for(lambda: draw(server, value="d")[0] == 503)
    go.set()
    for connection in waiting:
        answer = connection.getresponse()
        assert (answer.status, len(answer.read().splitlines())) == (200, 50)
    assert sorted(made) == ["a"] * 50 + ["b"] * 50 + ["c"] * 50
    assert len(set(made[:30])) == 3


def test_work_ends_when_its_client_leaves(server, slow):
    go, made = slow
    connection = start(server, "left")
    time.sleep(0.2)
    connection.close()
    time.sleep(0.2)
    go.set()
    assert draw(server, value="next")[0] == 200
    assert made.count("left") < 50
    assert made.count("next") == 50


def test_no_request_is_kept(server):
    """The session of an earlier page kept what was sent, up to 10 MB of text."""
    from flextok.demo.source import Asked

    assert draw(server, source=0, value=encoded(png(60, 40)))[0] == 200

    def none_is_kept():
        gc.collect()
        return not [one for one in gc.get_objects() if type(one) is Asked]

    wait_for(none_is_kept)
