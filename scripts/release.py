"""Put trained models into the package: fp16 weights, config and card, in flextok/releases.

    python scripts/release.py emoji-vae=outputs/emoji/vae
    python scripts/release.py emoji=outputs/emoji/tokenizer emoji-class=outputs/emoji/generator

A tokenizer comes before its generators, which from then on name it where it lies now, with its
codes as rounded. Prints what the rounding does to the validation emoji: how many indices change,
or an autoencoder's PSNR.
"""

import sys

import torch

from flextok.autoencoder import Autoencoder
from flextok.data.sets import take
from flextok.data.transforms import ImageTransform
from flextok.emoji.datasets import Emoji
from flextok.evaluation.metrics import psnr
from flextok.generators import Generator
from flextok.pipeline import load, load_tokenizer_of, remember_tokenizer
from flextok.places import RELEASES

LIMIT = 60e6  # bytes of all models together


def rounded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}


def held_out(size: int, number: int | None = None) -> torch.Tensor:
    transform = ImageTransform(size)
    return torch.stack([transform(item["image"]) for item in take(Emoji("validation"), number)])


def changed_indices(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The share of the validation emoji's indices that differ between two tokenizers."""
    images = held_out(one.image_size, 64)
    return float((one.encode(images) != other.encode(images)).float().mean())


@torch.no_grad()
def quality(model: Autoencoder) -> float:
    """The PSNR in dB of the validation emoji, from the posterior's mean."""
    batches = held_out(model.image_size).split(22)
    made = [psnr(model.decode(model.posterior(x)[0]).clamp(-1, 1), x) for x in batches]
    return float(torch.cat(made).mean())


def main(arguments: list[str]) -> None:
    tokenizer, place = None, None
    for argument in arguments:
        name, folder = argument.split("=", 1)
        model = load(folder)
        if isinstance(model, Generator):
            if tokenizer is None:
                raise SystemExit(f"{argument}: name its tokenizer before it")
            trained_on = load_tokenizer_of(model, folder)
            if changed_indices(trained_on, tokenizer) > 0.02:
                raise SystemExit(f"{argument}: trained on another tokenizer than {place}")
            remember_tokenizer(model, RELEASES / name, tokenizer, str(RELEASES / place))
        model.metadata.setdefault("provenance", {"license": "apache-2.0"})
        target = model.save_pretrained(RELEASES / name, rounded(model))
        released = load(target)
        if isinstance(model, Autoencoder):
            print(f"{name}: {quality(model):.2f} dB, {quality(released):.2f} as rounded to fp16")
        elif not isinstance(model, Generator):
            share = changed_indices(model, released)
            print(f"{name}: rounding to fp16 changes {share:.2%} of the validation emoji's indices")
            tokenizer, place = released, name
    size = sum(path.stat().st_size for path in RELEASES.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {RELEASES}")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT / 1e6:.0f} MB: leave something out")


if __name__ == "__main__":
    main(sys.argv[1:])
