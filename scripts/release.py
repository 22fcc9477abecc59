"""Put trained models into the package: fp16 weights, config and card, in flextok/releases.

    python scripts/release.py emoji=outputs/emoji/tokenizer emoji-class=outputs/emoji/generator

The tokenizer comes first; the generators after it are told where it lies now, and its codes as
rounded. Prints how many indices of the validation emoji the rounding changes. A line in
NOTES beside each config (card.md) goes into the model card.
"""

import sys

import torch

from flextok.data.sets import take
from flextok.data.transforms import ImageTransform
from flextok.emoji.datasets import Emoji
from flextok.generators import Generator
from flextok.pipeline import load_model, load_tokenizer_of, remember_tokenizer
from flextok.places import RELEASES

LIMIT = 40e6  # bytes of all models together


def rounded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}


def changed_indices(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The share of the validation emoji's indices that differ between two tokenizers."""
    transform = ImageTransform(one.image_size)
    images = torch.stack([transform(item["image"]) for item in take(Emoji("validation"), 64)])
    return float((one.encode(images) != other.encode(images)).float().mean())


def main(arguments: list[str]) -> None:
    tokenizer, place = None, None
    for argument in arguments:
        name, folder = argument.split("=", 1)
        model = load_model(folder)
        if isinstance(model, Generator):
            if tokenizer is None:
                raise SystemExit(f"{argument}: name its tokenizer before it")
            trained_on = load_tokenizer_of(model, folder)
            if changed_indices(trained_on, tokenizer) > 0.02:
                raise SystemExit(f"{argument}: trained on another tokenizer than {place}")
            remember_tokenizer(model, RELEASES / name, tokenizer, str(RELEASES / place))
        target = model.save_pretrained(RELEASES / name, rounded(model))
        released = load_model(target)
        if not isinstance(model, Generator):
            share = changed_indices(model, released)
            print(f"{name}: rounding to fp16 changes {share:.2%} of the validation emoji's indices")
            tokenizer, place = released, name
    size = sum(path.stat().st_size for path in RELEASES.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {RELEASES}")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT / 1e6:.0f} MB: leave something out")


if __name__ == "__main__":
    main(sys.argv[1:])
