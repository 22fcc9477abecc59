"""FlexTok (arXiv 2502.13967): an image as an ordered sequence of FSQ indices.

A ViT encoder with registers under a prefix-causal mask, FSQ, nested dropout, and a rectified-flow
decoder that rebuilds a plausible image from any prefix. Time: t=1 is noise (flow/path.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flextok.convert.flextok import to_published
from flextok.draws import Rng, draw
from flextok.files import atomic_write
from flextok.flow.path import Quantity, velocity_of
from flextok.images import Pictures
from flextok.nn.attention import Attention
from flextok.nn.blocks import SegmentModulation
from flextok.nn.devices import check_finite, to_device
from flextok.places import WEIGHTS, check_layout
from flextok.quantizers import QUANTIZERS
from flextok.schema import Bounds, ConfigError, Depth, Size, build
from flextok.tokenizers.base import (
    Callback,
    Indices,
    Tokenizer,
    as_images,
    component,
    images_to_encode,
)
from flextok.tokenizers.decoding import Conditions, DecodeOptions, solve
from flextok.tokenizers.drawer import Drawer, DrawerConfig
from flextok.tokenizers.length import HOW_TO_FIT, Adaptive, LengthHead, LengthHeadConfig, Target
from flextok.tokenizers.networks import Encoder, FlowDecoder, add_places
from flextok.vae import KLVAE, VAES, IdentityVAE, with_sizes


@dataclass
class FlexTokConfig:
    """Width is 64 x depth where no dim is given, as in the published sizes."""

    image_size: Size = 256
    # [height, width] of other images that it takes: training sorts its images into these and the
    # square by their proportions, see data/buckets.py
    shapes: list[list[Size]] = field(default_factory=list)
    patch_size: Size = 2  # in latents
    num_registers: Size = 256  # K, the longest token sequence
    token_grid: list[Size] | None = None  # 2D baseline: [rows, columns] of K tokens, no registers
    head_dim: Size = 64
    encoder_depth: Depth = 12
    encoder_dim: Size | None = None
    decoder_depth: Depth = 12
    decoder_dim: Size | None = None
    vae: dict[str, Any] = field(default_factory=lambda: {"name": "kl"})
    quantizer: dict[str, Any] = field(
        default_factory=lambda: {"name": "fsq", "levels": [8, 8, 8, 5, 5, 5]}
    )
    # small grids want a small temperature (10 to 100): at 10000 neighbouring patches look alike
    position_temperature: Annotated[float, Bounds(1, 1e9)] = 10_000.0
    token_std: float = 0.02  # of the learned tokens at the start; 1 sets registers apart sooner
    # where registers begin: anywhere, or "spread", each at a place of its own in the image, with
    # keys equal to queries: like looks for like (mimetic initialisation, arXiv 2305.09828)
    register_start: Literal["normal", "spread"] = "normal"
    ordered: bool = True  # any prefix decodes; False for a 2D baseline without nested dropout
    # what stands for a token that is not there: a mask token, or nothing, in a shorter sequence
    drop_mode: Literal["mask", "truncate"] = "mask"
    prediction: Quantity = "velocity"  # what the decoder's head puts out
    max_timestep: Annotated[float, Bounds(0, open_low=True)] = (
        1.0  # of t in the time embedding; published models were made with 1000
    )
    drawer: DrawerConfig | None = None  # a second decoder, which draws around the first one's image
    decode: DecodeOptions = field(default_factory=DecodeOptions)  # the drawer's, where there is one
    # predicts how good decode()'s images are by the number of tokens, for encode(target=...)
    length_head: LengthHeadConfig | None = None
    distilled: bool = False  # a few-step decoder: steps, solver and guidance are those of `decode`


class FlexTok(Tokenizer):
    """The tokenizer: encode images to ordered indices, decode any prefix of them.

    >>> tokenizer = FlexTok.from_pretrained("emoji")
    >>> indices = tokenizer.encode(images)              # (B, K)
    >>> images = tokenizer.decode(indices[:, :16])    # from 16 tokens
    """

    model_type = "flextok"
    stochastic = True
    config_class = FlexTokConfig
    local_paths = ("vae.weights", "drawer.vae.weights")
    stated = (
        ("num_registers", "decoder.register_pos", 0),
        ("encoder_dim", "encoder.patch_embed.weight", 0),
        ("decoder_dim", "decoder.patch_embed.weight", 0),
        ("encoder_depth", "encoder.blocks.", None),
        ("decoder_depth", "decoder.blocks.", None),
    )
    resizable = (
        *(("encoder.patch_pos", "grid"), ("decoder.patch_pos", "grid")),
        *(("encoder.registers", "rows"), ("decoder.register_pos", "rows")),
    )
    codes_weights = ("vae.vae.encoder.", "vae.vae.quant_conv.", "encoder.", "quantizer.")
    codes_keys = ("image_size", "patch_size", "num_tokens", "token_grid", "head_dim")

    def __init__(self, config: FlexTokConfig):
        super().__init__()
        config = self.checked(config)
        drawer = config.drawer and replace(config.drawer, vae=with_sizes(config.drawer.vae))
        config = replace(config, vae=with_sizes(config.vae), drawer=drawer)
        self.config, self.ordered = config, config.ordered
        self.vae = build(VAES, config.vae, "vae")
        self.quantizer = build(QUANTIZERS, config.quantizer, "quantizer")
        if not self.quantizer.codebook_size:
            raise ConfigError(
                f"quantizer={config.quantizer}: a FlexTok has indices, take fsq, or a TiTok"
            )
        stride = self.vae.downsample * config.patch_size
        if config.image_size % stride:
            raise ValueError(f"image_size={config.image_size} must be a multiple of {stride}")
        check_shapes(config, stride)
        grid = config.image_size // stride
        encoder_dim = config.encoder_dim or 64 * config.encoder_depth
        decoder_dim = config.decoder_dim or 64 * config.decoder_depth
        patches = (self.vae.channels, grid, config.patch_size, config.position_temperature)
        self.encoder = Encoder(
            *patches,
            dim=encoder_dim,
            depth=config.encoder_depth,
            num_heads=encoder_dim // config.head_dim,
            out_dim=self.quantizer.dim,
            token_grid=config.token_grid,
            num_registers=config.num_registers,
        )
        self.decoder = FlowDecoder(
            *patches,
            dim=decoder_dim,
            depth=config.decoder_depth,
            num_heads=decoder_dim // config.head_dim,
            code_dim=self.quantizer.dim,
            max_timestep=config.max_timestep,
            drop_mode=config.drop_mode,
            num_registers=config.num_registers,
        )
        self.drawer: Drawer | None = None
        if config.drawer is not None:
            self.drawer = Drawer(config.drawer, config.image_size)
            check_shapes(config, self.drawer.draft_patch_size)
        self.length_head: LengthHead | None = None
        if config.length_head is not None:
            self.length_head = LengthHead(config.length_head, encoder_dim, config.num_registers)
        self.init_weights()

    @property
    def num_tokens(self) -> int:
        return self.config.num_registers

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [*super().shapes, *((height, width) for height, width in self.config.shapes)]

    @property
    def decode_defaults(self) -> DecodeOptions:
        return self.config.decode

    def codes_settings(self) -> dict[str, Any]:
        vae = component(VAES, self.config.vae, unused="weights slicing")
        return {**super().codes_settings(), "vae": vae}

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of the noise that decode() begins with, for one square: (C, h, w) of the latents."""
        return latent_shape(self.solved_vae, *self.shapes[0])

    def init_weights(self) -> None:
        """Linear: Xavier, no bias. Tokens and positions: N(0, config.token_std). Zero: modulations
        and the decoder's head, so that every block starts as the identity (adaLN-zero)."""
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            for module in part.modules():
                if isinstance(module, SegmentModulation):
                    nn.init.zeros_(module.linear.weight)
        registers, decoder = self.encoder.registers, self.decoder
        for token in (registers, decoder.register_pos, decoder.mask_token, decoder.null_token):
            if token is not None:
                nn.init.normal_(token, std=self.config.token_std)
        if self.config.register_start == "spread" and registers is not None:
            add_places(registers, self.encoder.patch_pos)
            add_places(self.decoder.register_pos, self.decoder.patch_pos)
            for module in self.modules():
                if isinstance(module, Attention):
                    module.wk.load_state_dict(module.wq.state_dict())
        nn.init.zeros_(self.decoder.head.weight)

    def velocity(
        self, x_t: Tensor, t: Tensor, registers: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The velocity at x_t (B, C, h, w) and t (B,) or (), whatever the head predicts."""
        prediction = self.decoder(x_t, t, registers, mask).prediction
        predicts_velocity = self.config.prediction == "velocity"
        return prediction if predicts_velocity else velocity_of(prediction, x_t, t)

    @overload
    def encode(
        self,
        images: Pictures,
        *,
        height: int | None = None,
        width: int | None = None,
        sample_posterior: bool | None = None,
        generator: Rng = None,
        target: None = None,
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        images: Pictures,
        *,
        height: int | None = None,
        width: int | None = None,
        sample_posterior: bool | None = None,
        generator: Rng = None,
        target: Target | str,
    ) -> Adaptive: ...

    @torch.no_grad()
    def encode(
        self,
        images: Pictures,
        *,
        height: int | None = None,
        width: int | None = None,
        sample_posterior: bool | None = None,
        generator: Rng = None,
        target: Target | str | None = None,
    ) -> Tensor | Adaptive:
        """images, height, width: as for every tokenizer. Returns indices (B, K) long, coarse to
        fine.

        sample_posterior: draw the VAE's latents with `generator`, one or one for each row, in
        place of its posterior mode. target: such as "psnr=18"; the length head predicts, without
        decoding, how many tokens each image needs for it, and what is returned has these numbers
        beside the indices: decode(found.indices, keep=found.keep).
        Raises ValueError on a wrong shape, dtype or range, and for a target that the model has no
        length head for."""
        target = Target.parse(target) if isinstance(target, str) else target
        # raises before the work, not after it
        head = None if target is None else self.length_head_for(target)
        images = images_to_encode(self, images, height, width)
        latents = self.vae.encode(images, sample_posterior, generator)
        latents = latents.to(self.encoder.patch_embed.weight.dtype)
        if target is None or head is None:
            return self.quantizer(check_finite(self.encoder(latents), "the encoder's outputs"))[1]
        outputs = self.encoder.outputs(latents)
        z = check_finite(self.encoder.head(outputs), "the encoder's outputs")
        return head.choose(target, self.quantizer(z)[1], outputs)

    def features(self, images: Tensor) -> Tensor:
        latents = self.vae.encode(images)
        return self.encoder(latents.to(self.encoder.patch_embed.weight.dtype))

    def length_head_for(self, target: Target) -> LengthHead:
        """The head that predicts the target's metric. Raises ValueError where there is none."""
        if self.length_head is None:
            raise ValueError(
                f"target {target.metric}={target.value:g} needs a length head, which this model "
                f"does not have: fit one ({HOW_TO_FIT}), or search by decoding "
                "(flextok.evaluation.adaptive.encode)"
            )
        self.length_head.check(target)
        return self.length_head

    @torch.no_grad()
    def decode(
        self,
        indices: Indices,
        *,
        keep: Tensor | int | None = None,
        options: DecodeOptions | None = None,
        generator: Rng = None,
        noise: Tensor | None = None,
        callback: Callback | None = None,
        **asked: Any,
    ) -> Tensor:
        """indices: (B, k) integers, any 1 <= k <= K, also an array or a list, or (k,) of one image;
        keep: how many of the k to use, an int or (B,) long if ragged. Returns images (B, 3, H, W)
        in [-1, 1].

        options: config.decode by default; asked: single ones of DecodeOptions by name, such as
        height and width: any prefix decodes to any of `shapes`. The initial noise (B, C, h, w) is
        drawn from `generator`, one or one for each row, unless given. callback(n, x_0) is called
        after each velocity: how many are done, and the latents (B, C, h, w) predicted from the
        last, of which `to_images` makes images. Raises ValueError on indices, keep or options out
        of range, and NotFinite where the images are not."""
        chosen = self.decode_options(asked, options)
        codes = self.codes_of(indices)
        made = self.decode_codes(
            codes, keep, options=chosen, generator=generator, noise=noise, callback=callback
        )
        return as_images(made)

    def decode_codes(
        self,
        codes: Tensor,
        keep: Tensor | int | None = None,
        *,
        options: DecodeOptions | None = None,
        generator: Rng = None,
        noise: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """codes: (B, k, C) float, also soft; all else as in decode. Returns images (B, 3, H, W),
        about [-1, 1], not clamped, with gradients."""
        chosen = options or self.decode_defaults
        lengths = self.check_keep(keep, codes)
        size = self.checked_shape(chosen.height, chosen.width)
        codes = to_device(codes, self.device)
        shape = (len(codes), *latent_shape(self.solved_vae, *size))
        if noise is None:
            noise = draw(torch.randn, shape, generator, self.device)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        x = chosen.scaled(to_device(noise, self.device), lengths, self.num_tokens)
        x0 = solve(self.conditions(codes, lengths, size), x, chosen, callback)
        return self.solved_vae.decode(x0)

    @property
    def solved_vae(self) -> IdentityVAE | KLVAE:
        """That of the latents which decode() solves for."""
        return self.vae if self.drawer is None else self.drawer.vae

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w) that decode() solves for. Returns images (B, 3, H, W) in
        [-1, 1]."""
        return as_images(self.solved_vae.decode(latents))

    def save_published(self, folder: str | Path) -> Path:
        """Write model.safetensors as the published FlexTok code reads it, its config in the file's
        metadata, for others' programs. What only says how it is used is left out: the options of
        `decode`, a length head, the VAE's sample_posterior, slicing and tiling; so is how it began.
        Raises ValueError for what that layout does not have: VAEs other than AutoencoderKL with 32
        norm_groups, FSQ's other bounds and eps, drop_mode "truncate", a drawer, a few-step decoder,
        tokens without order, shapes. And for a folder with a config.json, another model's, whose
        weights would be lost."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("length_head.")}
        tensors, metadata = to_published(self.written_config(None), state)
        folder = Path(folder)
        check_layout(folder, "published")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
        atomic_write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata))
        return folder

    def drop_drawer(self) -> None:
        """Decode with the first decoder alone."""
        if self.config.drawer is not None:
            decode = self.config.drawer.draft
            self.config = replace(self.config, drawer=None, decode=decode, distilled=False)
            self.drawer = None

    def drop_length_head(self) -> None:
        """For training, after which decode() returns other images than those that it predicts."""
        self.config, self.length_head = replace(self.config, length_head=None), None

    def conditions(
        self, codes: Tensor, keep: Tensor, size: tuple[int, int] | None = None
    ) -> Conditions:
        """codes: (B, k, code_dim); keep: (B,) long on the CPU; size: (H, W) of the images, the
        square's if None. Returns what decode() solves."""
        if self.drawer is not None:
            return self.drawer.conditions(self.draft(codes, keep, size))
        return self.first_conditions(codes, keep)

    def first_conditions(self, codes: Tensor, keep: Tensor) -> Conditions:
        """The velocities of the first decoder."""
        registers, mask = self.decoder.embed_codes(codes, keep)
        one, everyone = torch.ones_like(keep), torch.ones_like(keep, dtype=torch.bool)
        null_registers, null_mask = self.decoder.embed_codes(codes[:, :1], one, everyone)
        return Conditions(
            lambda x, t: self.velocity(x, t, registers, mask),
            lambda x, t: self.velocity(x, t, null_registers, null_mask),
        )

    def draft(self, codes: Tensor, keep: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """What the drawer draws around: the first decoder's images (B, 3, H, W) in [-1, 1], from
        the same noise for every row, so that they depend on nothing but the codes."""
        if self.config.drawer is None:
            raise ValueError("this model has no drawer: decode() is what its one decoder returns")
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (1, *latent_shape(self.vae, *(size or self.shapes[0])))
        noise = draw(torch.randn, shape, generator, torch.device("cpu"))
        noise = to_device(noise, self.device).expand(len(codes), -1, -1, -1)
        options = self.config.drawer.draft
        noise = options.scaled(noise, keep, self.num_tokens)
        x0 = solve(self.first_conditions(codes, keep), noise, options)
        return as_images(self.vae.decode(x0))

    def decode_options(self, asked: Mapping[str, Any], options: Any = None) -> DecodeOptions:
        """As for every tokenizer. Raises ValueError, too, for an option that a distilled decoder
        fixes."""
        chosen = super().decode_options(asked, options)
        self.checked_shape(chosen.height, chosen.width)
        if self.config.distilled:
            for key in [f.name for f in fields(chosen) if f.name not in ("height", "width")]:
                value, fixed = getattr(chosen, key), getattr(self.config.decode, key)
                if value != fixed:
                    raise ValueError(
                        f"{key}={value} must be {fixed} or left out: this decoder was distilled to "
                        "its few Euler steps, guidance included"
                    )
        return chosen


def latent_shape(vae: IdentityVAE | KLVAE, height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of an image of height x width."""
    return vae.channels, height // vae.downsample, width // vae.downsample


def check_shapes(config: FlexTokConfig, stride: int) -> None:
    """Raises ConfigError unless all shapes are whole patches of `stride` pixels."""
    if config.shapes and config.token_grid is not None:
        raise ConfigError(f"shapes={config.shapes}: a model with a token_grid has squares only")
    for shape in config.shapes:
        if len(shape) != 2 or any(side % stride for side in shape):
            raise ConfigError(
                f"shapes={config.shapes} must be [height, width], multiples of {stride}"
            )
