"""`flextok align`: how far generated scenes show their prompts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextok.cli.common import data_spec, pick_device, token_lengths
from flextok.cli.measure_arguments import Align
from flextok.cli.options import decoding_options
from flextok.emoji.alignment import alignment, format_report
from flextok.emoji.probe import Probe, train_probe
from flextok.emoji.scenes import EmojiScenes
from flextok.generators import Generator
from flextok.pipeline import load_model, load_tokenizer_of
from flextok.registry import make_dataset


def run_align(options: Align) -> dict[str, Any]:
    spec = data_spec(options.data or "emoji_scenes:validation")
    scenes = make_dataset(spec)
    if not isinstance(scenes, EmojiScenes):
        raise ValueError("--data must be emoji_scenes: the classifier reads those")
    generator = load_model(options.model, pick_device(options.device))
    if not isinstance(generator, Generator):
        raise ValueError(f"{options.model} is a {generator.model_type} model, not a generator")
    tokenizer = load_tokenizer_of(generator, options.model, options.tokenizer, generator.device)
    lengths = token_lengths(options.num_tokens, tokenizer, generator.num_tokens)
    decoding = decoding_options(options)
    tokenizer.decode_options(decoding)  # before the classifier is trained
    if options.probe and Path(options.probe).is_file():
        probe = Probe.load(options.probe).to(generator.device)
    else:
        known = {"split": "train", "prompts": "train" if scenes.prompts == "held_out" else "all"}
        real = make_dataset({**spec, **known})
        probe = train_probe(
            real, tokenizer.image_size, options.probe_steps, device=generator.device
        )
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
