"""Imports go down only: the floors of the house, held by reading the import statements."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flextok"
FLOORS = [
    {
        *(
            "schema",
            "files",
            "images",
            "printing",
            "card",
            "storage",
            "places",
            "convert",
            "hub",
            "draws",
        ),
        *("nn", "quantizers", "flow", "vae", "autoencoder", "losses"),
    },
    {"tokenizers", "generators", "objectives"},
    {"cpu"},
    {"pipeline", "tree_search", "editing", "data", "evaluation", "viz", "emoji"},
    {"config", "registry"},
    {"training"},
    {"demo", "bench", "integrations"},
    {"cli"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in FLOOR, f"{part} stands on no floor: add it to FLOORS"
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "flextok" and len(pieces) > 1 and pieces[1] in FLOOR:
            assert FLOOR[pieces[1]] <= FLOOR[part], f"{part} imports {name} from a floor above"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("lightning", ("training", "data/datamodule.py")),
        ("torch_fidelity", ("evaluation/",)),
        ("diffusers", ("integrations/", "vae.py")),
        ("starlette", ("demo/",)),
        ("omegaconf", ("config.py", "cli/common.py", "training/run.py")),
    ],
)
def test_frameworks_stay_in_their_rooms(library, allowed):
    for path in MODULES:
        place = path.relative_to(PACKAGE).as_posix()
        used = any(name.split(".")[0] == library for name in imports(path))
        assert not used or place.startswith(allowed), f"{place} imports {library}"


def test_only_the_registry_and_the_commands_know_the_emoji():
    for path in MODULES:
        place = path.relative_to(PACKAGE).as_posix()
        if any(name.startswith("flextok.emoji") for name in imports(path)):
            assert place.startswith(("emoji/", "registry.py", "cli/", "demo/")), place


def test_what_test_modules_share_lies_in_helpers():
    for path in Path(__file__).parent.glob("*.py"):
        for name in imports(path):
            assert not name.startswith(("test_", "conftest")), f"{path.name} imports {name}"
