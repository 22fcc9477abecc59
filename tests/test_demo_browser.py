"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import json
import shutil
import urllib.error
import urllib.request

import pytest
from helpers.files import bomb, encoded, png
from helpers.models import tiny_gpt, tiny_tokenizer
from helpers.processes import served
from PIL import Image

from flextok.pipeline import remember_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("gradio", reason="needs pip install 'flextok[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
]
SECONDS = 1000.0
PATIENCE = 300 * SECONDS  # the machine may be busy


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
    gpt = tiny_gpt(conditioner={"name": "text", "encoder": encoder})
    remember_tokenizer(gpt, folder / "gpt", tokenizer, str(folder / "tokenizer"))
    gpt.save_pretrained(folder / "gpt")
    studio = Studio([str(folder / "tokenizer"), str(folder / "gpt")])
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
def page(server, browser):
    """The loaded page; afterwards no request may have gone anywhere else."""
    page = browser.new_page(viewport={"width": 1200, "height": 1100})
    page.set_default_timeout(PATIENCE)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server)
    page.wait_for_selector("#drop input", state="attached")
    yield page
    page.close()
    strangers = [url for url in asked if not url.startswith((server, "data:", "blob:"))]
    assert len(asked) > 5
    assert not strangers


def good_picture(tmp_path):
    path = tmp_path / "good.png"
    path.write_bytes(png(60, 40))
    return path


def picture(page) -> str:
    return page.locator("#result img").last.get_attribute("src")


def test_upload_slide_and_download(page, tmp_path):
    page.set_input_files("#drop input", good_picture(tmp_path))
    page.wait_for_selector("#filmstrip figure:nth-child(4)")  # 1, 2, 4, 8 tokens
    whole = picture(page)
    page.get_by_label("number input for Tokens").first.fill("2")
    page.keyboard.press("Tab")
    page.wait_for_function(
        "old => [...document.querySelectorAll('#result img')].at(-1).src != old", arg=whole
    )
    assert "2 tokens" in page.inner_text("#result")
    with page.expect_download() as download:
        page.locator("#result a[download]").click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)
    assert download.value.suggested_filename == "flextok-2.png"
    assert Image.open(saved).size == (16, 16)
    assert encoded(saved.read_bytes()) == picture(page)
    page.get_by_role("button", name="Several seeds").click()
    page.wait_for_selector("#seeds figure:nth-child(4)")
    page.get_by_role("button", name="How many tokens").click()
    page.wait_for_function("document.querySelector('#need').innerText.includes('dB')")


def test_a_picture_grows_from_a_prompt(page):
    page.get_by_role("tab", name="From a prompt").click()
    page.get_by_label("Prompt").fill("a red heart")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(".ft-grown figure:nth-child(4)")
    grown = page.locator(".ft-grown img").evaluate_all("all => all.map(img => img.src)")
    assert len(set(grown)) == 4
    assert page.locator(".ft-generated img").get_attribute("src") == grown[-1]
    with page.expect_download() as download:
        page.locator(".ft-generated a[download]").click()
    assert download.value.suggested_filename == "flextok-8.png"
    assert encoded(download.value.path().read_bytes()) == grown[-1]


def test_hostile_uploads_get_a_message_and_the_page_goes_on(page, tmp_path):
    page.evaluate("window.hacked = false")
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>window.hacked=true</script></svg>"
    for name, data, message in [
        ("text.png", b"I am a text.", "is no picture that this page reads"),
        ("script.svg", script, "is no picture that this page reads"),
        ("bomb.png", bomb(50_000), "at most 40 million pixels"),
        ("large.png", bytes(100 * 2**20), "large.png is too large: 100.0 MB, at most 10 MB"),
        ("cut.png", png(60, 40)[:-40], "is damaged"),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        page.set_input_files("#drop input", path)
        page.get_by_text(message).first.wait_for()
        path.unlink()
        page.reload()
        page.wait_for_selector("#drop input", state="attached")
    assert not page.evaluate("window.hacked")
    page.set_input_files("#drop input", good_picture(tmp_path))
    page.wait_for_selector("#result img")


def post(address: str, body: bytes) -> tuple[int, bytes]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(address, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (urllib.error.URLError, ConnectionError):  # hung up while we were still sending
        return 413, b""


def test_hostile_requests_without_the_page(server):
    join = server + "gradio_api/queue/join"
    assert post(join, bytes(100 * 2**20))[0] == 413
    assert post(server + "gradio_api/upload", b"x")[0] == 404
    with urllib.request.urlopen(server + "config", timeout=60) as answer:
        config = json.load(answer)
    take = next(d["id"] for d in config["dependencies"] if d["api_name"] == "take")
    call = {"data": ["/etc/passwd"], "fn_index": take, "session_hash": "hostile"}
    assert post(join, json.dumps(call).encode())[0] == 200
    with urllib.request.urlopen(f"{server}gradio_api/queue/data?session_hash=hostile") as answer:
        text = answer.read().decode()
    assert '"success":false' in text.replace(" ", "")
    assert "root:" not in text
    with urllib.request.urlopen(server, timeout=60) as answer:
        assert answer.status == 200
