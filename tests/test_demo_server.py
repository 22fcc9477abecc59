"""The served page over raw HTTP: what a hostile client may send, and what the server keeps."""

import http.client
import json
import time
import urllib.parse

import pytest
from helpers.files import encoded, png
from helpers.models import tiny_gpt, tiny_tokenizer
from helpers.processes import served

from flextok.pipeline import remember_tokenizer

pytest.importorskip("gradio", reason="needs pip install 'flextok[demo]'")


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
    return make_app(Studio([str(folder / "tokenizer"), str(folder / "gpt")]), Limits())


@pytest.fixture(scope="module")
def server(app):
    with served(app) as address:
        yield urllib.parse.urlsplit(address).netloc


def ask(server, path, message=None, **headers):
    """A request's status and answer."""
    connection = http.client.HTTPConnection(server, timeout=60)
    body = None if message is None else json.dumps(message)
    kind = {} if message is None else {"content-type": "application/json"}
    connection.request("GET" if message is None else "POST", path, body, {**kind, **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def function_of(server, name):
    """The number of a function of the page, and what it is sent by default."""
    config = json.loads(ask(server, "/config")[1])
    values = {c["id"]: c["props"].get("value") for c in config["components"]}
    (found,) = (d for d in config["dependencies"] if d["api_name"] == name)
    return found["id"], [values[i] for i in found["inputs"]]


def click(server, session, name, **values):
    """Call a function of the page, its first value replaced: the request's answer."""
    number, data = function_of(server, name)
    data[: len(values)] = values.values()
    message = {"fn_index": number, "data": data, "session_hash": session}
    return ask(server, "/gradio_api/queue/join", message)


def events(server, session):
    """What the page would read after its clicks."""
    text = ask(server, f"/gradio_api/queue/data?session_hash={session}")[1]
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def test_a_class_grows_over_plain_requests(server):
    assert click(server, "good", "grow", condition=1)[0] == 200
    done = [e for e in events(server, "good") if e["msg"] == "process_completed"]
    assert done[0]["success"]
    assert click(server, "bad", "grow", condition="unicorns")[0] == 200
    done = [e for e in events(server, "bad") if e["msg"] == "process_completed"]
    assert "unicorns is not in the list" in done[0]["output"]["error"]


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "http://127.0.0.1:9/x"])
@pytest.mark.parametrize("wrap", [lambda ref: ref, lambda ref: [ref], lambda ref: {"a": [ref]}])
def test_no_value_names_a_file_or_an_address(server, monkeypatch, path, wrap):
    """Sent as the class, a reference made Gradio copy that file, or fetch that address; /dev/zero
    never ended."""
    fetched = []
    monkeypatch.setattr("gradio.processing_utils.ssrf_protected_download", fetched.append)
    reference = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    for name in ("grow", "show", "take"):
        status, text = click(server, "files", name, condition=wrap(reference))
        assert status == 400
        assert path not in text
    assert ask(server, "/config")[0] == 200
    assert not fetched


def test_wrong_requests_are_the_clients_mistake(server):
    good = {"fn_index": 0, "data": [], "session_hash": "s"}
    wrong = [
        {"fn_index": 10**6},
        {"fn_index": None},
        {"data": 5},
        {"data": {"path": "/etc/passwd"}},
    ]
    wrong += [{"session_hash": session} for session in (3, None, "../x", "x" * 65)]
    for change in wrong:
        assert ask(server, "/gradio_api/queue/join", {**good, **change})[0] in (400, 422)
    for message in ([], None, {}, "[" * 150):
        assert ask(server, "/gradio_api/queue/join", message)[0] in (400, 405, 422)
    assert ask(server, "/gradio_api/queue/data")[0] == 422
    assert ask(server, "/gradio_api/cancel", {"session_hash": []})[0] == 422


def test_what_a_message_states_beside_changes_nothing(server):
    reference = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    beside = {"event_data": reference, "batched": True, "simple_format": True, "event_id": "mine"}
    number, data = function_of(server, "grow")
    asked = {"fn_index": number, "data": data, "trigger_id": 10**9, "oauth_token": "x", **beside}
    assert ask(server, "/gradio_api/queue/join", {**asked, "session_hash": "beside"})[0] == 200
    text = json.dumps(events(server, "beside"))
    assert '"success": true' in text
    assert "passwd" not in text
    assert "root:" not in text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (1, 9, "greater than maximum value 8"),  # tokens
        (3, -1, "less than minimum value 0"),  # the seed
        (6, 10**9, "greater than maximum value 100"),  # the decoder's steps
        (4, 11, "greater than maximum value 10"),  # guidance
    ],
)
def test_numbers_out_of_range_get_a_message(server, field, value, message):
    number, data = function_of(server, "grow")
    data[field] = value
    session = f"range{field}"
    asked = {"fn_index": number, "data": data, "session_hash": session}
    assert ask(server, "/gradio_api/queue/join", asked)[0] == 200
    (done,) = (e for e in events(server, session) if e["msg"] == "process_completed")
    assert not done["success"]
    assert message in done["output"]["error"]


def test_only_this_machines_names_are_served(server):
    number, data = function_of(server, "grow")
    message = {"fn_index": number, "data": data, "session_hash": "rebound"}
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert ask(server, "/config", **headers)[0] == 403
        assert ask(server, "/gradio_api/queue/join", message, **headers)[0] == 403


def test_an_upload_is_not_kept(app, server):
    """The session kept what was sent, up to 10 MB of text, for as long as it lived."""
    upload = encoded(png(60, 40))
    assert click(server, "upload", "take", data=upload)[0] == 200
    done = [e for e in events(server, "upload") if e["msg"] == "process_completed"]
    assert done[0]["success"]
    session = holder(app).session_data["upload"]
    kept = [repr(component) for component in session.components]
    assert any("ft-drop" in text for text in kept)
    assert not [text for text in kept if upload[40:400] in text]


def test_answers_that_nobody_reads_are_bounded(app, server, monkeypatch):
    """Each click of a client that never reads was kept whole, in any number of sessions."""
    from flextok.demo import messages as kept

    queue = holder(app).blocks._queue
    monkeypatch.setattr(kept, "MAX_UNREAD", limit := 100_000)
    for number in range(12):
        click(server, f"greedy{number}", "grow", condition=0)
    deadline = time.monotonic() + 60
    while any(queue.active_jobs) or len(queue):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    unread = sum(
        kept.size(message)
        for waiting in queue.pending_messages_per_session.values()
        for message in waiting._queue
    )
    assert limit / 3 < unread <= limit
    sessions = [n for n in queue.pending_messages_per_session if n.startswith("greedy")]
    assert 0 < len(sessions) < 12  # the largest went first, whose work ended
    assert click(server, "reader", "grow", condition=0)[0] == 200
    (done,) = (e for e in events(server, "reader") if e["msg"] == "process_completed")
    assert done["success"]
    assert holder(app).capacity == kept.MAX_SESSIONS


def holder(app):
    """Gradio's store of sessions, of the application behind the guard."""
    (gradio,) = (r.app for r in app.app.routes if hasattr(getattr(r, "app", None), "state_holder"))
    return gradio.state_holder
