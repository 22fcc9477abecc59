"""The page's parts without a browser: what is refused, and what the studio makes."""

import asyncio
import io
import json
import sys

import pytest
import torch
from conftest import TITOK, bomb, encoded, png, tiny_gpt, tiny_tokenizer
from PIL import Image

from flextok.cli import main
from flextok.demo.guard import Guard
from flextok.demo.markup import figure
from flextok.demo.studio import Settings, Studio
from flextok.demo.upload import Limits, read_picture
from flextok.pipeline import generate_images, load_model, remember_tokenizer
from flextok.tokenizers import TiTok, TiTokConfig

LIMITS = Limits(max_bytes=2**16, max_pixels=10_000)


def test_a_good_picture_comes_through():
    picture = read_picture(encoded(png(), "nonsense/type"), LIMITS)
    assert (picture.size, picture.mode) == ((20, 10), "RGB")
    assert picture.tobytes() == Image.open(io.BytesIO(png())).tobytes()


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (encoded(b"I am a text."), "is no picture that this page reads"),
        (encoded(b"<svg><script>alert(1)</script></svg>", "image/svg+xml"), "is no picture"),
        (encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is no picture"),
        (encoded(bomb(200)), "200 x 200 pixels is too large: at most 0.01 million"),
        (encoded(bomb(50_000)), "too large: at most 0.01 million pixels"),
        (encoded(bomb(50)), "damaged"),
        (encoded(bomb(50, bytes(2**24))), "is no picture that this page reads"),
        (encoded(png()[:-30]), "damaged"),
        (encoded(bytes(2**16 + 1)), "too large: at most 0.0625 MB"),
        ("data:," + "A" * 2**18, "too large"),
        ("data:image/png;base64,AAA", "arrived damaged"),
        ("data:image/png;base64,\u20ac", "arrived damaged"),
        ("/etc/passwd", "is no picture: drop a file"),
        ({"path": "/etc/passwd"}, "is no picture: drop a file"),
        (None, "is no picture: drop a file"),
    ],
)
def test_what_is_refused(sent, message):
    with pytest.raises(ValueError, match="that") as error:
        read_picture(sent, LIMITS)
    assert message in str(error.value)


# --- the guard ------------------------------------------------------------------------------------


def ask(
    path: str, body: bytes = b"", announce: bool = True, hosts=(), **headers: str
) -> tuple[int, bytes, dict]:
    """One request through the guard to an application that echoes the body."""

    async def echo(scope, receive, send):
        taken = b""
        while True:
            message = await receive()
            taken += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": taken})

    parts = [body[i : i + 40] for i in range(0, len(body), 40)] or [b""]
    incoming = iter(
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts, 1)
    )
    sent: list[dict] = []

    async def receive():
        return next(incoming)

    async def send(message):
        sent.append(message)

    sent_headers = {"host": "localhost:7860", **headers}
    if announce:
        sent_headers["content-length"] = str(len(body))
    pairs = [(name.encode(), value.encode()) for name, value in sent_headers.items()]
    scope = {"type": "http", "path": path, "headers": pairs}
    guard = Guard(echo, max_request=200, functions={3}, hosts=hosts)
    asyncio.run(guard(scope, receive, send))
    assert guard.in_flight == 0
    status = sent[0]["status"]
    return status, b"".join(m.get("body", b"") for m in sent[1:]), dict(sent[0]["headers"])


CLICK = b'{"fn_index": 3, "data": [null, 1, 2.5, "a", true], "session_hash": "x7", "trigger_id": 4}'


def test_the_guard_lets_the_pages_own_requests_through():
    status, body, headers = ask("/gradio_api/queue/join", CLICK)
    assert (status, json.loads(body)) == (200, {**json.loads(CLICK), "event_data": None})
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize("announce", [True, False])
def test_a_large_request_is_refused_whether_it_says_so_or_not(announce):
    for path in ("/gradio_api/queue/join", "/gradio_api/cancel"):
        assert ask(path, b"x" * 201, announce)[0] == 413


@pytest.mark.parametrize(
    "change",
    [
        {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]},
        {"data": [[{"path": "/etc/passwd"}]]},
        {"data": {"path": "/etc/passwd"}},
        {"data": None},
        {"fn_index": 4},
        {"fn_index": -1},
        {"fn_index": True},
        {"fn_index": "3"},
        {"fn_index": None},
        {"session_hash": "../x"},
        {"session_hash": None},
        {"session_hash": "x" * 65},
    ],
)
def test_messages_that_the_page_does_not_send_are_refused(change):
    """Gradio takes a dict of that shape, sent for any value, as a file of the server's to copy."""
    message = json.dumps({**json.loads(CLICK), **change}).encode()
    assert ask("/gradio_api/queue/join", message)[0] == 400


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{}", b"[" * 150, b"\xff"])
def test_what_is_no_message_is_refused(body):
    assert ask("/gradio_api/queue/join", body)[0] == 400


def test_what_a_message_says_beside_is_dropped():
    more = {"event_data": {"path": "/etc/passwd"}, "trigger_id": [], "batched": True}
    status, body, _ = ask(
        "/gradio_api/queue/join", json.dumps({**json.loads(CLICK), **more}).encode()
    )
    assert status == 200
    assert json.loads(body)["event_data"] is json.loads(body)["trigger_id"] is None
    assert "batched" not in json.loads(body)


@pytest.mark.parametrize(
    ("host", "hosts", "good"),
    [
        ("localhost", (), True),
        ("127.0.0.1:7860", (), True),
        ("[::1]:7860", (), True),
        ("LOCALHOST:1", (), True),
        ("evil.example", (), False),
        ("evil.example:7860", (), False),
        ("localhost.evil.example", (), False),
        ("127.0.0.1.evil.example", (), False),
        ("", (), False),
        ("[", (), False),
        ("192.168.0.9", (), False),
        ("192.168.0.9:7860", None, True),
        ("evil.example", None, False),
        ("studio.example:80", ("studio.example",), True),
        ("192.168.0.9", ("studio.example",), False),
    ],
)
def test_other_host_names_are_refused(host, hosts, good):
    """A stranger's page may point its own name at this address (DNS rebinding)."""
    assert ask("/config", hosts=hosts, host=host)[0] == (200 if good else 403)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:7860", 200),
        ("http://localhost:7861", 403),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_other_pages_may_not_send(origin, status):
    assert ask("/gradio_api/queue/join", CLICK, origin=origin)[0] == status


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://example.org",
        "/gradio_api/run/show",
        "/gradio_api/call/show",
        "/gradio_api/vibe-edit/",
        "/config/../gradio_api/upload",
        "/monitoring",
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(path):
    assert ask(path)[0] == 404


# --- the studio -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 24}
    for name, conditioner in [
        ("by_class", {"name": "class", "num_classes": 3}),
        ("by_text", {"name": "text", "encoder": encoder}),
    ]:
        gpt = tiny_gpt(conditioner=conditioner)
        if name == "by_class":
            gpt.metadata["class_names"] = ["cats", "dogs", "<b>hens</b>"]
        else:  # so that a random model listens to its prompt
            for parameter in gpt.parameters():
                parameter.data *= 5
        remember_tokenizer(gpt, folder / name, tokenizer, str(folder / "tokenizer"))
        gpt.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def studio(models):
    return Studio([str(models / name) for name in ("tokenizer", "by_class", "by_text")])


@pytest.fixture
def crop(studio):
    return studio.crop(read_picture(encoded(png()), LIMITS))


def test_the_filmstrip_shows_what_the_slider_shows(studio, crop):
    settings = Settings(seed=3, steps=2, guidance=1.5)
    film = list(studio.filmstrip(crop, settings))
    assert [k for k, _, _ in film] == [1, 2, 4, 8]
    for k, made, quality in film:
        again, same = studio.reconstruct(crop, k, settings)
        assert made.tobytes() == again.tobytes()
        assert quality == same
    assert len({made.tobytes() for _, made, _ in film}) == 4


def test_seeds_differ_and_begin_with_the_one_set(studio, crop):
    settings = Settings(seed=2**31 - 2, steps=2)
    drawn = list(studio.seeds(crop, 2, settings))
    assert len({made.tobytes() for _, made in drawn}) == 4
    assert drawn[0][1].tobytes() == studio.reconstruct(crop, 2, settings)[0].tobytes()


def test_the_token_need_is_the_shortest_that_meets_the_target(studio, crop):
    settings = Settings(seed=1, steps=1)
    quality = {k: q for k, _, q in studio.filmstrip(crop, settings)}
    target = quality[8] - 0.01
    said = studio.need(crop, target, settings)
    enough = [k for k in quality if quality[k] >= target]
    assert int(said.split()[0]) in enough
    assert studio.need(crop, 0, settings).startswith("1 of 8 tokens are enough for 0 dB")
    assert studio.need(crop, 90, settings).startswith("90 dB is out of reach")


def test_a_grown_picture_ends_as_the_one_generated_at_once(studio, models):
    voice = studio.voices[0]
    settings = Settings(seed=7, guidance=2.0)
    frames = list(voice.grow("dogs", settings, 8, 1))
    assert [k for k, _ in frames] == [1, 2, 4, 8]
    assert [k for k, _ in voice.grow("dogs", settings, 5, 1, every_token=True)] == [1, 2, 3, 4, 5]
    at_once = generate_images(
        load_model(models / "by_class"),
        studio.tokenizer,
        torch.tensor([1]),
        [1, 8],
        seed=7,
        sampling={"guidance_scale": 2.0},
        decoding={"num_steps": 1},
    )
    from flextok.data.transforms import to_image

    assert frames[0][1].tobytes() == to_image(at_once[1][0]).tobytes()
    assert frames[-1][1].tobytes() == to_image(at_once[8][0]).tobytes()


def test_prompts_change_the_picture(studio):
    voice = studio.voices[1]
    assert voice.reads_text
    a, b = (list(voice.grow(text, Settings(), 8, 1))[-1][1] for text in ("a key", "two hearts"))
    assert a.tobytes() != b.tobytes()


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": "1"}, "seed must be"),
        ({"seed": True}, "seed must be"),
        ({"steps": 10**9}, "steps must be a whole number from 1 to 100"),
        ({"guidance": float("nan")}, "guidance must be a number"),
        ({"guidance": float("inf")}, "guidance must be a number"),
    ],
)
def test_wishes_out_of_range(wishes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wishes)


def test_other_wishes_out_of_range(studio, crop):
    with pytest.raises(ValueError, match="tokens must be a whole number from 1 to 8"):
        studio.reconstruct(crop, 9, Settings())
    by_class, by_text = studio.voices
    for voice, wish, message in [
        (by_class, "unicorns", "no such class"),
        (by_class, ["cats"], "no such class"),
        (by_text, "x" * 501, "at most 500 characters"),
        (by_text, None, "at most 500 characters"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(voice.grow(wish, Settings(), 8, 1))


def test_a_tokenizer_without_prefixes_and_noise(tmp_path):
    torch.manual_seed(0)
    TiTok(TiTokConfig(**TITOK)).save_pretrained(tmp_path)
    studio = Studio([str(tmp_path)])
    crop = studio.crop(read_picture(encoded(png()), LIMITS))
    assert not studio.draws
    assert [k for k, _, _ in studio.filmstrip(crop, Settings(steps=4, guidance=2))] == [6]
    with pytest.raises(ValueError, match="always needs all"):
        studio.need(crop, 10, Settings())


def test_markup_escapes_names(studio):
    text = figure(Image.new("RGB", (2, 2)), "<script>alert(1)</script>", 8, '"><b>.png')
    assert "<script>" not in text
    assert "<b>" not in text


# --- the command ----------------------------------------------------------------------------------


def test_the_command_serves_this_machine_only_and_passes_limits_on(models, monkeypatch):
    pytest.importorskip("gradio", reason="needs pip install 'flextok[demo]'")
    served: list = []
    made: list = []
    monkeypatch.setattr("flextok.demo.server.serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr("flextok.demo.page.make_app", lambda *arguments: made.append(arguments))
    names = [str(models / "tokenizer"), str(models / "by_class")]
    assert main(["demo", *names, "--max-megabytes", "0.5", "--queue", "3"]) == 0
    ((studio, limits, queue, hosts),) = made
    assert hosts == ["127.0.0.1"]
    assert [voice.name for voice in studio.voices] == names[1:]
    assert (limits.max_bytes, limits.max_pixels) == (2**19, 40_000_000)
    assert queue == 3
    assert served == [(None, "127.0.0.1", None)]
    assert main(["demo", *names, "--host", "0.0.0.0"]) == 0
    assert main(["demo", *names, "--host", "0.0.0.0", "--allow-host", "studio.example"]) == 0
    assert [arguments[-1] for arguments in made[1:]] == [None, ["studio.example", "0.0.0.0"]]


def test_a_taken_port_is_a_mistake_told_in_one_line():
    server = pytest.importorskip("flextok.demo.server", reason="needs pip install 'flextok[demo]'")
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}.*choose another --port"):
            server.listen("127.0.0.1", port)
    with server.listen("127.0.0.1", None) as first, server.listen("127.0.0.1", None) as second:
        assert 7860 <= first.getsockname()[1] < second.getsockname()[1]


def test_without_models_the_page_shows_those_of_the_package(releases, monkeypatch):
    pytest.importorskip("gradio", reason="needs pip install 'flextok[demo]'")
    made: list = []
    monkeypatch.setattr("flextok.demo.server.serve", lambda *arguments: None)
    monkeypatch.setattr("flextok.demo.page.make_app", lambda *arguments: made.append(arguments))
    assert main(["demo"]) == 0
    ((studio, *_),) = made
    assert studio.tokenizer.num_tokens == 256
    assert [voice.name for voice in studio.voices] == ["emoji-class", "emoji-text"]


def test_without_gradio_the_command_says_what_to_install(models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "flextok.demo.page", raising=False)
    assert main(["demo", str(models / "tokenizer")]) == 1
    assert "pip install 'flextok[demo]'" in capsys.readouterr().err
