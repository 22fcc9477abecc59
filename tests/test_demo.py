"""The page's parts without a browser or a server: what is refused, and what the studio makes."""

import asyncio
import base64
import io
import json
import re
import sys

import pytest
import torch
from helpers.files import bomb, encoded, png
from helpers.models import TITOK, tiny_gpt, tiny_tokenizer
from PIL import Image
from torch import Tensor

from flextok.cli import main
from flextok.demo.decoder import SEEDS, data_url
from flextok.demo.source import Asked, unknown_words
from flextok.demo.studio import Studio
from flextok.demo.upload import Limits, read_picture
from flextok.editing import interpolate, mix, vary
from flextok.emoji.alignment import scene_verifier
from flextok.emoji.probe import packaged_probe
from flextok.emoji.scenes import EmojiScenes
from flextok.evaluation.metrics import psnr, sharpness
from flextok.evaluation.sweep import spread
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.images import center_crop, to_image, to_tensor
from flextok.pipeline import (
    decode_prefixes,
    generate_images,
    load,
    reconstruct_prefixes,
    remember_tokenizer,
)
from flextok.schema import from_mapping
from flextok.tokenizers import TiTok, TiTokConfig
from flextok.tree_search import likelihood, search

pytest.importorskip("starlette", reason="needs pip install 'flextok[demo]'")
from starlette.datastructures import Headers

from flextok.demo import guard
from flextok.demo.guard import Guard

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


def ask(path: str, hosts=(), app=None, addresses=False, **headers: str) -> tuple[int, dict]:
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
    guarded = Guard(app or found, max_request=200, hosts=hosts, addresses=addresses)
    asyncio.run(guarded({"type": "http", "path": path, "headers": pairs}, receive, send))
    assert guarded.in_flight == 0
    return sent[0]["status"], dict(sent[0]["headers"])


def test_the_guard_lets_the_pages_own_requests_through():
    status, headers = ask("/draw", content_length="200")
    assert status == 200
    policy = headers[b"content-security-policy"]
    assert b"default-src 'none'" in policy
    assert b"unsafe" not in policy


def test_a_large_request_is_refused_and_so_is_one_of_unknown_length():
    assert ask("/draw", content_length="201")[0] == 413
    assert ask("/draw", transfer_encoding="chunked")[0] == 411


def test_what_is_in_memory_together_is_bounded():
    guarded = Guard(None, max_request=200)
    guarded.in_flight = 1500
    assert guarded.refusal(Headers({"host": "localhost"}), 100) is None
    assert guarded.refusal(Headers({"host": "localhost"}), 101)[0] == 503


def test_an_answer_that_is_not_read_ends(monkeypatch):
    """Clients that read nothing would hold up the server's work for good."""
    monkeypatch.setattr(guard, "PATIENCE", 0.05)
    sent = []

    async def answer(scope, receive, send):
        while True:
            sent.append(1)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def never(message):
        await asyncio.sleep(60)

    headers = [(b"host", b"localhost"), (b"content-length", b"9")]
    guarded = Guard(answer, max_request=200)
    asyncio.run(guarded({"type": "http", "path": "/", "headers": headers}, never, never))
    assert len(sent) == 1
    assert guarded.in_flight == 0


@pytest.mark.parametrize(
    ("host", "hosts", "addresses", "good"),
    [
        ("localhost", (), False, True),
        ("127.0.0.1:7860", (), False, True),
        ("[::1]:7860", (), False, True),
        ("LOCALHOST:1", (), False, True),
        ("evil.example", (), False, False),
        ("evil.example:7860", (), False, False),
        ("localhost.evil.example", (), False, False),
        ("127.0.0.1.evil.example", (), False, False),
        ("", (), False, False),
        ("[", (), False, False),
        ("192.168.0.9", (), False, False),
        ("192.168.0.9:7860", (), True, True),
        ("[fe80::1]:7860", (), True, True),
        ("evil.example", (), True, False),
        ("", (), True, False),
        ("studio.example:80", ("studio.example",), False, True),
        ("studio.example:80", ("Studio.Example",), False, True),
        ("STUDIO.example", ("Studio.Example",), False, True),
        ("192.168.0.9", ("studio.example",), False, False),
        ("192.168.0.9", ("studio.example",), True, True),
        ("studio.example", ("studio.example",), True, True),
        ("evil.example", ("studio.example",), True, False),
    ],
)
def test_other_host_names_are_refused(host, hosts, addresses, good):
    """A stranger's page may point its own name at this address (DNS rebinding)."""
    assert ask("/", hosts=hosts, addresses=addresses, host=host)[0] == (200 if good else 403)


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
    assert ask("/draw", origin=origin)[0] == status


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


PICTURE = encoded(png())


def parts(studio: Studio, **asked) -> dict:
    """An answer, put together as the page does: its frames by (tokens, seed), its maps by tokens,
    the last of all else, and the lengths of the indices as they grew."""
    whole: dict = {"frames": {}, "maps": {}, "grown": []}
    for part in studio.draw(from_mapping(Asked, asked), LIMITS):
        whole["frames"] |= {(one["k"], one["seed"]): one for one in part.pop("frames", [])}
        if chart := part.pop("map", None):
            whole["maps"][chart["k"]] = chart
        whole["grown"].append(len(part.get("indices", [])))
        whole |= part
    return whole


def pixels(url: str) -> Tensor:
    """(1, 3, H, W) in [-1, 1] of a data URL."""
    return to_tensor(read_picture(url, Limits()))[None]


def closely(made: str, image: Tensor) -> None:
    """A batch may round a pixel to the next level."""
    expected = to_tensor(to_image(image))[None]
    assert ((pixels(made) - expected).abs() <= 1.01 / 127.5).all()


@pytest.fixture
def original(studio):
    return to_tensor(center_crop(read_picture(PICTURE, LIMITS), 16, 16))[None]


def test_every_length_is_decoded_as_alone(studio, original):
    asked = {"seed": 3, "decoding": {"num_steps": 2, "guidance_scale": 1.5}}
    answer = parts(studio, source=0, value=PICTURE, **asked)
    tokenizer = studio.sources[0].tokenizer
    assert answer["indices"] == tokenizer.encode(original)[0].tolist()
    assert (pixels(answer["original"]) == original).all()
    alone = reconstruct_prefixes(
        tokenizer, original, list(range(1, 9)), 3, {"num_steps": 2, "guidance_scale": 1.5}
    )
    for k, image in alone.items():
        closely(answer["frames"][k, 3]["url"], image[0])
    assert len({one["url"] for one in answer["frames"].values()}) == len(answer["frames"])


def test_frames_say_how_good_they_are(studio, original):
    answer = parts(studio, source=0, value=PICTURE)
    for k in (1, 8):
        one = answer["frames"][k, 0]
        made = pixels(one["url"])
        assert one["psnr"] == pytest.approx(psnr(made, original).item())
        ratio = sharpness(made) / sharpness(original)
        assert one["sharp"] == pytest.approx(ratio.item())
    plain = data_url(Image.new("RGB", (16, 16), "black"))
    answer = parts(studio, source=0, value=plain)
    assert answer["frames"][8, 0]["sharp"] is None, "no edges, nothing to be as sharp as"


def test_seeds_differ_and_the_map_says_where(studio, original):
    seed = 2**31 - 3  # the largest seeds go on from 0
    answer = parts(studio, source=0, value=PICTURE, seed=seed)
    assert answer["maps"].keys() == {1, 2, 4, 8}
    draws = torch.stack([pixels(answer["frames"][2, seed + i]["url"])[0] for i in range(SEEDS)])
    levels = spread(draws[None])[0]
    assert levels.max() > 0
    assert answer["maps"][2]["mean"] == pytest.approx(levels.mean().item(), abs=0.5)
    brightness = pixels(answer["maps"][2]["url"]).mean(dim=1)[0]
    assert brightness.flatten()[levels.argmax()] == brightness.max()
    again = reconstruct_prefixes(studio.sources[0].tokenizer, original, [2], (seed + 4) % 2**31)
    closely(answer["frames"][2, seed + 4]["url"], again[2][0])


def test_a_grown_image_ends_as_the_one_generated_at_once(studio, models):
    assert [source.kind for source in studio.sources] == ["picture", "class", "prompt"]
    asked = {"decoding": {"num_steps": 1}, "sampling": {"guidance_scale": 2.0}}
    answer = parts(studio, source=1, value="dogs", seed=7, **asked)
    lengths = [k for i, k in enumerate(answer["grown"]) if k and k not in answer["grown"][:i]]
    assert lengths == [1, 2, 3, 4, 5, 6, 7, 8]
    at_once = generate_images(
        load(models / "by_class"),
        studio.sources[1].tokenizer,
        torch.tensor([1]),
        [1, 8],
        seed=7,
        sampling={"guidance_scale": 2.0},
        decoding={"num_steps": 1},
    )
    for k, images in at_once.items():
        closely(answer["frames"][k, 7]["url"], images[0])


OTHER = encoded(png(10, 20))


def tokens_of(studio: Studio, picture: str) -> Tensor:
    image = center_crop(read_picture(picture, LIMITS), 16, 16)
    return studio.sources[0].tokenizer.encode(to_tensor(image)[None])


def test_an_edit_takes_the_first_tokens_of_one_picture_and_the_others_of_another(studio):
    few = {"num_steps": 1, "guidance_scale": 1.0}
    asked = {"task": "edit", "kept": PICTURE, "value": OTHER, "seed": 3, "decoding": few}
    answer = parts(studio, source=0, **asked)
    first, second = tokens_of(studio, PICTURE), tokens_of(studio, OTHER)
    assert not torch.equal(first, second)
    assert answer["indices"] == first[0].tolist()
    for part, shown in (("original", PICTURE), ("other", OTHER)):
        crop = center_crop(read_picture(shown, LIMITS), 16, 16)
        assert (pixels(answer[part]) == to_tensor(crop)).all()
    tokenizer = studio.sources[0].tokenizer
    for k in range(1, 9):
        alone = decode_prefixes(tokenizer, mix(first, second, k), [8], 3, few)[8]
        closely(answer["frames"][k, 3]["url"], alone[0])
    assert answer["row"] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    for k in (1, 2, 4, 8):
        between = interpolate(tokenizer, first[:, :k], second[:, :k], [0, 0.4, 1])
        alone = decode_prefixes(tokenizer, between, [k], 3, few, rows=[0] * 3)[k]
        for share, image in zip(("0%", "40%", "100%"), alone, strict=True):
            closely(answer["frames"][k, share]["url"], image)
    assert not answer["maps"]


@pytest.mark.parametrize(("source", "value"), [(1, "dogs"), (1, "none"), (2, "a key"), (2, "")])
def test_variations_keep_the_first_tokens_of_a_picture(studio, source, value):
    asked = {"task": "edit", "kept": PICTURE, "value": value, "seed": 2}
    answer = parts(studio, source=source, **asked, decoding={"num_steps": 1})
    assert answer["lengths"] == [1, 2, 4]
    assert answer["row"] == [2, 3, 4, 5, 6, 7]
    assert answer["maps"].keys() == {1, 2, 4}
    model = studio.sources[source]
    rows = vary(model.generator, [value], tokens_of(studio, PICTURE)[:, :2], SEEDS, seed=2)
    alone = decode_prefixes(model.tokenizer, rows, [8], 2, {"num_steps": 1}, rows=[0] * SEEDS)[8]
    for i in range(SEEDS):
        closely(answer["frames"][2, 2 + i]["url"], alone[i])
    assert answer["maps"][2]["mean"] == pytest.approx(spread(alone[None]).mean().item(), abs=0.5)


@pytest.mark.parametrize(("method", "counts"), [("best", [12]), ("beam", [4, 4, 4])])
def test_a_search_shows_its_candidates_as_they_come_and_ends_with_the_best(studio, method, counts):
    few = {"num_steps": 1, "guidance_scale": 1.0}
    asked = {"task": "search", "method": method, "budget": 12, "seed": 5, "decoding": few}
    answer = list(studio.draw(from_mapping(Asked, {"source": 1, "value": "dogs", **asked}), LIMITS))
    source = studio.sources[1]
    lengths = [8] if method == "best" else [1, 2, 8]
    found = search(
        source.generator,
        source.tokenizer,
        ["dogs"],
        likelihood(source.generator),
        lengths=lengths,
        budget=12,
        seed=5,
        decoding=few,
    )
    steps = [part for part in answer if "level" in part]
    assert [part["done"] for part in steps] == ([8, 12] if method == "best" else [4, 8, 12])
    shown = [[] for _ in lengths]
    for part in steps:
        assert part["level"]["k"] == lengths[part["level"]["number"]]
        shown[part["level"]["number"]] += part["level"]["found"]
    assert [len(level) for level in shown] == counts
    for level, candidates in zip(found.tree, shown, strict=True):
        assert [one["parent"] for one in candidates] == level.parents[0].tolist()
        scores = [one["score"] for one in candidates]
        assert scores == pytest.approx(level.scores[0].tolist(), abs=1e-4)
    (end,) = (part for part in answer if "path" in part)
    assert (end["path"], end["indices"]) == (found.paths[0], found.indices[0].tolist())
    assert {"verifier": "likelihood"} in answer
    frames = {(one["k"], one["seed"]): one for part in answer for one in part.get("frames", [])}
    closely(frames[8, 5]["url"], found.images[0])
    assert {k for k, seed in frames if seed == 5} == set(range(1, 9))


def test_prompts_of_known_scenes_are_scored_by_the_packages_classifier():
    studio = Studio(["emoji-one-step", "emoji-text"])
    asked = {"source": 1, "value": "a red heart left of a bomb", "task": "search", "budget": 2}
    answer = studio.draw(from_mapping(Asked, asked), LIMITS)
    assert next(answer) == {"verifier": "scenes"}
    candidates = next(answer)["level"]["found"]
    images = torch.cat([pixels(one["url"]) for one in candidates])
    scenes = EmojiScenes(max_objects=2, vocabulary="basic")
    score = scene_verifier(packaged_probe(), scenes)(images, [asked["value"]] * 2, images)
    assert [one["score"] for one in candidates] == pytest.approx(score.tolist(), abs=0.05)
    answer = studio.draw(from_mapping(Asked, {**asked, "value": "a fish"}), LIMITS)
    assert next(answer) == {"verifier": "likelihood"}


def test_prompts_change_the_image(studio):
    a, b = (parts(studio, source=2, value=text)["indices"] for text in ("a key", "two hearts"))
    assert a != b


def test_a_generators_indices_are_decoded_by_the_tokenizer_named_first(models, studio):
    """A faster decoder of the same codes serves all."""
    assert all(source.tokenizer is studio.sources[0].tokenizer for source in studio.sources)
    alone = Studio([str(models / "by_class")])
    assert [source.kind for source in alone.sources] == ["picture", "class"]
    assert alone.sources[0].tokenizer is alone.sources[1].tokenizer


def test_lengths_are_all_of_the_first_and_eight_a_doubling(studio):
    source = studio.sources[0]
    assert source.lengths() == [1, 2, 3, 4, 5, 6, 7, 8]
    source = type(source)("long", tiny_tokenizer(num_registers=256))
    lengths = source.lengths()
    assert lengths[:18] == [*range(1, 17), 18, 20]
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256} <= set(lengths)
    assert len(lengths) == 48


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"source": 3}, "source=3 must be below 3"),
        ({"source": -1}, "source=-1 must be at least 0"),
        ({"source": 1, "value": "unicorns"}, "unknown class 'unicorns'; known: cats, dogs"),
        ({"source": 2, "value": "x" * 501}, "at most 500 characters"),
        ({"value": "/etc/passwd"}, "that is no picture"),
        ({"value": None}, "value=None must be of type str"),
        ({"value": {"path": "/etc/passwd"}}, "must be of type str"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**31}, "seed=2147483648 must be"),
        ({"seed": float("nan")}, "must be of type int"),
        (
            {"decoding": {"num_steps": 10**9}},
            "steps=1000000000 must be a whole number from 1",
        ),
        ({"decoding": {"num_steps": 1.5}}, "steps=1.5 must be a whole number"),
        ({"decoding": {"guidance_scale": float("nan")}}, "must be a finite number"),
        ({"decoding": {"guidance_scale": 11}}, "guidance=11 must be a number from 0 to 10"),
        ({"decoding": {"solver": 1}}, "unknown decoding option 'solver'"),
        ({"source": 1, "value": "cats", "sampling": {"top_k": 1}}, "unknown sampling option"),
        ({"path": "/etc/passwd"}, "unknown key 'path'"),
        ({"task": "train"}, "task"),
        ({"task": "search"}, "task='search' is not for"),
        ({"task": "edit", "kept": "/etc/passwd"}, "that is no picture"),
        ({"task": "edit", "kept": PICTURE, "value": "/etc/passwd"}, "that is no picture"),
        ({"task": "edit", "kept": PICTURE, "source": 1, "value": "unicorns"}, "unknown class"),
        ({"task": "edit", "kept": PICTURE, "source": 2, "value": "x" * 501}, "at most 500"),
        ({"task": "search", "source": 1, "value": "unicorns"}, "unknown class 'unicorns'"),
        ({"task": "search", "source": 1, "value": "cats", "budget": 65}, "budget=65 must be"),
        ({"task": "search", "source": 1, "value": "cats", "method": "all"}, "method"),
        (
            {"task": "search", "source": 1, "value": "cats", "method": "beam", "budget": 2},
            "budget=2 must be",
        ),
        (
            {"task": "search", "source": 1, "value": "cats", "sampling": {"top_k": 1}},
            "unknown sampling option",
        ),
        (
            {"task": "edit", "kept": PICTURE, "source": 1, "value": "cats", "sampling": {"a": 1}},
            "unknown sampling option",
        ),
    ],
)
def test_mistakes_of_the_client_are_named(studio, asked, message):
    """Before the first part of the answer, which the page would show."""
    with pytest.raises(ValueError, match=re.escape(message)):
        next(studio.draw(from_mapping(Asked, {"source": 0, "value": PICTURE, **asked}), LIMITS))


def test_a_request_may_carry_two_of_the_largest_pictures():
    limits = Limits()
    largest = "data:image/jpeg;base64," + base64.b64encode(bytes(limits.max_bytes)).decode()
    asked = {"source": 0, "task": "edit", "value": largest, "kept": largest, "seed": 2**31 - 1}
    assert len(json.dumps(asked)) < limits.max_request
    with pytest.raises(ValueError, match=r"no picture|cannot be read|damaged"):  # but not too large
        read_picture(largest, limits)
    with pytest.raises(ValueError, match="too large"):
        read_picture(largest[:23] + "A" * 4 + largest[23:], limits)


def test_a_generator_in_steps_shows_its_lengths_at_the_end(models, tmp_path):
    torch.manual_seed(0)
    small = {"vocab_size": 200, "num_tokens": 8, "dim": 16, "depth": 1, "num_heads": 2}
    maskgit = MaskGIT(MaskGITConfig(**small, conditioner={"name": "class", "num_classes": 3}))
    tokenizer = load(models / "tokenizer")
    remember_tokenizer(maskgit, tmp_path, tokenizer, str(models / "tokenizer"))
    maskgit.save_pretrained(tmp_path)
    studio = Studio([str(tmp_path)])
    answer = parts(studio, source=1, value="2", sampling={"num_steps": 2})
    assert answer["grown"][0] == 8
    assert {k for k, seed in answer["frames"] if seed == 0} == set(range(1, 9))
    named = [one["label"] for one in studio.sources[1].describe()["fields"]["sampling"]]
    assert named == ["steps", "guidance"]


def test_a_tokenizer_without_prefixes_and_noise(tmp_path):
    torch.manual_seed(0)
    TiTok(TiTokConfig(**TITOK)).save_pretrained(tmp_path)
    studio = Studio([str(tmp_path)])
    answer = parts(studio, source=0, value=PICTURE)
    assert answer["frames"].keys() == {(6, 0)}
    assert not answer["maps"]
    described = studio.describe(LIMITS)["sources"][0]
    assert (described["seeds"], described["lengths"]) == (1, [6])
    assert described["tasks"] == ["look"]
    assert described["fields"]["decoding"] == []


def test_words_that_the_models_captions_do_not_have():
    assert unknown_words("a red heart left of two Pizzas on a blue background") == ["pizzas"]
    assert not unknown_words("a cloud on a gradient from peach to dark green")
    assert unknown_words("strawberries, an apple") == ["strawberries"]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_serves_this_machine_only_and_passes_limits_on(models, monkeypatch):
    served: list = []
    made: list = []
    monkeypatch.setattr("flextok.demo.server.serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr("flextok.demo.page.make_app", lambda *arguments: made.append(arguments))
    names = [str(models / "tokenizer"), str(models / "by_class")]
    assert main(["demo", *names, "--max-megabytes", "0.5", "--queue", "3"]) == 0
    ((studio, limits, queue, hosts, addresses),) = made
    assert (hosts, addresses) == (["127.0.0.1"], False)
    assert [source.name for source in studio.sources] == names
    assert (limits.max_bytes, limits.max_pixels) == (2**19, 40_000_000)
    assert queue == 3
    assert served == [(None, "127.0.0.1", None)]
    assert main(["demo", *names, "--host", "0.0.0.0"]) == 0
    assert main(["demo", *names, "--host", "0.0.0.0", "--allow-host", "studio.example"]) == 0
    named = [["0.0.0.0"], ["studio.example", "0.0.0.0"]]
    assert [arguments[-2:] for arguments in made[1:]] == [(hosts, True) for hosts in named]


def test_a_taken_port_is_a_mistake_told_in_one_line():
    server = pytest.importorskip("flextok.demo.server", reason="needs pip install 'flextok[demo]'")
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}.*choose another --port"):
            server.listen("127.0.0.1", port)
    with server.listen("127.0.0.1", None) as first, server.listen("127.0.0.1", None) as second:
        assert 7860 <= first.getsockname()[1] < second.getsockname()[1]


def test_without_models_the_page_shows_those_of_the_package(releases, monkeypatch):
    made: list = []
    monkeypatch.setattr("flextok.demo.server.serve", lambda *arguments: None)
    monkeypatch.setattr("flextok.demo.page.make_app", lambda *arguments: made.append(arguments))
    assert main(["demo"]) == 0
    ((studio, *_),) = made
    names = ["emoji-few-step", "emoji-class", "emoji-text"]
    assert [source.name for source in studio.sources] == names
    described = studio.describe(Limits())
    assert described["sources"][0]["lengths"][-1] == 256
    for source in described["sources"][1:]:  # what is suggested is there
        assert source["examples"]
        assert not source["classes"] or set(source["examples"]) <= set(source["classes"])
    assert not [
        word for prompt in described["sources"][2]["examples"] for word in unknown_words(prompt)
    ]


def test_without_a_web_server_the_command_says_what_to_install(models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "flextok.demo.page", raising=False)
    assert main(["demo", str(models / "tokenizer")]) == 1
    assert "pip install 'flextok[demo]'" in capsys.readouterr().err
