"""The facts about a model: those behind `flextok info`, and the model card."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from flextok.printing import printable
from flextok.schema import to_mapping

if TYPE_CHECKING:
    from flextok.hub import Pretrained

MARK = "<!-- written by flextok; without this line it is left alone -->"
_LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0")  # the hub's identifiers


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
    for key in ("provenance", "evaluation"):  # a card has a table of its own
        metadata.pop(key, None)
    for key, value in metadata.items():
        label = key.replace("_", " ")
        if key == "class_names" and isinstance(value, list):
            conditioner = facts["config"].get("conditioner")
            if conditioner is not None and conditioner["name"] == "class":
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
    headline = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    name = kind.__name__
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    rows = [f"| {cell(label)} | {cell(value)} |" for label, value in summary(facts).items()]
    printed = json.dumps(facts["config"], indent=2)
    return "\n".join(
        [
            *("---", front.rstrip(), "---", MARK, ""),
            *(f"# {name}", "", headline, ""),
            *("```python", f"from flextok import {name}", ""),
            *(f'model = {name}.from_pretrained("this folder or hub id")', "```", ""),
            *("## Numbers", "", "| | |", "|---|---|", *rows, ""),
            *evaluation_table(metadata.get("evaluation", [])),
            *("## Config", "", "```json", printed, "```", ""),
        ]
    )


def front_matter(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a card that the hub reads, under the hub's names."""
    metadata, kind = facts["metadata"], facts["model_type"]
    conditioner = facts["config"].get("conditioner")
    task = "image-to-image"
    if conditioner is not None:
        is_text = conditioner["name"] == "text"
        task = "text-to-image" if is_text else "unconditional-image-generation"
    tags = list(dict.fromkeys(("flextok", kind)))
    front: dict[str, Any] = {"library_name": "flextok", "pipeline_tag": task, "tags": tags}
    license_name = str(provenance_of(facts).get("license", ""))
    if license_name in _LICENSES:
        front["license"] = license_name
    elif license_name:
        plain = re.sub(r"[^a-z0-9.]+", "-", license_name.lower())
        front |= {"license": "other", "license_name": plain}
    if isinstance(sets := metadata.get("datasets"), list):
        front["datasets"] = sets
    if base := base_model(metadata):
        front["base_model"] = base
    if rows := metadata.get("evaluation"):
        front["model-index"] = [{"name": f"flextok {kind}", "results": index_of(rows, task)}]
    return front


def base_model(metadata: Mapping[str, Any]) -> str | None:
    """The hub id of the model that this one was made from: trained on from, converted from, or
    whose tokens it generates. None where all lie in folders."""
    start = metadata.get("start")
    begun = list(start.values()) if isinstance(start, Mapping) else []
    source = provenance_of({"metadata": metadata}).get("source")
    names = [str(name).partition(" ")[0] for name in (*begun, source, metadata.get("tokenizer"))]
    return next((name for name in names if is_hub_id(name)), None)


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub's owner/name, as far as its spelling shows."""
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)
    return bool(plain) and not Path(name).exists()


def public_name(data: str) -> str:
    """A data set's name, or its spec, with each path in it cut to its last part; ids and addresses
    stay."""
    if data.startswith(("{", "[")):
        try:
            spec = yaml.safe_load(data)
        except yaml.YAMLError:
            spec = None
        if isinstance(spec, Mapping | list):
            known = public_spec(spec)
            if known == spec:
                return data
            flat = yaml.safe_dump(known, default_flow_style=True, sort_keys=False, width=math.inf)
            return flat.strip()
    return data if is_hub_id(data) and not data.endswith(".tar") else last_part(data)


def public_spec(spec: Any) -> Any:
    """As public_name, of what a spec holds."""
    if isinstance(spec, Mapping):
        hub = spec.get("name") == "huggingface" and is_hub_id(str(spec.get("path")))
        kept = {"path"} if hub else set()
        return {key: value if key in kept else public_spec(value) for key, value in spec.items()}
    if isinstance(spec, list):
        return [public_spec(value) for value in spec]
    return last_part(spec) if isinstance(spec, str) else spec


def last_part(text: str) -> str:
    """A path's last part; an address of the web or of a store as it is."""
    if re.match(r"(?!file:)\w[\w+.-]+://", text):
        return text
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] or text


def evaluation_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a card states of an evaluation's report: a row for each number of tokens, each number of
    steps and guidance. Raises ValueError for another document."""
    try:
        settings, results = report["settings"], report["results"]
        keys = ("num_tokens", "num_steps", "guidance_scale", "count")
        return [
            {
                "data": public_name(str(settings["data"])) if settings["data"] else "",
                **{key: row[key] for key in keys if row[key] is not None},
                "scores": {name: float(f"{score:.6g}") for name, score in row["scores"].items()},
            }
            for row in results
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is no report of flextok evaluate: it lacks {error}") from None


def index_of(rows: Sequence[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """Rows of `evaluation_rows` as the hub's model-index has results."""
    found = []
    for row in rows:
        others = [f"{row[key]:g} {name}" for key, name in differing(rows).items() if key in row]
        how = ", ".join([f"{row['num_tokens']} tokens", *others])
        metrics = [
            {"type": name, "value": score, "name": f"{name}, {how}"}
            for name, score in row["scores"].items()
        ]
        data = row["data"] or "unnamed"
        dataset = {"name": data, "type": data}
        found.append({"task": {"type": task}, "dataset": dataset, "metrics": metrics})
    return found


def differing(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of the ways to decode, key -> name, those in which rows differ."""
    ways = {"num_steps": "steps", "guidance_scale": "guidance"}
    return {key: name for key, name in ways.items() if len({row.get(key) for row in rows}) > 1}


def evaluation_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of `evaluation_rows` as lines of Markdown."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    ways = differing(rows)
    head = ["data", "tokens", *ways.values(), "images", *names]
    lines = ["## Evaluation", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        scores = [f"{row['scores'][name]:g}" if name in row["scores"] else "" for name in names]
        how = [f"{row[key]:g}" if key in row else "" for key in ways]
        cells = [row["data"], str(row["num_tokens"]), *how, str(row["count"]), *scores]
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return [*lines, ""]


def cell(text: str) -> str:
    return printable(text.replace("|", "\\|").replace("\n", " "))
