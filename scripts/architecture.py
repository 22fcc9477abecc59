"""Draw docs/pictures/architecture.svg from the code: the parts of the package in rows, each with
the first sentence of its docstring. A part imports from its own row and the rows below it only.
Run this again when a part or such a sentence changes.

python scripts/architecture.py
"""

import ast
import html
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flextok"
PICTURE = ROOT / "docs/pictures/architecture.svg"
WIDTH, HEIGHT, GAP, IN_A_ROW = 200, 92, 12, 6
STYLE = """text { font: 12px sans-serif; fill: #222 } .name { font-weight: bold; font-size: 14px }
rect { fill: #fff; stroke: #bbb } .row { fill: #f3efec; stroke: none }"""


def parts() -> dict[str, list[Path]]:
    """The files of each part, a module or a folder beside flextok/__init__.py, by its name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def rows() -> list[list[str]]:
    """The floors of tests/test_architecture.py, which asserts that imports go down only; the
    highest comes first."""
    tree = ast.parse((ROOT / "tests/test_architecture.py").read_text("utf-8"))
    (floors,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    found = eval(compile(ast.Expression(floors), "FLOORS", "eval"))
    return [sorted(names) for names in reversed(found)]


def first_sentence(files: list[Path]) -> str:
    source = next((path for path in files if path.name == "__init__.py"), files[0])
    text = ast.get_docstring(ast.parse(source.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def box(name: str, files: list[Path], x: int, y: int) -> str:
    is_folder = files[0].parent != PACKAGE
    lines = textwrap.wrap(first_sentence(files), 31, max_lines=4, placeholder=" ...")
    texts = [(f"{name}/" if is_folder else f"{name}.py", "name"), *((line, "") for line in lines)]
    drawn = [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>']
    for i, (text, kind) in enumerate(texts):
        style = f' class="{kind}"' if kind else ""
        drawn.append(f'<text x="{x + 8}" y="{y + 20 + 16 * i}"{style}>{html.escape(text)}</text>')
    return "\n".join(drawn)


def draw() -> str:
    found = parts()
    width = IN_A_ROW * (WIDTH + GAP) + GAP
    drawn, y = [], 0
    for row in rows():
        lines = -(-len(row) // IN_A_ROW)
        high = lines * (HEIGHT + GAP) + GAP
        drawn.append(f'<rect class="row" x="0" y="{y}" width="{width}" height="{high}" rx="6"/>')
        for i, name in enumerate(row):
            at = (GAP + i % IN_A_ROW * (WIDTH + GAP), y + GAP + i // IN_A_ROW * (HEIGHT + GAP))
            drawn.append(box(name, found[name], *at))
        y += high + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y - GAP}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *drawn, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), "utf-8")
    sys.stdout.write(f"{PICTURE}\n")
