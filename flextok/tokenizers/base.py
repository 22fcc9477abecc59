"""What a tokenizer is, and what every tokenizer does alike: the identity of its codes, the options
of its decoder, checks of what goes in and comes out."""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flextok.draws import NOISE, POSTERIOR, Rng, row_generators
from flextok.hub import Pretrained, fingerprint
from flextok.images import (
    BRIGHT,
    Pictures,
    check_range,
    image_tensor,
    is_bright,
    several,
    to_image,
)
from flextok.nn.devices import check_finite, span, to_device
from flextok.nn.frozen import in_eval
from flextok.quantizers import QUANTIZERS
from flextok.schema import check_number, defaults_of, to_mapping, with_options

Indices = Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]  # (B, k), or (k,) of one
Callback = Callable[[int, Tensor], None]  # number of steps done, what is predicted so far
_QUANTIZER_LOSSES = "commitment codebook_weight weight"  # options that no index depends on
_warned: WeakSet[nn.Module] = WeakSet()  # tokenizers that were given images in [0, 1]


@dataclass
class NoOptions:
    """The options of a decoder that has none."""


class Tokenizer(Pretrained):
    """Images <-> indices: an encoder and a quantizer, which decide what the indices mean, and a
    decoder."""

    ordered: bool  # any prefix of the indices decodes
    stochastic: bool = False  # decode draws noise
    quantizer: Any  # one of quantizers
    # what decides the indices: how its weights begin, and the keys of the config
    codes_weights: ClassVar[tuple[str, ...]]
    codes_keys: ClassVar[tuple[str, ...]]

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def vocab_size(self) -> int:
        """How many different indices there are; 0 = continuous: encode_codes and decode_codes."""
        return self.quantizer.codebook_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(H, W) of the images that it takes and decodes to; the first is the square, the
        default."""
        return [(self.image_size, self.image_size)]

    def checked_shape(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Those asked for, where None the square's. Raises ValueError unless they are one of
        `shapes`."""
        square, _ = self.shapes[0]
        asked = (square if height is None else height, square if width is None else width)
        if asked not in self.shapes:
            known = ", ".join(f"{h} x {w}" for h, w in self.shapes)
            raise ValueError(
                f"height={asked[0]} and width={asked[1]} are no shape of this {self.model_type}, "
                f"which has {known} (height x width): a FlexTok has those that `shapes` in its "
                "config names"
            )
        return asked

    def sizes(self) -> tuple[int | None, int, int]:
        return self.image_size, self.num_tokens, self.vocab_size

    def codes_settings(self) -> dict[str, Any]:
        """What of the config decides the indices; nothing that only training or decoding reads."""
        config = {"num_tokens": self.num_tokens, **to_mapping(self.config)}
        settings = {key: config[key] for key in self.codes_keys}
        settings["quantizer"] = component(QUANTIZERS, config["quantizer"], _QUANTIZER_LOSSES)
        return settings

    @property
    def codes_id(self) -> str:
        """Names what the indices mean: a hash of the weights and settings that encode and quantize.
        Every decoder of the same codes has the same one."""
        digest = hashlib.sha256(json.dumps(self.codes_settings(), sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            if key.startswith(self.codes_weights):
                digest.update(f"{key} {list(value.shape)} ".encode())
                digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def decode_defaults(self) -> Any:
        """The dataclass of options that decode() takes where its caller states none."""
        return NoOptions()

    def decode_options(self, asked: Mapping[str, Any], options: Any = None) -> Any:
        """`options`, the defaults if None, with the single ones that are asked and not None. Raises
        ConfigError for an option that the decoder does not have, or not with this value."""
        what = f"{self.model_type} decoding option"
        return with_options(options or self.decode_defaults, asked, what)

    def features(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) float in [-1, 1]. Returns what gets quantized, (B, K, C)."""
        raise NotImplementedError

    def forward(self, *inputs: Any, **options: Any) -> Any:
        raise NotImplementedError(
            f"a {self.model_type} is not called: it has encode, decode and reconstruct, and "
            "training calls its objective (flextok.make_objective)"
        )

    @property
    def transform(self) -> Callable[..., Tensor]:
        """Turns a picture (a path, a PIL picture, an array, ...) into what encode takes, (3, H, W)
        float in [-1, 1], resized and cropped: for a data set's `transform`, also in workers.
        height=, width=: of another shape than the square."""
        square, _ = self.shapes[0]
        return functools.partial(image_tensor, height=square, width=square)

    @torch.no_grad()
    def encode(
        self,
        images: Pictures,
        *,
        height: int | None = None,
        width: int | None = None,
        generator: Rng = None,
    ) -> Tensor:
        """images: (B, 3, H, W) float in [-1, 1], or (3, H, W), of one of `shapes`; or one picture
        or several as paths, PIL pictures, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W), which
        are resized and cropped to height x width, by default the square. Returns indices (B, K)
        long. generator: one, or one for each row, for a tokenizer that draws. Raises ValueError on
        a wrong shape, dtype or range, and where there are no indices."""
        self.check_discrete()
        return self._quantized(images, height, width)[1]

    @torch.no_grad()
    @in_eval
    def encode_codes(
        self, images: Pictures, *, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """images, height, width: as in encode. Returns codes (B, K, C) float, quantized ones or,
        for a continuous bottleneck, the posterior's mean."""
        return self._quantized(images, height, width)[0]

    def _quantized(
        self, images: Pictures, height: int | None, width: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = self.features(images_to_encode(self, images, height, width, level=5))
        return self.quantizer(check_finite(z, "the encoder's outputs"))

    @torch.no_grad()
    def decode(
        self,
        indices: Indices,
        *,
        keep: Tensor | int | None = None,
        options: Any = None,
        generator: Rng = None,
        callback: Callback | None = None,
        **asked: Any,
    ) -> Tensor:
        """indices: (B, k) integers of any type, also an array or a list, or (k,) of one image;
        keep: how many of the k to use, an int or (B,) long if ragged. Returns images (B, 3, H, W)
        in [-1, 1]. options: of `decode_options`, or single ones by name. callback: called after
        each step of a decoder that takes several. Raises ValueError on indices, keep or options
        that do not fit."""
        self.decode_options(asked, options)
        return as_images(self.decode_codes(self.codes_of(indices), keep))

    def reconstruct(
        self, images: Pictures, *, num_tokens: int | None = None, seed: int = 0, **asked: Any
    ) -> Image.Image | list[Image.Image]:
        """images: as in encode. Encodes them and decodes their first num_tokens tokens, all by
        default; asked: options of decode by name, height and width for both. Returns a PIL picture
        for one picture and a list of them for several, in the model's size. What is drawn depends
        on seed and on the picture's number, as in `flextok reconstruct`. Raises ValueError as
        encode and decode do."""
        k = self.num_tokens if num_tokens is None else num_tokens
        check_number("num_tokens", k, 1, self.num_tokens, whole=True)
        options = self.decode_options(asked)  # raises before the work, not after it
        batch = images_to_encode(self, images, asked.get("height"), asked.get("width"), level=3)
        options = self.decode_options(in_shape_of(self, batch, asked))
        encoded = encode_rows(self, batch, seed, range(len(batch)))[:, :k]
        noise = row_generators(seed, NOISE, range(len(batch)))
        made = [to_image(image) for image in decode_rows(self, encoded, options, noise)]
        return made[0] if several(images) is None else made

    def codes_of(self, indices: Indices) -> Tensor:
        """indices: as in decode, checked. Returns their codes (B, k, C) on the model's device."""
        self.check_discrete()
        rows = index_rows(indices)
        check_indices(rows, self.num_tokens, self.vocab_size)
        return self.quantizer.indices_to_codes(to_device(rows, self.device))

    def decode_codes(self, codes: Tensor, keep: Tensor | int | None = None) -> Tensor:
        """codes: (B, k, C) float, also soft; keep: as in decode. Returns images (B, 3, H, W), about
        [-1, 1], not clamped, with gradients."""
        raise NotImplementedError

    def check_discrete(self) -> None:
        if not self.vocab_size:
            raise ValueError("a KL bottleneck has no indices: use encode_codes and decode_codes")

    def check_keep(self, keep: Tensor | int | None, codes: Tensor) -> Tensor:
        """How many codes (B, k, C) to use of each, (B,) long on the CPU: all for None. Raises
        ValueError outside [1, k], and for prefixes of a tokenizer that is not ordered."""
        batch, k = codes.shape[:2]
        lengths = torch.as_tensor(k if keep is None else keep, device="cpu")
        if lengths.is_floating_point() or lengths.shape not in ((), (batch,)):
            raise ValueError(f"keep={keep} must be an int or a ({batch},) tensor of ints")
        if lengths.min() < 1 or lengths.max() > k:
            raise ValueError(f"keep={keep} must be in [1, {k}]")
        if not self.ordered and (shortest := int(lengths.min())) < self.num_tokens:
            raise ValueError(
                f"this {self.model_type} decodes all {self.num_tokens} tokens only, got "
                f"{shortest}: prefixes need a model trained with nested dropout (model.ordered)"
            )
        return lengths.long().expand(batch)


def images_to_encode(
    tokenizer: Tokenizer,
    images: Pictures,
    height: int | None = None,
    width: int | None = None,
    level: int = 4,
) -> Tensor:
    """(B, 3, H, W) float in [-1, 1] on the tokenizer's device: float tensors checked, pictures of
    any other kind resized and cropped. Warns once of a tensor that is likely to be in [0, 1];
    level: how many frames above is the code that asked to encode (encode and torch.no_grad lie
    between)."""
    shape = tokenizer.checked_shape(height, width)
    is_asked = height is not None or width is not None
    if not isinstance(images, Tensor) or not images.is_floating_point():
        pictures = several(images)
        pictures = [images] if pictures is None else pictures  # type: ignore[list-item]
        is_float = [isinstance(x, Tensor) and x.is_floating_point() for x in pictures]
        if not pictures:
            raise ValueError("there is no image to encode: give at least one")
        if not all(is_float):  # those beside pictures, which are resized to it, have this shape
            is_asked = True
        made: list[Any] = [
            x if done else image_tensor(x, *shape)
            for x, done in zip(pictures, is_float, strict=True)
        ]
        for one in made:
            check_images(one[None], *([shape] if is_asked else tokenizer.shapes))
            check_range(one)
        if not any(is_float):
            return to_device(torch.stack(made), tokenizer.device)
        images = torch.stack([one.float() for one in made])
    images = images[None] if images.ndim == 3 else images
    check_images(images, *([shape] if is_asked else tokenizer.shapes))
    low, high = check_range(images)
    if is_bright(low, high) and tokenizer not in _warned:
        _warned.add(tokenizer)
        warnings.warn(f"images span [{low:.4g}, {high:.4g}], {BRIGHT}", stacklevel=level)
    return to_device(images, tokenizer.device)


def in_shape_of(
    tokenizer: Tokenizer, images: Tensor, asked: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Options of decode() by name, with the height and width of the images (B, 3, H, W) where they
    name none and these are another shape of the tokenizer than the square."""
    asked, shape = dict(asked or {}), (images.shape[-2], images.shape[-1])
    named = asked.get("height") is not None or asked.get("width") is not None
    if named or shape not in getattr(tokenizer, "shapes", [])[1:]:  # of a stand-in, none
        return asked
    return {**asked, "height": shape[0], "width": shape[1]}


def check_images(images: Tensor, *shapes: tuple[int, int]) -> None:
    """Raise ValueError unless images are (B, 3, H, W) float, with (H, W) one of shapes."""
    if images.ndim != 4 or tuple(images.shape[1:]) not in [(3, *shape) for shape in shapes]:
        expected = " or ".join(f"(B, 3, {h}, {w})" for h, w in shapes)
        raise ValueError(
            f"images have shape {tuple(images.shape)}, expected {expected}: resize "
            "and crop first (the tokenizer's transform does)"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images have dtype {images.dtype}, expected float in [-1, 1]: x / 127.5 - 1"
        )


def check_indices(
    indices: Tensor, num_tokens: int, vocab_size: int, training: bool = False
) -> None:
    """Raise ValueError unless indices are (B, k) integers, 1 <= k <= num_tokens, in range. In
    training their values are read on a CPU only: reading those on a GPU would make each step wait
    for it, and its embedding refuses them in any case."""
    if indices.ndim != 2 or not 1 <= indices.shape[1] <= num_tokens:
        raise ValueError(
            f"indices have shape {tuple(indices.shape)}, expected (B, k), k in [1, {num_tokens}]"
        )
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices have dtype {indices.dtype}, expected integers")
    if training and indices.device.type != "cpu":
        return
    low, high = span(indices)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"indices span [{low}, {high}], expected [0, {vocab_size - 1}]: were they made by "
            "another tokenizer?"
        )


def component(
    registry: Mapping[str, Callable[..., Any]], spec: Mapping[str, Any], unused: str = ""
) -> dict[str, Any]:
    """A component's spec for codes_settings: without the keys in `unused`, and without those that
    state a default, so that an option added later changes no identity."""
    defaults = defaults_of(registry[spec["name"]])
    stated = {k: v for k, v in spec.items() if k in defaults and plain(v) != plain(defaults[k])}
    kept = {k: plain(v) for k, v in stated.items() if k not in unused.split()}
    return {"name": spec["name"], **kept}


def plain(value: Any) -> Any:
    """Lists and tuples alike, and whole numbers as floats."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return float(value) if isinstance(value, int) else value


def same_codes(record: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a generator's metadata or a cache's manifest was made with the tokenizer's codes.
    Older ones hold the hash of all weights, the decoder's too."""
    if "codes_id" in record:
        return record["codes_id"] == tokenizer.codes_id
    return record.get("tokenizer_fingerprint") == fingerprint(tokenizer)


def prefix_lengths(total: int) -> list[int]:
    """1, 2, 4, ... below total, then total."""
    return [*(2**i for i in range((total - 1).bit_length())), total]


def index_rows(indices: Indices) -> Tensor:
    """Indices as (B, k) long, whatever integers they are. Raises ValueError for lists of several
    lengths."""
    try:
        rows = torch.as_tensor(indices)
    except ValueError as error:
        hint = "pad them to one length and state keep="
        raise ValueError(f"indices={indices!r} are no (B, k): {error}; {hint}") from None
    rows = rows[None] if rows.ndim == 1 else rows
    return rows if rows.is_floating_point() or rows.dtype == torch.bool else rows.long()


def encode_rows(
    tokenizer: Tokenizer, images: Tensor, seed: int, rows: Iterable[int] | Tensor
) -> Tensor:
    """Indices (B, K) long of images by number, or codes (B, K, C) float of a continuous tokenizer.
    What a tokenizer draws belongs to these numbers."""
    if not tokenizer.vocab_size:
        return tokenizer.encode_codes(images)
    return tokenizer.encode(images, generator=row_generators(seed, POSTERIOR, rows))


def decode_rows(
    tokenizer: Tokenizer,
    encoded: Tensor,
    options: Any,
    generator: Rng,
    keep: Tensor | None = None,
) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] from the first of encode_rows()'s indices or codes. options:
    of `decode_options`; generator: one for each row; keep: as in decode."""
    if encoded.is_floating_point():
        return as_images(tokenizer.decode_codes(encoded, keep))
    return tokenizer.decode(encoded, keep=keep, options=options, generator=generator)


def as_images(pixels: Tensor) -> Tensor:
    """Decoded pixels, about [-1, 1], as images: float32, clamped. Raises NotFinite."""
    return check_finite(pixels.float(), "the decoded images").clamp(-1, 1)
