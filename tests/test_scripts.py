"""The scripts beside the package start: what they import is still where they look for it."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import flextok

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "experiments", "scripts")
    for path in (ROOT / folder).glob("*.py")
    if "argparse" in path.read_text("utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_teaches_its_use(script, monkeypatch, capsys):
    """benchmarks/few_steps.py once imported what had moved, and nothing noticed."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend((ROOT / script).parent)  # as python does
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_architecture_page_shows_every_part(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import architecture

    def names(svg: str) -> list[str]:
        return re.findall(r'class="name">([^<]+)<', svg)

    committed = architecture.PICTURE.read_text("utf-8")
    assert names(committed) == names(architecture.draw()), "run python scripts/architecture.py"
    shown = {name.rstrip("/").removesuffix(".py") for name in names(committed)}
    assert shown == set(architecture.parts())


def test_the_gallery_shows_every_model():
    page = (ROOT / "docs/gallery.md").read_text("utf-8")
    shown = re.findall(r"\(pictures/gallery/([\w-]+)\.webp\)", page)
    assert sorted(shown) == flextok.list_models(), "run make gallery, and show what it wrote"
    for name in shown:
        with Image.open(ROOT / f"docs/pictures/gallery/{name}.webp") as image:
            assert image.width > 500
