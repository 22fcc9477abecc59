"""Editing in token space: images made of the first tokens of one image and other later tokens.

The first tokens of a FlexTok determine what kind of image is decoded, the later ones its details
(arXiv 2502.13967, section 3). Every function takes indices (B, k) and returns such indices, which
any decoder of the same codes turns into images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flextok.draws import CODES, row_generators
from flextok.generators import Generator
from flextok.generators.base import Asked, as_batch
from flextok.pipeline import Options
from flextok.schema import check_number
from flextok.tokenizers import Tokenizer
from flextok.tokenizers.base import Indices, index_rows
from flextok.tree_search import repeated


def mix(first: Indices, second: Indices, k: int) -> Tensor:
    """The first k tokens of one image with all later tokens of another. first: (B, n) integers, of
    which the first k are used; second: (B, K), with k in [0, K]. Either may be (n,) or (1, n), one
    for all. Returns (B, K) long."""
    first, second = index_rows(first), index_rows(second)
    check_number("k", k, 0, min(first.shape[1], second.shape[1]), whole=True)
    if 1 not in (len(first), len(second)) and len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} images: give as many of both, or one")
    rows = max(len(first), len(second))
    head, tail = first[:, :k].expand(rows, -1), second[:, k:].expand(rows, -1)
    return torch.cat([head, tail.to(head.device)], dim=1)


def interpolate(
    tokenizer: Tokenizer, first: Indices, second: Indices, weights: Sequence[float]
) -> Tensor:
    """Tokens between those of two images. first, second: (k,) or (1, k) integers. The codes of both
    are averaged, second with weight w in [0, 1] and first with 1 - w, and each average is rounded
    to the nearest code. Returns (len(weights), k) long: 0 gives first, 1 gives second."""
    for weight in weights:
        check_number("weights", weight, 0, 1)
    rows = [index_rows(one) for one in (first, second)]
    if rows[0].shape != rows[1].shape or len(rows[0]) != 1:
        shapes = " and ".join(str(tuple(one.shape)) for one in rows)
        raise ValueError(f"the indices have shapes {shapes}, expected twice (1, k)")
    ends = [tokenizer.codes_of(one).float() for one in rows]
    steps = torch.tensor(weights, dtype=torch.float32, device=ends[0].device)[:, None, None]
    return tokenizer.quantizer.codes_to_indices(ends[0].lerp(ends[1], steps))


def vary(
    generator: Generator,
    cond: Asked,
    prefix: Indices,
    number: int,
    *,
    num_tokens: int | None = None,
    seed: int = 0,
    sampling: Options = None,
) -> Tensor:
    """Variations of an image that keep its first tokens. cond: one condition, as of generate();
    prefix: (k,) or (1, k) integers, the tokens to keep. The generator draws the others, up to
    num_tokens, all that it generates by default. sampling: options of generate() by name. Returns
    (number, num_tokens) long; variation i depends on seed and i alone. Raises ValueError where the
    generator cannot continue a prefix."""
    if not generator.streams:
        raise ValueError(
            f"a {generator.model_type} does not generate its tokens in order and cannot continue a "
            "prefix: give a gpt"
        )
    check_number("number", number, 1, 2**31, whole=True)
    total, kept = generator.check_num_tokens(num_tokens), index_rows(prefix)
    if len(kept) != 1 or kept.shape[1] > total:
        raise ValueError(
            f"prefix has shape {tuple(kept.shape)}, expected (1, k) with k at most {total}"
        )
    return generator.generate(
        repeated(as_batch(cond), number),
        num_tokens=total,
        options=generator.generate_options(sampling or {}),
        generator=row_generators(seed, CODES, range(number)),
        prefix=kept.expand(number, -1),
    )


def prefix_distances(
    tokenizer: Tokenizer, indices: Indices, others: Indices, k: int | None = None
) -> Tensor:
    """How far the first k tokens of images, (A, n) integers, are from those of others, (B, n); k:
    all by default. Returns (A, B) float32, root mean squares of the differences of their codes: 0
    where all k tokens are alike. Its argsort lists the nearest images."""
    rows = [index_rows(one) for one in (indices, others)]
    least = min(one.shape[1] for one in rows)
    k = least if k is None else k
    check_number("k", k, 1, least, whole=True)
    codes = [tokenizer.codes_of(one[:, :k]).float().flatten(1) for one in rows]
    exactly = "donot_use_mm_for_euclid_dist"  # 0 for equal codes
    return torch.cdist(codes[0], codes[1], compute_mode=exactly) / codes[0].shape[1] ** 0.5
