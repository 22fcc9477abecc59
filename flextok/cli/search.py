"""`flextok search`: the tokens whose image fits a class or a prompt best."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flextok import viz
from flextok.cli.arguments import WELL_KNOWN, Search
from flextok.cli.common import check_folder, data_spec, pick_device, spare_others
from flextok.cli.measure import check_probe_file, probe_for
from flextok.cli.options import SAMPLING, chosen, decoding_options, refuse_given
from flextok.emoji.alignment import caption_facts, scene_verifier
from flextok.emoji.probe import fact_sizes, packaged_probe
from flextok.emoji.scenes import EmojiScenes
from flextok.generators import GPT, Generator
from flextok.generators.conditioning import class_label
from flextok.images import to_image
from flextok.pipeline import load_token_model, load_tokenizer_of
from flextok.registry import make_dataset
from flextok.tokenizers import Tokenizer
from flextok.tree_search import (
    Found,
    Verifier,
    check_budget,
    check_lengths,
    image_text,
    likelihood,
    search,
)


def run_search(options: Search) -> dict[str, Any]:
    if bool(options.prompt) == bool(options.classes):
        raise ValueError("name what to search for: either --prompt or --classes")
    check_folder(options.output)
    check_probe_file(options)
    names, folder = options.prompt or options.classes or [], Path(options.output)
    places = [(folder / f"{n}.png", folder / f"{n}-tree.png") for n in range(1, len(names) + 1)]
    spare_others(chain(*places))
    model = load_token_model(options.model, pick_device(options.device))
    generator = model if isinstance(model, Generator) else None
    if isinstance(model, Tokenizer):
        if options.tokenizer:
            raise ValueError(f"--tokenizer is for a generator: {options.model} is a tokenizer")
        tokenizer = model
    else:
        tokenizer = load_tokenizer_of(model, options.model, options.tokenizer, model.device)
    cond: Tensor | list[str] = names
    if options.classes:
        if generator is None or not generator.conditioner.num_classes:
            raise ValueError(f"{options.model} does not generate by class: give --prompt")
        cond = torch.tensor([class_label(name, generator.class_names) for name in names])
    # before a classifier is trained
    lengths = check_lengths(options.num_tokens, generator, tokenizer)
    check_budget(options.budget, options.beams, options.lookahead, len(lengths))
    verifier = make_verifier(generator, tokenizer, options)
    with tqdm(total=options.budget * len(names), unit="decode", disable=None) as bar:

        def show(done: int, images: Tensor) -> None:
            bar.update(done - bar.n)

        found = search(
            generator,
            tokenizer,
            cond,
            verifier,
            lengths=lengths,
            budget=options.budget,
            beams=options.beams,
            lookahead=options.lookahead,
            seed=options.seed,
            sampling=chosen(options, SAMPLING),
            decoding=decoding_options(options),
            callback=show,
        )
    for row, (name, (place, tree)) in enumerate(zip(names, places, strict=True)):
        viz.save(to_image(found.images[row]), place)
        viz.save(draw_tree(found, row), tree)
        print(f"{name}: score {found.scores[row]:.4g} after {found.decodes} decodes, wrote {place}")
    return {
        "model": options.model,
        "seed": options.seed,
        "lengths": lengths,
        "decodes": found.decodes,
        "found": [
            {"condition": name, "score": score, "indices": indices, "path": path}
            for name, score, indices, path in zip(
                names, found.scores.tolist(), found.indices.tolist(), found.paths, strict=True
            )
        ],
    }


def make_verifier(generator: Generator | None, tokenizer: Tokenizer, options: Search) -> Verifier:
    if options.verifier != "scenes":
        other = f"--verifier {options.verifier} reads no scenes"
        refuse_given(options, ("data", "probe", "probe_steps"), other)
    if options.verifier == "likelihood":
        if not isinstance(generator, GPT):
            raise ValueError(f"--verifier likelihood needs a GPT, not {options.model}")
        return likelihood(generator)
    if not options.prompt:
        raise ValueError(f"--verifier {options.verifier} reads prompts, not --classes")
    if options.verifier != "scenes":
        try:
            return image_text(options.verifier, tokenizer.device)
        except ValueError as error:
            raise ValueError(f"--verifier {options.verifier}: {error}") from None
    spec = data_spec(options.data or WELL_KNOWN)
    scenes = make_dataset(spec)
    if not isinstance(scenes, EmojiScenes):
        raise ValueError("--data must be emoji_scenes: the scenes' verifier reads those")
    for prompt in options.prompt:
        caption_facts(prompt, scenes)  # raises before the classifier is trained
    probe = packaged_probe()
    if options.probe or (probe.sizes, 64) != (fact_sizes(scenes), tokenizer.image_size):
        probe = probe_for(scenes, spec, tokenizer, options)
    return scene_verifier(probe, scenes)


def draw_tree(found: Found, row: int) -> Image.Image:
    """The tree of one condition as an image."""
    return viz.tree(
        [level.images[row] for level in found.tree],
        [level.parents[row].tolist() for level in found.tree],
        [level.scores[row].tolist() for level in found.tree],
        found.paths[row],
        [f"{n} token{'s' if n > 1 else ''}" for n in (level.num_tokens for level in found.tree)],
    )
