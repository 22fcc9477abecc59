"""Pixels <-> latents. A VAE's scaling is applied here and nowhere else.

`IdentityVAE` works on pixels directly; `KLVAE` wraps a frozen diffusers AutoencoderKL.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flextok.convert.autoencoder import from_diffusers
from flextok.draws import Rng, draw
from flextok.nn.devices import to_device
from flextok.nn.frozen import NeedsWeights
from flextok.places import CONFIG, find_reference
from flextok.schema import Depth, Size
from flextok.storage import read_json

SIZES = ("channels", "block_channels", "layers_per_block", "norm_groups")
UNSCALED = {"scaling_factor": 1.0, "latents_mean": None, "latents_std": None}  # a KLVAE's defaults


class IdentityVAE(nn.Module):
    """Latents are the pixels, (images - shift) * scale.

    Set both from the data's mean and 1 / standard deviation: images on white, say, share a large
    constant that a small model would first have to learn to ignore. In the config of a run "auto"
    stands for what training measures and writes in its place.
    """

    channels, downsample = 3, 1
    has_weights = True  # it needs none

    def __init__(self, shift: float | Literal["auto"] = 0.0, scale: float | Literal["auto"] = 1.0):
        super().__init__()
        for name, value in {"shift": shift, "scale": scale}.items():
            if not isinstance(value, int | float) and value != "auto":
                raise ValueError(f"{name}={value!r} must be a number or auto")
        if scale != "auto" and scale <= 0:
            raise ValueError(f"scale={scale} must be positive: it multiplies the pixels")
        self.shift, self.scale = shift, scale

    def load_weights(self) -> None:
        """There are none."""

    def encode(self, images: Tensor, sample: bool | None = None, generator: Rng = None) -> Tensor:
        shift, scale = self.numbers()
        return (images - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        shift, scale = self.numbers()
        return latents / scale + shift

    @property
    def is_measured(self) -> bool:
        return "auto" not in (self.shift, self.scale)

    def numbers(self) -> tuple[float, float]:
        if self.shift == "auto" or self.scale == "auto":
            raise ValueError(
                f"vae shift={self.shift}, scale={self.scale}: `flextok train` measures what auto "
                "stands for; elsewhere give the mean of the data's pixels and 1 / their deviation"
            )
        return self.shift, self.scale


class KLVAE(NeedsWeights):
    """A frozen AutoencoderKL; the defaults are the 16-channel f8 one of FlexTok (83.8M parameters).

    channels: of the latents. weights: a local folder, the name of one that comes with the package
    (emoji-vae), or a hub id, in diffusers' layout, loaded by `load_weights`; None leaves random
    weights for a checkpoint to fill. `with_sizes` reads the other options from a folder.
    latents_mean, latents_std: by channel, as measured when the VAE was trained; the latents are
    standardised with them as in diffusers, (latents - mean) * scaling_factor / std.
    scaling_factor: the published files state 1.0. sample_posterior: draw from the posterior in
    place of taking its mode, which is our default (the published code samples). slicing: an image
    at a time, the same numbers in less memory. tiling: images larger than sample_size in
    overlapping tiles, for sizes that do not fit otherwise; the seams are blended, so pixels differ
    a little.
    """

    def __init__(
        self,
        channels: Size = 16,
        block_channels: tuple[Size, ...] = (128, 256, 512, 512),
        layers_per_block: Depth = 2,
        norm_groups: Size = 32,
        scaling_factor: float = 1.0,
        sample_posterior: bool = False,
        weights: str | None = None,
        slicing: bool = False,
        tiling: bool = False,
        sample_size: Size = 512,  # pixels a side of a tile
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        for name, values in {"latents_mean": latents_mean, "latents_std": latents_std}.items():
            if values is not None and len(values) != channels:
                raise ValueError(f"{name}={values} must have one number a channel, {channels}")
        if min(latents_std or [1.0]) <= 0:
            raise ValueError(f"latents_std={latents_std} must be positive: latents are divided")
        self.vae = make_kl(channels, block_channels, layers_per_block, norm_groups, sample_size)
        if slicing:
            self.vae.enable_slicing()
        if tiling:
            self.vae.enable_tiling()
        self.channels, self.downsample = channels, 2 ** (len(block_channels) - 1)
        self.scaling_factor, self.sample_posterior = scaling_factor, sample_posterior
        self.latents_mean, self.latents_std = latents_mean, latents_std
        self.vae.register_to_config(**{name: getattr(self, name) for name in UNSCALED})
        self.weights = weights
        self.requires_grad_(False)

    def load_weights(self, source: str | None = None) -> None:
        """Load pretrained weights from a diffusers folder or hub id. Raises ValueError for those
        that cannot be read or do not fit this VAE's shape, and where they state how their latents
        are scaled and this VAE's options do not."""
        from diffusers import AutoencoderKL

        source = source or self.weights
        if source is None:
            raise ValueError("no VAE weights named: set model.vae.weights to a folder or hub id")
        place = find_reference(source, Path.cwd()) or source
        kwargs = {"local_files_only": True} if isinstance(place, Path) else {}
        try:
            loaded = AutoencoderKL.from_pretrained(place, trust_remote_code=False, **kwargs)
            stated = from_diffusers(loaded.config)
            self.vae.load_state_dict(loaded.state_dict(), strict=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"no VAE can be read from {source!r}: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"weights {source!r} do not fit the configured VAE: {error}") from None
        for name, unstated in UNSCALED.items():
            if (needed := stated[name]) != unstated == getattr(self, name):
                if isinstance(needed, list):
                    needed = f"[{', '.join(f'{value:.9g}' for value in needed)}]"
                raise ValueError(
                    f"{source!r} states {name}={needed}, the model's VAE has {unstated}: state "
                    f"model.vae.{name}={needed}, or only the VAE's folder and none of its sizes"
                )
        self.has_weights = True

    def train(self, mode: bool = True) -> "KLVAE":
        return super().train(False)  # frozen: stays in eval mode whatever its owner does

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool | None = None, generator: Rng = None) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns latents (B, C, H/f, W/f)."""
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        sample = self.sample_posterior if sample is None else sample
        latents = posterior.mode()
        if sample:  # as posterior.sample() does, but for waiting for a GPU
            noise = draw(torch.randn, tuple(latents.shape), generator, latents.device)
            latents = posterior.mean + posterior.std * noise.to(latents.dtype)
        mean, std = self.statistics(latents)
        return (latents - mean) * self.scaling_factor / std

    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w). Returns images (B, 3, h f, w f), about [-1, 1]."""
        mean, std = self.statistics(latents := latents.to(self.vae.dtype))
        return self.vae.decode(latents / self.scaling_factor * std + mean).sample

    def statistics(self, like: Tensor) -> list[Tensor | float]:
        """Mean and deviation of the latents by channel, each (C, 1, 1), or 0 and 1."""
        both: list[Tensor | float] = [0.0, 1.0]
        for i, values in enumerate((self.latents_mean, self.latents_std)):
            if values is not None:
                column = torch.tensor(values, dtype=like.dtype, device="cpu").view(-1, 1, 1)
                both[i] = to_device(column, like.device)
        return both


def make_kl(
    channels: int,
    block_channels: Sequence[int],
    layers_per_block: int,
    norm_groups: int,
    sample_size: int,
) -> Any:
    """Diffusers' AutoencoderKL with random weights."""
    if not 1 <= len(block_channels) <= 8:
        raise ValueError(f"block_channels={block_channels} must be 1 to 8, one a resolution")
    if odd := [width for width in block_channels if width % norm_groups]:
        raise ValueError(f"block_channels={odd[0]} must be a multiple of norm_groups={norm_groups}")
    from diffusers import AutoencoderKL  # slow to import, and pixel models never need it

    blocks = len(block_channels)
    make: Any = AutoencoderKL  # untyped: its stubs leave out what it inherits
    return make(
        latent_channels=channels,
        block_out_channels=tuple(block_channels),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=layers_per_block,
        norm_num_groups=norm_groups,
        sample_size=sample_size,
    )


def kl_settings(source: str | Path) -> dict[str, Any]:
    """The options of the KLVAE in a folder in diffusers' layout, or in one of the package's by its
    name, "weights" included. Raises ValueError where there is none that we build."""
    place = find_reference(str(source), Path.cwd())
    if not isinstance(place, Path):
        raise ValueError(f"no VAE at {str(source)!r}: expected a folder with diffusers' {CONFIG}")
    try:
        settings = from_diffusers(read_json(place / CONFIG))
    except ValueError as error:
        raise ValueError(f"no VAE can be read from {str(source)!r}: {error}") from None
    del settings["image_size"]
    return {**{k: v for k, v in settings.items() if v is not None}, "weights": str(source)}


def with_sizes(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A VAE's spec. That of a KL one which names weights that lie here and states no size gets all
    that their folder states, so that the model it is saved with no longer needs the folder."""
    weights, states_sizes = spec.get("weights"), spec.keys() & set(SIZES)
    if spec.get("name") != "kl" or not isinstance(weights, str) or states_sizes:
        return dict(spec)
    is_here = isinstance(find_reference(weights, Path.cwd()), Path)
    return {**(kl_settings(weights) if is_here else {}), **spec}


VAES = {"identity": IdentityVAE, "kl": KLVAE}
