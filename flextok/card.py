"""The facts about a model: those behind `flextok info`, and the model card."""

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from flextok.printing import printable
from flextok.schema import to_mapping

if TYPE_CHECKING:
    from flextok.hub import Pretrained

MARK = "<!-- written by flextok; without this line it is left alone -->"
_LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0")  # identifiers that the hub knows


def model_facts(model: "Pretrained") -> dict[str, Any]:
    """A model's type, config, sizes, vocabulary, bits per image and metadata, as plain data."""
    image_size, num_tokens, vocab_size = model.sizes()
    parts = {name: count_parameters(child) for name, child in model.named_children()}
    return {
        "model_type": model.model_type,
        "image_size": image_size,
        "num_tokens": num_tokens,
        "vocab_size": vocab_size,
        # None for a continuous bottleneck
        "bits_per_image": num_tokens * math.log2(vocab_size) if vocab_size else None,
        "parameters": {"total": count_parameters(model), **{k: n for k, n in parts.items() if n}},
        "config": to_mapping(model.config),
        "metadata": dict(model.metadata),
    }


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def summary(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts in a few short lines, by label."""
    vocab_size, bits = facts["vocab_size"], facts["bits_per_image"]
    total, *parts = facts["parameters"].items()
    detail = ", ".join(f"{name} {millions(n)}" for name, n in parts)
    lines = {
        "type": facts["model_type"],
        "parameters": f"{millions(total[1])} ({detail})",
    }
    if facts["num_tokens"]:  # an autoencoder has none
        lines["tokens"] = str(facts["num_tokens"])
        lines["vocabulary"] = f"{vocab_size:,}" if vocab_size else "none (continuous)"
    if bits:
        lines["bits per image"] = f"{bits:,.0f} ({bits / 8:,.0f} bytes)"
    if facts["image_size"]:
        lines["image size"] = f"{facts['image_size']} px"
    metadata = {**provenance_of(facts), **facts["metadata"]}
    metadata.pop("provenance", None)
    for key, value in metadata.items():
        label = key.replace("_", " ")
        if key == "class_names" and isinstance(value, list):
            lines["classes"] = str(len(value))
        elif isinstance(value, list):
            lines[label] = "; ".join(map(str, value)) or "nothing"
        elif isinstance(value, Mapping):
            lines |= {f"{label} {k}": f"{v}" for k, v in value.items()}
        else:
            lines[label] = f"{value}"
    return lines


def provenance_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    provenance = facts["metadata"].get("provenance")
    return provenance if isinstance(provenance, dict) else {}


def millions(number: int) -> str:
    return f"{number / 1e6:,.1f}M"


def model_card(model: "Pretrained", config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """A README.md for the model's folder or hub page: use, numbers known, and the config and
    metadata given, which name no path of this machine."""
    facts = model_facts(model) | {"config": config, "metadata": metadata}
    # the class as one imports it: of a sharded model FSDP2 makes another
    kind = next(cls for cls in type(model).__mro__ if "model_type" in vars(cls))
    headline = (kind.__doc__ or "").strip().partition("\n")[0]
    name = kind.__name__
    license_name = str(provenance_of(facts).get("license", ""))
    front = ["library_name: flextok", "tags:", "- flextok", f"- {facts['model_type']}"]
    if license_name in _LICENSES:
        front.append(f"license: {license_name}")
    elif license_name:
        plain = re.sub(r"[^a-z0-9.]+", "-", license_name.lower())
        front += ["license: other", f"license_name: {plain}"]
    rows = [f"| {cell(label)} | {cell(value)} |" for label, value in summary(facts).items()]
    printed = json.dumps(facts["config"], indent=2)
    return "\n".join(
        [
            *("---", *front, "---", MARK, ""),
            *(f"# {name}", "", headline, ""),
            *("```python", f"from flextok import {name}", ""),
            *(f'model = {name}.from_pretrained("this folder or hub id")', "```", ""),
            *("## Numbers", "", "| | |", "|---|---|", *rows, ""),
            *("## Config", "", "```json", printed, "```", ""),
        ]
    )


def cell(text: str) -> str:
    return printable(text.replace("|", "\\|").replace("\n", " "))
