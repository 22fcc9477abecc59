"""Golden numbers of the published TiTok, MaskGIT-VQGAN and MaskGIT (bytedance/1d-tokenizer at
942a96f), from tiny models with seeded random weights. A case is one xz-compressed safetensors
file of float16-exact weights and of inputs and outputs; a suffix _4 says that every fourth value is
kept.
"""

import functools
import json
import lzma
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

FOLDER = Path(__file__).parent


@functools.cache
def load_case(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published state dict of a case, and its inputs and outputs."""
    file = lzma.decompress((FOLDER / f"{name}.safetensors.xz").read_bytes())
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "io": {}}
    upcast = {torch.float16: torch.float32, torch.int16: torch.int64}
    for key, value in safetensors.torch.load(file).items():
        part, _, name = key.partition("/")
        parts[part][name] = value.to(upcast.get(value.dtype, value.dtype))
    return parts["weights"], parts["io"]


@functools.cache
def golden() -> dict:
    return json.loads((FOLDER / "golden.json").read_text())


@functools.cache
def published_shapes() -> dict[str, dict[str, Tensor]]:
    """Meta tensors under every key of the full-size published models, by model name."""
    shapes: dict[str, dict[str, Tensor]] = {}
    for line in lzma.decompress((FOLDER / "keys.txt.xz").read_bytes()).decode().splitlines():
        if name := re.match(r"# (\w+)[: ].*\(|# (\w+):", line):
            current = shapes.setdefault(name[1] or name[2], {})
        elif not line.startswith("#"):
            key, shape = line.split("\t")
            current[key] = torch.empty(json.loads(shape), device="meta")
    return shapes


def close(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
