"""`flextok info | convert`: what a model is, and published ones in our layout."""

import argparse
import json
from typing import Any

from flextok.cli.common import TOKENIZER, add_command
from flextok.printing import printable


def add_commands(commands: Any) -> None:
    info = add_command(
        commands,
        "info",
        run_info,
        "a model's config, sizes, vocabulary, bits per image and provenance",
        "Reads the header of the weight file only, so it is quick for the largest models too. "
        "What a published file left open is listed as assumed.",
        "flextok info emoji-class\n"
        "flextok info EPFL-VILAB/flextok_d12_d12_in1k --json | jq .parameters.total",
        "--json",
    )
    info.add_argument(
        "model",
        nargs="?",
        default=TOKENIZER,
        help=f"folder, weight file, name or hub id, published ones too; default {TOKENIZER}",
    )

    add_command(
        commands,
        "models",
        run_models,
        "the models that come with the package",
        "Lists tokenizers and generators. Their names serve wherever a command takes a model.",
        "flextok models\nflextok info emoji-class",
        "--json",
    )

    convert = add_command(
        commands,
        "convert",
        run_convert,
        "write a published model in our layout",
        "Checks that every tensor is used and none is missing, then writes "
        "model.safetensors, config.json and a model card.",
        "flextok convert EPFL-VILAB/flextok_d12_d12_in1k outputs/flextok_d12\n"
        "flextok convert weights.safetensors outputs/mine max_timestep=1.0 vae.scaling_factor=0.5",
        "--json",
    )
    convert.add_argument("input", help="folder, weight file, hub id, or owner/name/file.bin")
    convert.add_argument("output", help="the folder to write")
    convert.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config fields to change, e.g. max_timestep=1.0 or vae.scaling_factor=0.5",
    )


def run_models(options: argparse.Namespace) -> list[dict[str, Any]]:
    from flextok.pipeline import is_generator, load_model
    from flextok.places import released

    found = []
    for name in released():
        model = load_model(name, "meta")  # the weights stay in their file
        if is_generator(model):
            kind, takes = "generator", "by " + model.config.conditioner["name"]
        else:
            kind, takes = "tokenizer", f"{model.image_size} x {model.image_size} pixels"
        print(f"{name:<18}{kind}, {takes}, {model.num_tokens} tokens")
        found.append({"name": name, "kind": kind, "takes": takes, "num_tokens": model.num_tokens})
    return found


def run_info(options: argparse.Namespace) -> dict[str, Any]:
    from flextok.card import model_facts, summary
    from flextok.pipeline import load_model

    facts = model_facts(load_model(options.model, "meta"))  # the weights stay in their file
    lines = summary(facts)
    width = max(map(len, lines)) + 2
    for label, value in lines.items():
        print(f"{printable(label):<{width}}{printable(value)}")
    print(f"config {json.dumps(facts['config'], indent=2)}")
    return facts


def run_convert(options: argparse.Namespace) -> dict[str, Any]:
    from flextok.card import model_facts
    from flextok.pipeline import load_model

    overrides = {}
    for entry in options.overrides:
        key, equals, text = entry.partition("=")
        if not equals:
            raise ValueError(f"override {entry!r} must look like key=value, e.g. max_timestep=1.0")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    model = load_model(options.input, overrides=overrides)
    print(f"wrote {printable(model.save_pretrained(options.output))}")
    return model_facts(model)
