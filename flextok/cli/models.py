"""`flextok info | convert`: what a model is, and published ones in our layout."""

import json
from pathlib import Path
from typing import Any

from flextok import places
from flextok.card import model_facts, summary
from flextok.cli.arguments import Convert, Info, Models
from flextok.cli.common import spare_run
from flextok.files import check_writable
from flextok.generators import Generator
from flextok.pipeline import load, load_tokenizer_of
from flextok.places import check_layout, list_models
from flextok.printing import printable
from flextok.tokenizers import FlexTok, Tokenizer


def run_models(options: Models) -> list[dict[str, Any]]:
    found = []
    for name in list_models():
        model = load(places.RELEASES / name, "meta")  # the weights stay in their file
        if isinstance(model, Generator):
            kind, takes = "generator", "by " + model.config.conditioner["name"]
        else:
            kind = "tokenizer" if isinstance(model, Tokenizer) else model.model_type
            takes = f"{model.image_size} x {model.image_size} pixels"
        num_tokens = model.sizes()[1]
        print(f"{name:<18}{kind}, {takes}" + (f", {num_tokens} tokens" if num_tokens else ""))
        found.append({"name": name, "kind": kind, "takes": takes, "num_tokens": num_tokens})
    return found


def run_info(options: Info) -> dict[str, Any]:
    facts = model_facts(load(options.model, "meta"))  # the weights stay in their file
    lines = summary(facts)
    width = max(map(len, lines)) + 2
    for label, value in lines.items():
        print(f"{printable(label):<{width}}{printable(value)}")
    print(f"config {json.dumps(facts['config'], indent=2)}")
    return facts


def run_convert(options: Convert) -> dict[str, Any]:
    check_writable(options.output, "output", folder=True)
    spare_run(Path(options.output))
    overrides = {}
    for entry in options.overrides:
        key, equals, text = entry.partition("=")
        if not equals:
            raise ValueError(f"override {entry!r} must look like key=value, e.g. max_timestep=1.0")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    model = load(options.input, overrides=overrides)
    if options.to == "diffusers":
        save_for_diffusers(model, options)
    elif options.to == "published":
        if not isinstance(model, FlexTok):
            raise ValueError(
                f"{options.input} is a {model.model_type}: --to published takes a FlexTok"
            )
        model.save_published(options.output)
    else:
        model.save_pretrained(options.output)
    print(f"wrote {printable(options.output)}")
    return model_facts(model)


def save_for_diffusers(model: Any, options: Convert) -> None:
    """Write a FlexTok, or a generator with its FlexTok. Raises ValueError for another model."""
    from flextok.integrations.diffusers import AutoencoderFlexTok, FlexTokGenerator, FlexTokPipeline

    if isinstance(model, Generator):
        check_layout(Path(options.output), "pipeline")
        tokenizer = load_tokenizer_of(model, options.input)
        parts = (AutoencoderFlexTok.from_flextok(tokenizer), FlexTokGenerator.from_flextok(model))
        FlexTokPipeline(*parts).save_pretrained(options.output)
    else:
        written = AutoencoderFlexTok.from_flextok(model)
        check_layout(Path(options.output), "diffusers")
        written.save_pretrained(options.output)
