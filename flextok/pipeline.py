"""From a condition to images: a generator and its tokenizer together."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flextok.autoencoder import AUTOENCODERS
from flextok.cpu import accelerate
from flextok.draws import CODES, NOISE, row_generators
from flextok.generators import GENERATORS, Generator
from flextok.generators.base import Asked, as_batch
from flextok.hub import Dtype, Pretrained
from flextok.nn.devices import Device
from flextok.places import HubOptions, find_reference, read_model, resolve
from flextok.schema import check_number
from flextok.storage import CheckpointError
from flextok.tokenizers import TOKENIZERS, Tokenizer
from flextok.tokenizers.base import (
    decode_rows,
    encode_rows,
    in_shape_of,
    prefix_lengths,
    same_codes,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

Options = Mapping[str, Any] | None  # by name


def load(
    path: str | Path,
    device: Device = "cpu",
    overrides: Mapping[str, Any] | None = None,
    *,
    dtype: Dtype = torch.float32,
    subfolder: str = "",
    torch_dtype: Dtype = None,
    device_map: Device | None = None,
    **hub: "Unpack[HubOptions]",
) -> Any:
    """Load any model of the package by the name that `list_models` gives, from a folder, a file or
    a hub id, by the type that its config.json names or its published layout shows; arguments and
    errors as in Pretrained.from_pretrained. On a CPU it is accelerated (flextok.cpu)."""
    models: dict[str, type[Pretrained]] = {**AUTOENCODERS, **TOKENIZERS, **GENERATORS}
    stored = read_model(path, subfolder, **hub)
    if stored.model_type not in models:
        raise CheckpointError(
            f"{path} holds an unknown model type {stored.model_type!r}; "
            f"known: {', '.join(sorted(models))}"
        )
    kind = models[stored.model_type]
    place = device if device_map is None else device_map  # 0 is the first GPU
    model = kind.from_stored(stored, place, torch_dtype or dtype, overrides)
    return accelerate(model) if model.device.type == "cpu" else model


def load_token_model(path: str | Path, device: str | torch.device = "cpu") -> Tokenizer | Generator:
    """As load; raises CheckpointError for an autoencoder, which has no tokens."""
    model = load(path, device)
    if not isinstance(model, Tokenizer | Generator):
        raise CheckpointError(
            f"{path} is an {model.model_type}, which has no tokens: name a tokenizer or a generator"
        )
    return model


def remember_tokenizer(
    generator: Pretrained, folder: Path, tokenizer: Tokenizer, source: str
) -> None:
    """Note in a generator, to be saved in `folder`, which tokenizer it was trained on: where it
    lies (saved as a path relative to that folder, so that both can move together) or its name or
    hub id, and what its codes are."""
    generator.home = folder
    generator.metadata["tokenizer"] = (
        str(Path(source).resolve()) if Path(source).exists() else source
    )
    generator.metadata["codes_id"] = tokenizer.codes_id
    generator.metadata.pop("tokenizer_fingerprint", None)


def load_tokenizer_of(
    generator: Generator,
    folder: str | Path | None = None,
    override: str | None = None,
    device: str | torch.device = "cpu",
) -> Tokenizer:
    """The tokenizer that a generator was trained on; folder: where the generator lies, where it was
    not loaded; override: any other of the same codes, such as one with a few-step decoder. One of
    other codes is refused with CheckpointError."""
    record = generator.metadata
    place = override or find_tokenizer(generator, folder)
    tokenizer = load(place, device)
    if not isinstance(tokenizer, Tokenizer):
        raise CheckpointError(f"{place} is a {tokenizer.model_type} model, not a tokenizer")
    if not {"codes_id", "tokenizer_fingerprint"} & set(record) or same_codes(record, tokenizer):
        return tokenizer
    if override is not None and "codes_id" not in record:
        # an older generator holds the hash of its own tokenizer, which leads to the codes
        own = load(find_tokenizer(generator, folder), device)
        if same_codes(record, own) and own.codes_id == tokenizer.codes_id:
            return tokenizer
    raise CheckpointError(
        f"tokenizer {str(place)!r} (codes {tokenizer.codes_id}) is not the one that this "
        f"generator was trained on ({expected_codes(record)}), nor one of the same codes: its "
        "indices would mean other images. Train the generator again (resume=false), or name the "
        "right tokenizer"
    )


def find_tokenizer(generator: Generator, folder: str | Path | None = None) -> Path | str:
    """Where the tokenizer lies that a generator, which was loaded or lies in `folder`, names.
    Raises CheckpointError."""
    record = generator.metadata
    reference, found = record.get("tokenizer"), None
    home = generator.home or (folder and resolve(folder))
    if reference is not None and home is not None:
        found = find_reference(reference, Path(home))
    if found is None:
        fault = "does not name the tokenizer that it needs"
        if reference:
            fault = f"names its tokenizer as {reference!r}, where none is"
        raise CheckpointError(
            f"{folder or home or 'the generator'} {fault}: name one of its codes by --tokenizer "
            f"({expected_codes(record)})"
        )
    return found


def expected_codes(record: Mapping[str, Any]) -> str:
    if "codes_id" in record:
        return f"codes {record['codes_id']}"
    return f"weights {record.get('tokenizer_fingerprint', 'not recorded')}"


def generate_images(
    generator: Generator,
    tokenizer: Tokenizer,
    cond: Asked,
    num_tokens: list[int] | None = None,
    seed: int = 0,
    sampling: Options = None,
    decoding: Options = None,
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
) -> dict[int, Tensor]:
    """cond: (B,) labels, or B class names or prompts, or one of these. Generates max(num_tokens)
    indices once and decodes each prefix length with the same initial noise. sampling and decoding
    are options of generate() and decode() by name, None = the model's own. An image depends on seed
    and its number, not on batch_size; rows: the numbers, 0 .. B-1 by default. Returns prefix length
    -> (B, 3, H, W) in [-1, 1], shortest first."""
    lengths = sorted(set(num_tokens or [generator.num_tokens]))
    options = generator.generate_options(sampling or {})
    tokenizer.decode_options(decoding or {})  # raises before the work, not after it
    several = as_batch(cond)
    if not len(several):
        raise ValueError("there is nothing to generate from: give one condition at least")
    made = []
    for some in batches_of(len(several), batch_size):
        numbers = some if rows is None else rows[some.start : some.stop]
        indices = generator.generate(
            several[some.start : some.stop],
            num_tokens=lengths[-1],
            options=options,
            generator=row_generators(seed, CODES, numbers),
        )
        made.append(decode_prefixes(tokenizer, indices, lengths, seed, decoding, numbers))
    return joined(made)


def grow_images(
    generator: Generator,
    tokenizer: Tokenizer,
    cond: Asked,
    lengths: list[int],
    seed: int = 0,
    sampling: Options = None,
    decoding: Options = None,
) -> Iterator[tuple[int, Tensor]]:
    """As generate_images, but yields (length, (B, 3, H, W) in [-1, 1]) as soon as that many indices
    are there, shortest first. A generator that does not generate them in order (MaskGIT) yields the
    longest only."""
    tokenizer.decode_options(decoding or {})  # raises before the work, not after it
    for indices in grow_indices(generator, cond, lengths, seed, sampling):
        k = indices.shape[1]
        yield k, decode_prefixes(tokenizer, indices, [k], seed, decoding)[k]


def grow_indices(
    generator: Generator, cond: Asked, lengths: list[int], seed: int = 0, sampling: Options = None
) -> Iterator[Tensor]:
    """The indices (B, length) of grow_images, not decoded."""
    options = generator.generate_options(sampling or {})
    conditions = generator.prepare(cond)
    draws = row_generators(seed, CODES, range(len(conditions)))
    indices: Tensor | None = None
    for k in sorted(set(lengths)) if generator.streams else [max(lengths)]:
        indices = generator.generate(
            conditions, num_tokens=k, options=options, generator=draws, prefix=indices
        )
        yield indices


@torch.no_grad()
def reconstruct_prefixes(
    tokenizer: Tokenizer,
    images: Tensor,
    lengths: list[int],
    seed: int = 0,
    decoding: Options = None,
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
) -> dict[int, Tensor]:
    """images: (B, 3, H, W) in [-1, 1]; rows: their numbers, 0 .. B-1 by default. Encodes them once
    and decodes as decode_prefixes does, batch by batch. A continuous tokenizer, which has no
    indices, decodes its codes."""
    decoding = in_shape_of(tokenizer, images, decoding)
    tokenizer.decode_options(decoding)  # raises before the work, not after it
    if not len(images):
        raise ValueError("there is no image to reconstruct: give at least one")
    made = []
    for some in batches_of(len(images), batch_size):
        numbers = some if rows is None else rows[some.start : some.stop]
        encoded = encode_rows(tokenizer, images[some.start : some.stop], seed, numbers)
        made.append(decode_prefixes(tokenizer, encoded, lengths, seed, decoding, numbers))
    return joined(made)


def decode_prefixes(
    tokenizer: Tokenizer,
    encoded: Tensor,
    lengths: list[int],
    seed: int = 0,
    decoding: Options = None,
    rows: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """encoded: indices (B, k), or codes (B, k, C) of a continuous tokenizer. Decodes every prefix
    length with the same initial noise, which depends on seed and the image's number alone. rows:
    the numbers, 0 .. B-1 by default. Returns prefix length -> (B, 3, H, W) in [-1, 1]."""
    lengths = [int(k) for k in lengths]
    if bad := [k for k in lengths if not 1 <= k <= encoded.shape[1]]:
        raise ValueError(f"num_tokens={bad} must be in [1, {encoded.shape[1]}]")
    options = tokenizer.decode_options(decoding or {})
    rows = range(len(encoded)) if rows is None else rows
    return {
        k: decode_rows(tokenizer, encoded[:, :k], options, row_generators(seed, NOISE, rows))
        for k in lengths
    }


def batches_of(number: int, batch_size: int) -> Iterator[range]:
    check_number("batch_size", batch_size, 1, 2**31, whole=True)
    return (range(i, min(i + batch_size, number)) for i in range(0, number, batch_size))


def joined(made: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {k: torch.cat([batch[k] for batch in made]) for k in made[0]}


def decodable_lengths(tokenizer: Tokenizer, total: int | None = None) -> list[int]:
    """The prefix lengths to show of `total` indices (the tokenizer's number by default): 1, 2, 4,
    ... and all of them, or all only where prefixes mean nothing."""
    total = total or tokenizer.num_tokens
    return prefix_lengths(total) if tokenizer.ordered else [total]
