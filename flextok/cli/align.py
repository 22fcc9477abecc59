"""`flextok align`: how far generated scenes show their prompts."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextok.cli.common import (
    add_command,
    add_solving,
    data_spec,
    decoding_options,
    pick_device,
    token_lengths,
)


def add_commands(commands: Any) -> None:
    align = add_command(
        commands,
        "align",
        run_align,
        "how well generated emoji scenes show their prompts, against the number of tokens",
        "A small classifier, trained on real scenes, reads generated ones; the same "
        "pictures scored against shuffled prompts are the control.",
        "flextok align emoji-text --limit 64 --json align.json \\\n"
        '    --data "{name: emoji_scenes, max_objects: 2, vocabulary: basic, prompts: held_out}"',
        *("--tokenizer", "--data", "--limit", "--num-tokens", "--seed", "--device", "--json"),
    )
    align.add_argument("model", help="folder or hub id of a generator")
    align.add_argument("--probe", metavar="FILE", help="keep the classifier here, or take it")
    align.add_argument("--probe-steps", type=int, default=1500, help="its training, if needed")
    add_solving(align)


def run_align(options: argparse.Namespace) -> dict[str, Any]:
    from flextok.data.datasets import DATASETS
    from flextok.data.emoji import EmojiScenes
    from flextok.evaluation.alignment import alignment, format_report
    from flextok.evaluation.scene_probe import Probe, train_probe
    from flextok.pipeline import decoding_options as checked
    from flextok.pipeline import is_generator, load_model, load_tokenizer_of
    from flextok.schema import build

    spec = data_spec(options.data or "emoji_scenes:validation")
    scenes = build(DATASETS, spec, "dataset")
    if not isinstance(scenes, EmojiScenes):
        raise ValueError("--data must be emoji_scenes: the classifier reads those")
    generator = load_model(options.model, pick_device(options.device))
    if not is_generator(generator):
        raise ValueError(f"{options.model} is a {generator.model_type} model, not a generator")
    device = next(generator.parameters()).device
    tokenizer = load_tokenizer_of(generator, options.model, options.tokenizer, device)
    lengths = token_lengths(options.num_tokens, tokenizer, generator.num_tokens)
    decoding = checked(tokenizer, decoding_options(options))  # before the classifier is trained
    if options.probe and Path(options.probe).is_file():
        probe = Probe.load(options.probe).to(device)
    else:
        known = {"split": "train", "prompts": "train" if scenes.prompts == "held_out" else "all"}
        real = build(DATASETS, {**spec, **known}, "dataset")
        probe = train_probe(real, tokenizer.image_size, options.probe_steps, device=device)
        if options.probe:
            probe.save(options.probe)
    report = alignment(
        generator,
        tokenizer,
        probe,
        scenes,
        lengths,
        options.limit or 256,
        options.seed,
        decoding=decoding,
    )
    print(format_report(report))
    return {"model": options.model, "data": spec, **asdict(report)}
