"""Words that have to be decoded stay out of what people read: metaphors for what models, tests and
optimisers do."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "flextok").rglob("*.py")),  # docstrings, comments, errors and help texts
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "experiments").rglob("*.yaml")),
    *sorted((ROOT / "notebooks").glob("*.py")),  # test_documents.py pairs them with the .ipynb
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "scripts").glob("*.py")),
]
THINGS = (
    "tokens?|models?|(?:de|en)coders?|generators?|tokenizers?|teachers?|registers?|latents?|"
    "networks?|drawers?|quantizers?|indices|index|codes?|prefix|prefixes"
)
# what must not be written: what to write instead
INSTEAD = {
    rf"\b(?:{THINGS}) (?:\w+ )?(?:says?|said|speaks?|tells?|told|knows?|knew|believes?)\b": (
        "a model predicts, generates or decodes; tokens describe or determine"
    ),
    r"\b(?:what to|to|that|soon) say\b|\bby heart\b": "predicts, describes, memorised",
    r"\bdo(?:es)? not (?:say|know)\b|\b(?:package|hub|config|file) (?:says|knows)\b": "states, has",
    r"\bbe told\b|\bcan(?:not)? tell\b|\bcan (?:hardly )?be made out\b": "is recognisable",
    r"\bturn(?:s|ed|ing)? (?:the )?(?:\w+' )?matrices\b": "updates matrices",
    r"\bof [\d,]+ kinds\b|\bkinds of (?:tokens?|codes?|indices)\b": "a codebook has a size",
    r"\bheld against\b|\btests? (?:\w+ )?holds?\b|\bhold against\b": "a test asserts or compares",
    r"\bteach(?:es)?\b|\btaught\b(?!\()|\bforetold\b": "explains, predicted",
    r"\btoy world\b|\btwo other rooms\b|\bthe house\b": "the field's word",
}


def found_in(text: str) -> list[tuple[str, str]]:
    """The private words of a text, also over the ends of lines, and what to write instead."""
    text = re.sub(r"\s*\n\s*(?:#\s*)?", " ", text)
    return [
        (text[max(0, match.start() - 30) : match.end() + 30], instead)
        for pattern, instead in INSTEAD.items()
        for match in re.finditer(pattern, text, re.I)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_private_words(page):
    assert not found_in(page.read_text("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "each token soon says something of its own",
        "Muon turns the\n  # blocks' matrices",
        "most can be told from 16 tokens",
        "256 tokens of 4,096 kinds",
        "a test holds it",
        "32 tokens that say the 64 indices",
    ],
)
def test_the_check_finds_them(text):
    assert found_in(text)
