"""The page's parts without a browser: what is refused, and what the studio makes."""

import asyncio
import io
import sys

import pytest
import torch
from helpers.files import bomb, encoded, png
from helpers.models import TITOK, tiny_gpt, tiny_tokenizer
from PIL import Image
from starlette.datastructures import Headers

from flextok.cli import main
from flextok.demo.guard import Guard
from flextok.demo.markup import figure
from flextok.demo.studio import Quality, Studio
from flextok.demo.upload import Limits, read_picture
from flextok.evaluation.metrics import psnr, sharpness, ssim
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.images import to_tensor
from flextok.pipeline import generate_images, load, remember_tokenizer
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


def ask(path: str, hosts=(), app=None, **headers: str) -> tuple[int, dict]:
    """One request through the guard: its status and headers."""

    async def found(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        raise AssertionError("the guard reads no body")

    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    named = {"host": "localhost:7860", **headers}.items()
    pairs = [(key.replace("_", "-").encode(), value.encode()) for key, value in named]
    guard = Guard(app or found, max_request=200, hosts=hosts)
    asyncio.run(guard({"type": "http", "path": path, "headers": pairs}, receive, send))
    assert guard.in_flight == 0
    return sent[0]["status"], dict(sent[0]["headers"])


def test_the_guard_lets_the_pages_own_requests_through():
    status, headers = ask("/gradio_api/queue/join", content_length="200")
    assert status == 200
    assert b"default-src 'self'" in headers[b"content-security-policy"]


def test_a_large_request_is_refused_and_so_is_one_of_unknown_length():
    for path in ("/gradio_api/queue/join", "/gradio_api/cancel"):
        assert ask(path, content_length="201")[0] == 413
        assert ask(path, transfer_encoding="chunked")[0] == 411


def test_what_is_in_memory_together_is_bounded():
    guard = Guard(None, max_request=200)
    guard.in_flight = 1500
    assert guard.refusal("/", Headers({"host": "localhost"}), 100) is None
    assert guard.refusal("/", Headers({"host": "localhost"}), 101)[0] == 503


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
    assert ask("/gradio_api/queue/join", origin=origin)[0] == status


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
    asked = (3, 2, 1.5)  # seed, steps, scale
    film = list(studio.filmstrip(crop, *asked))
    assert [k for k, _, _ in film] == [1, 2, 4, 8]
    for k, made, quality in film:
        again, same = studio.reconstruct(crop, k, *asked)
        assert made.tobytes() == again.tobytes()
        assert quality == same
    assert len({made.tobytes() for _, made, _ in film}) == 4


def test_a_reconstruction_says_how_plausible_and_how_faithful_it_is(studio, crop):
    made, quality = studio.reconstruct(crop, 8, 0, 1)
    ours, theirs = (to_tensor(image)[None] for image in (made, crop))
    assert quality == (sharpness(ours) / sharpness(theirs), psnr(ours, theirs), ssim(ours, theirs))
    plausible, faithful = quality.caption(long=True).splitlines()
    assert plausible == f"plausible: sharpness {quality.sharpness:.2f}"
    assert faithful == f"faithful: {quality.psnr:.1f} dB, SSIM {quality.ssim:.2f}"
    same = Quality.of(theirs, theirs)
    assert same == (1, 100, pytest.approx(1))
    plain = torch.zeros_like(theirs)
    assert Quality.of(ours, plain).sharpness is None, "no edges, nothing to be as sharp as"
    assert Quality.of(ours, plain).caption().startswith("sharp -\n")


def test_seeds_differ_and_begin_with_the_one_set(studio, crop):
    seed = 2**31 - 2
    drawn = list(studio.seeds(crop, 2, seed, 2))
    assert len({made.tobytes() for _, made in drawn}) == 4
    assert drawn[0][1].tobytes() == studio.reconstruct(crop, 2, seed, 2)[0].tobytes()


def test_the_token_need_is_the_shortest_that_meets_the_target(studio, crop):
    asked = (1, 1)
    quality = {k: q.psnr for k, _, q in studio.filmstrip(crop, *asked)}
    target = quality[8] - 0.01
    answer = studio.need(crop, target, *asked)
    enough = [k for k in quality if quality[k] >= target]
    assert int(answer.split()[0]) in enough
    assert studio.need(crop, 0, *asked).startswith("1 of 8 tokens are enough for 0 dB")
    assert studio.need(crop, 90, *asked).startswith("90 dB is out of reach")


def test_a_grown_picture_ends_as_the_one_generated_at_once(studio, models):
    pair = studio.pairs[0]
    assert pair.classes[1:] == [("dogs", 1), ("<b>hens</b>", 2), ("any", -1)]
    frames = list(pair.grow(1, 8, seed=7, scale=2.0, decoder_steps=1))
    assert [k for k, _ in frames] == [1, 2, 4, 8]
    every = pair.grow(1, 5, every_token=True, decoder_steps=1)
    assert [k for k, _ in every] == [1, 2, 3, 4, 5]
    at_once = generate_images(
        load(models / "by_class"),
        studio.tokenizer,
        torch.tensor([1]),
        [1, 8],
        seed=7,
        sampling={"guidance_scale": 2.0},
        decoding={"num_steps": 1},
    )
    from flextok.images import to_image

    assert frames[0][1].tobytes() == to_image(at_once[1][0]).tobytes()
    assert frames[-1][1].tobytes() == to_image(at_once[8][0]).tobytes()


def test_prompts_change_the_picture(studio):
    pair = studio.pairs[1]
    assert pair.reads_text
    texts = ("a key", "two hearts")
    a, b = (list(pair.grow(text, 8, decoder_steps=1))[-1][1] for text in texts)
    assert a.tobytes() != b.tobytes()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tokens": 9}, r"must be in \[1, 8\]"),
        ({"tokens": 0}, r"must be in \[1, 8\]"),
        ({"tokens": float("nan")}, "NaN"),
        ({"seed": float("nan")}, "NaN"),
        ({"steps": 10**9}, "num_steps=1000000000 must be"),
        ({"scale": float("nan")}, "guidance_scale=nan must be"),
        ({"scale": float("inf")}, "guidance_scale=inf must be"),
    ],
)
def test_numbers_out_of_range_are_mistakes_of_the_client(studio, crop, asked, message):
    with pytest.raises(ValueError, match=message):
        studio.reconstruct(crop, **{"tokens": 8, **asked})


def test_a_generator_in_steps_shows_its_steps_and_its_last_image(models, tmp_path):
    page = pytest.importorskip("flextok.demo.page", reason="needs pip install 'flextok[demo]'")
    torch.manual_seed(0)
    small = {"vocab_size": 200, "num_tokens": 8, "dim": 16, "depth": 1, "num_heads": 2}
    maskgit = MaskGIT(MaskGITConfig(**small, conditioner={"name": "class", "num_classes": 3}))
    tokenizer = load(models / "tokenizer")
    remember_tokenizer(maskgit, tmp_path, tokenizer, str(models / "tokenizer"))
    maskgit.save_pretrained(tmp_path)
    studio = Studio([str(tmp_path), str(models / "by_text")])
    frames = list(studio.pairs[0].grow(2, 8, num_steps=2, decoder_steps=1))
    assert [k for k, _ in frames] == [8]
    blocks = page.build_page(studio, LIMITS).blocks.values()
    assert [b.label for b in blocks if b.get_config().get("label") == "Steps"] == ["Steps"]


def test_prompts_are_bounded(studio):
    for prompt in ("x" * 501, None, 3):
        with pytest.raises(ValueError, match="at most 500 characters"):
            list(studio.pairs[1].grow(prompt, 8))


def test_a_tokenizer_without_prefixes_and_noise(tmp_path):
    torch.manual_seed(0)
    TiTok(TiTokConfig(**TITOK)).save_pretrained(tmp_path)
    studio = Studio([str(tmp_path)])
    crop = studio.crop(read_picture(encoded(png()), LIMITS))
    assert [k for k, _, _ in studio.filmstrip(crop, 0, 4, 2)] == [6]
    with pytest.raises(ValueError, match="always needs all"):
        studio.need(crop, 10)


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
    assert [pair.name for pair in studio.pairs] == names[1:]
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
    assert [pair.name for pair in studio.pairs] == ["emoji-class", "emoji-text"]


def test_without_gradio_the_command_says_what_to_install(models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "flextok.demo.page", raising=False)
    assert main(["demo", str(models / "tokenizer")]) == 1
    assert "pip install 'flextok[demo]'" in capsys.readouterr().err
