"""The page's parts without a browser: what is refused, and what the studio makes."""

import asyncio
import base64
import io
import struct
import sys
import zlib

import pytest
import torch
from conftest import TITOK, tiny_gpt, tiny_tokenizer
from PIL import Image

from flextok.cli import main
from flextok.demo.guard import Guard
from flextok.demo.markup import figure
from flextok.demo.studio import Settings, Studio
from flextok.demo.upload import Limits, read_picture
from flextok.pipeline import generate_images, load_model, remember_tokenizer
from flextok.tokenizers import TiTok, TiTokConfig

LIMITS = Limits(max_bytes=2**16, max_pixels=10_000)


def encoded(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int = 20, height: int = 10) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, format="png")
    return buffer.getvalue()


def bomb(side: int, text: bytes = b"") -> bytes:
    """A PNG of a few bytes that says it is side x side pixels and holds `text`, compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"zTXt", b"k\0\0" + zlib.compress(text))]
    parts += [(b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


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


def ask(path: str, body: bytes = b"", announce: bool = True) -> tuple[int, bytes, dict]:
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

    headers = [(b"content-length", str(len(body)).encode())] if announce else []
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(Guard(echo, max_request=100)(scope, receive, send))
    status = sent[0]["status"]
    return status, b"".join(m.get("body", b"") for m in sent[1:]), dict(sent[0]["headers"])


def test_the_guard_lets_the_pages_own_requests_through():
    status, body, headers = ask("/gradio_api/queue/join", b"x" * 100)
    assert (status, body) == (200, b"x" * 100)
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize("announce", [True, False])
def test_a_large_request_is_refused_whether_it_says_so_or_not(announce):
    assert ask("/gradio_api/queue/join", b"x" * 101, announce)[0] == 413


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
    ((studio, limits, queue),) = made
    assert [voice.name for voice in studio.voices] == names[1:]
    assert (limits.max_bytes, limits.max_pixels) == (2**19, 40_000_000)
    assert queue == 3
    assert served == [(None, "127.0.0.1", None)]


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
    ((studio, _, _),) = made
    assert studio.tokenizer.num_tokens == 256
    assert [voice.name for voice in studio.voices] == ["emoji-class", "emoji-text"]


def test_without_gradio_the_command_says_what_to_install(models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "flextok.demo.page", raising=False)
    assert main(["demo", str(models / "tokenizer")]) == 1
    assert "pip install 'flextok[demo]'" in capsys.readouterr().err
