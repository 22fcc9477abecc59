"""Draw the images of docs/gallery.md: what each model of the package makes of emoji, classes and
prompts that are taken evenly from all of them, not chosen. Run this again when a model changes.

python scripts/gallery.py
"""

from pathlib import Path

import torch
from PIL import Image

import flextok
from flextok import viz
from flextok.autoencoder import Autoencoder
from flextok.data.sets import take
from flextok.emoji.datasets import Emoji
from flextok.emoji.scenes import EmojiScenes
from flextok.generators.base import Generator
from flextok.images import to_tensor
from flextok.pipeline import decodable_lengths, generate_images, reconstruct_prefixes

FOLDER = Path(__file__).parent.parent / "docs/pictures/gallery"
ROWS = 8
LARGEST = 250_000  # bytes of a file


def strip(name: str) -> Image.Image:
    """The strip of one model, an RGB image."""
    model = flextok.load(name)
    pictures = take(Emoji("validation"), ROWS)
    originals = torch.stack([to_tensor(pictures[i]["image"]) for i in range(ROWS)])
    if isinstance(model, Autoencoder):
        with torch.no_grad():
            made = model.decode(model.posterior(originals)[0]).clamp(-1, 1)
        return viz.grid([originals, made], row_labels=["original", "decoded"], scale=2)
    if not isinstance(model, Generator):
        lengths = decodable_lengths(model)
        return viz.coarse_to_fine(originals, reconstruct_prefixes(model, originals, lengths))
    scenes = EmojiScenes(max_objects=2, vocabulary="basic", prompts="held_out", length=ROWS)
    asked = [scenes[i]["caption"] for i in range(ROWS)]
    if model.conditioner.num_classes:
        classes = model.class_names
        asked = [classes[i * len(classes) // ROWS] for i in range(ROWS)]
    tokenizer = flextok.load_tokenizer_of(model)
    lengths = decodable_lengths(tokenizer, model.num_tokens)
    images = generate_images(model, tokenizer, model.prepare(asked), lengths)
    return viz.coarse_to_fine(None, images, asked)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in flextok.list_models():
        path = FOLDER / f"{name}.webp"
        strip(name).save(path, quality=85, method=6)
        assert path.stat().st_size < LARGEST, f"{path} is too large for a page"
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
