"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import base64
import io
import shutil
from importlib import resources

import pytest
from helpers.files import bomb, encoded, png
from helpers.models import tiny_gpt, tiny_tokenizer
from helpers.processes import served
from PIL import Image

from flextok.pipeline import remember_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("starlette", reason="needs pip install 'flextok[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
]
SECONDS = 1000.0
PATIENCE = 120 * SECONDS  # the machine may be busy


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A served page with random models: the address."""
    from flextok.demo.page import make_app
    from flextok.demo.studio import Studio
    from flextok.demo.upload import Limits

    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(decode={"num_steps": 1, "guidance_scale": 1.0})
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 24}
    for name, conditioner in [
        ("class", {"name": "class", "num_classes": 3}),
        ("text", {"name": "text", "encoder": encoder}),
    ]:
        gpt = tiny_gpt(conditioner=conditioner)
        remember_tokenizer(gpt, folder / name, tokenizer, str(folder / "tokenizer"))
        gpt.save_pretrained(folder / name)
    studio = Studio([str(folder / name) for name in ("tokenizer", "class", "text")])
    with served(make_app(studio, Limits())) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser):
    """open_page(part, **options of the browser's context) loads the page, at a part of its address,
    and waits for its images. At the end no request may have gone anywhere else, and no script may
    have failed."""
    contexts, faults, asked = [], [], []

    def load(part="", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server + part)
        finished(page)
        return page

    yield load
    for context in contexts:
        context.close()
    assert asked
    assert not [url for url in asked if not url.startswith((server, "data:"))]
    assert not faults


def finished(page):
    """Wait for the images and the end of their answer: the button to stop it is disabled before
    the page has asked, too, and the first image is not the last."""
    page.locator("#image[src]").wait_for()
    page.locator("#stop[disabled]").wait_for()


def draw(page, act):
    """Do what asks for images, and wait until the page has read the answer to its end.
    (Playwright's own `Response.finished` may never return where a route was taken away.)"""
    with page.expect_response("**/draw"):
        act()
    finished(page)


def showing(page, text):
    page.locator(f'#image[alt*="{text}"]').wait_for()


def source(page):
    return page.locator("#image").get_attribute("src")


def test_an_example_is_there_at_once_with_its_film_and_tokens(open_page):
    page = open_page()
    showing(page, "desert island, decoded from 8 tokens")
    assert page.locator("#film img[src]").count() == 4  # 1, 2, 4, 8 tokens
    assert page.locator("#chips li").count() == 8
    assert page.locator("#seeds img[src]").count() == 7  # six seeds and the map
    first = page.locator("#chips li").first.inner_text().split()
    assert int(first[0]) == int(first[1], 2)
    assert len(first[1]) == 8  # 200 codes


def test_the_slider_asks_nothing_and_takes_a_moment(open_page):
    page = open_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    showing(page, "from 1 token")
    seen = [source(page)]
    for k in range(2, 9):
        page.keyboard.press("ArrowRight")
        showing(page, f"from {k} tokens")
        seen.append(source(page))
    assert len(set(seen)) == 8
    assert page.locator("#chips li.on").count() == 8
    page.get_by_role("button", name="2 tokens").click()
    showing(page, "from 2 tokens")
    assert page.locator("#chips li.on").count() == 2
    assert not [url for url in asked if not url.startswith("data:")]
    # from the move to the decoded image; the fastest of some, since the machine may be busy
    slide = """async k => {
        const slider = document.getElementById('slider'), image = document.getElementById('image');
        const start = performance.now();
        slider.value = k;
        slider.dispatchEvent(new Event('input'));
        await image.decode();
        return performance.now() - start;
    }"""
    assert min(page.evaluate(slide, k % 8) for k in range(10)) < 100


def test_on_a_narrow_page_the_film_follows_the_slider(open_page):
    """The image of the current number of tokens was out of sight."""
    page = open_page(viewport={"width": 400, "height": 900})
    film = page.locator("#film").bounding_box()
    for key in ("End", "Home", "End"):
        page.locator("#slider").press(key)
        box = page.locator("#film [aria-current]").bounding_box()
        assert film["x"] <= box["x"] + 1
        assert box["x"] + box["width"] <= film["x"] + film["width"] + 1


def test_a_picture_of_ones_own(open_page, tmp_path):
    page = open_page()
    path = tmp_path / "good.png"
    path.write_bytes(png(60, 40))
    draw(page, lambda: page.set_input_files("#picture-file", path))
    showing(page, "Your picture, decoded from 8 tokens")
    # the link holds the file: to let Chromium save it once took for ever, on a busy machine
    link = page.get_by_text("Download this image")
    assert link.get_attribute("download") == "flextok-8.png"
    assert link.get_attribute("href") == source(page)
    saved = base64.b64decode(source(page).partition(",")[2])
    assert Image.open(io.BytesIO(saved)).size == (16, 16)
    assert encoded(saved) == source(page)


def test_an_image_grows_from_a_prompt_by_keyboard_alone(open_page):
    page = open_page()
    page.locator("input[name=source]").first.focus()
    page.keyboard.press("ArrowRight")  # a class
    showing(page, "“0”")
    page.keyboard.press("ArrowRight")  # a prompt
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") == "prompt"
    page.keyboard.press("Enter")
    page.locator("#error", has_text="Write what the image shall show.").wait_for()
    page.keyboard.type("a red heart")
    draw(page, lambda: page.keyboard.press("Enter"))
    showing(page, "“a red heart”, decoded from 8 tokens")
    assert page.locator("#film img[src]").count() == 4
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "go"


def test_the_address_holds_the_state(open_page, server):
    page = open_page()
    page.get_by_label("A prompt").check()
    page.get_by_label("Prompt", exact=True).fill("two keys & a star")
    draw(page, lambda: page.get_by_role("button", name="Generate").click())
    page.get_by_text("Settings").click()
    page.get_by_label("Seed", exact=True).fill("5")
    draw(page, lambda: page.keyboard.press("Tab"))
    page.get_by_role("button", name="4 tokens").click()
    page.get_by_label("Show the pixels").check()
    showing(page, "from 4 tokens")
    part = page.evaluate("location.hash")
    again = open_page(part)
    showing(again, "“two keys & a star”, decoded from 4 tokens")
    assert source(again) == source(page)
    assert again.get_by_label("Show the pixels").is_checked()
    other = open_page("#picture=magnet&k=2&seed=x&source=99&nonsense=1")
    showing(other, "magnet, decoded from 2 tokens")


def test_two_pictures_are_mixed_by_keyboard_alone(open_page):
    page = open_page()
    page.locator("input[name=task]").first.focus()
    page.keyboard.press("ArrowRight")
    showing(page, "tangerine and desert island: 2 tokens kept, the other 6 of the second")
    finished(page)
    assert page.locator("#seeds img[src]").count() == 6  # from one picture to the other
    page.get_by_label("Tokens that are kept").focus()
    page.keyboard.press("Home")
    seen = []
    for k in range(1, 9):
        showing(page, "all 8 tokens kept" if k == 8 else f"{k} token{'s' if k > 1 else ''} kept")
        assert page.locator("#chips li.on").count() == k
        seen.append(source(page))
        page.keyboard.press("ArrowRight")
    assert len(set(seen)) > 4  # random models may make two alike
    page.locator("#kept").get_by_role("button", name="magnet").focus()
    draw(page, lambda: page.keyboard.press("Enter"))
    showing(page, "magnet and desert island")
    again = open_page(page.evaluate("location.hash"))
    showing(again, "magnet and desert island: all 8 tokens kept")
    assert source(again) == source(page)


def test_variations_of_a_picture_of_ones_own(open_page, tmp_path):
    page = open_page("#task=edit&source=1&class=none")
    showing(page, "tangerine, varied: 2 tokens kept, the other 6 generated")
    path = tmp_path / "good.png"
    path.write_bytes(png(60, 40))
    draw(page, lambda: page.set_input_files("#kept-file", path))
    showing(page, "Your picture, varied: 2 tokens kept")
    assert page.locator("#seeds img[src]").count() == 7  # six variations and the map
    assert page.locator("#film li").count() == 3  # 1, 2 and 4 tokens: with 8 there is no other
    shown = source(page)
    path.write_bytes(b"I am a text.")
    draw(page, lambda: page.set_input_files("#kept-file", path))
    page.locator("#error", has_text="is no picture that this page reads").wait_for()
    assert page.locator("#kept-file").get_attribute("aria-invalid") == "true"
    assert source(page) == shown
    draw(page, lambda: page.locator("select[name=class]").select_option("1"))
    assert page.locator("#error").inner_text() == ""
    showing(page, "Your picture, varied: 2 tokens kept")
    assert "class=1" in page.evaluate("location.hash")


def test_a_search_shows_its_candidates_best_first(open_page):
    page = open_page("#task=search&source=2&prompt=a+key&method=beam&budget=12")
    showing(page, "“a key”, decoded from 8 tokens")
    assert page.get_by_label("A picture").is_hidden()  # nothing to search for
    page.get_by_role("heading", name="12 of 12 candidates").wait_for()
    assert page.locator("#verifier").inner_text().startswith("Here it is the generator itself.")
    levels = page.locator("#levels ol")
    for number in range(3):
        lines = levels.nth(number).locator("li").all_inner_texts()
        scores = [float(line.split(": ")[1].split(",")[0]) for line in lines]
        assert len(scores) == 4
        assert scores == sorted(scores, reverse=True)
        assert all(("continues no. " in line) == (number > 0) for line in lines)
        assert levels.nth(number).locator(".chosen").count() == 1
    chosen = levels.last.locator(".chosen img")
    assert chosen.get_attribute("alt") == "Candidate 1, chosen"
    again = open_page(page.evaluate("location.hash"))
    assert again.get_by_role("spinbutton", name="Candidates").input_value() == "12"
    assert source(again) == source(page)
    page.get_by_role("spinbutton", name="Candidates").fill("1000")
    page.get_by_role("button", name="Search").click()
    page.locator("#error", has_text="Candidates: ").wait_for()
    assert page.get_by_role("spinbutton", name="Candidates").get_attribute("aria-invalid") == "true"
    page.get_by_role("spinbutton", name="Candidates").fill("20")
    page.locator("select[name=method]").select_option("best of all candidates")
    draw(page, lambda: page.get_by_role("button", name="Search").click())
    page.get_by_role("heading", name="20 of 20 candidates").wait_for()
    assert levels.locator("li").count() == 20
    page.get_by_label("Look").check()
    finished(page)
    assert page.locator("#tree").is_hidden()


def test_mistakes_are_named_beside_what_caused_them(open_page, tmp_path):
    page = open_page()
    page.evaluate("window.hacked = false")
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>window.hacked=true</script></svg>"
    shown = source(page)
    for name, data, message in [
        ("text.png", b"I am a text.", "is no picture that this page reads"),
        ("script.svg", script, "is no picture that this page reads"),
        ("bomb.png", bomb(50_000), "at most 40 million pixels"),
        ("large.png", bytes(100 * 2**20), "large.png is too large: 100.0 MB, at most 10 MB"),
        ("cut.png", png(60, 40)[:-40], "is damaged"),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        if name == "large.png":  # which is not even sent
            page.set_input_files("#picture-file", path)
        else:
            draw(page, lambda path=path: page.set_input_files("#picture-file", path))
        page.locator("#error", has_text=message).wait_for()
        path.unlink()
        assert page.locator("#picture-file").get_attribute("aria-invalid") == "true"
        assert source(page) == shown
    assert not page.evaluate("window.hacked")
    page.get_by_text("Settings").click()
    page.get_by_label("Decoder steps").fill("1000")
    page.keyboard.press("Tab")
    page.locator("#error", has_text="Decoder steps").wait_for()
    assert page.get_by_label("Decoder steps").get_attribute("aria-invalid") == "true"
    page.get_by_label("Decoder steps").fill("2")
    draw(page, lambda: page.keyboard.press("Tab"))
    assert page.locator("#error").inner_text() == ""


def test_another_task_keeps_what_was_asked_for(open_page):
    page = open_page("#source=2&prompt=a+key&k=8")
    draw(page, page.get_by_label("Search", exact=True).check)
    assert page.get_by_label("Prompt", exact=True).input_value() == "a key"
    draw(page, page.get_by_label("Look", exact=True).check)
    draw(page, page.get_by_label("A class", exact=True).check)
    classes = page.locator("[name=class]")
    draw(page, lambda: classes.select_option(index=2))
    chosen = classes.input_value()
    draw(page, page.get_by_label("Search", exact=True).check)
    assert classes.input_value() == chosen


def test_work_can_be_stopped_and_begun_anew(open_page):
    page = open_page("#source=2&prompt=a+key&k=8")
    first = source(page)
    page.route("**/draw", lambda route: None)  # an answer that never comes
    again = page.get_by_role("button", name="Again with another seed")
    again.click()
    page.locator("#view[aria-busy=true]").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#status", has_text="Stopped.").wait_for()
    page.locator("#view[aria-busy=false]").wait_for()
    assert source(page) == first
    again.click()
    page.unroute("**/draw")
    draw(page, again.click)  # the one before is given up
    assert page.get_by_label("Seed", exact=True).input_value() == "3"
    assert source(page) != first


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_has_no_fault_that_axe_finds(open_page, width, scheme):
    package = "axe_playwright_python"
    pytest.importorskip(package, reason="needs pip install axe-playwright-python")
    axe = resources.files(package).joinpath("axe.min.js").read_text("utf-8")
    for part in (
        "#source=0",
        "#source=2&prompt=a+key",
        "#task=edit",
        "#task=search&source=1&method=beam",
    ):
        page = open_page(
            part,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            bypass_csp=True,
        )
        page.get_by_text("Settings").click()
        page.evaluate(axe)
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 30
        assert not [(fault["id"], fault["nodes"]) for fault in found["violations"]]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
