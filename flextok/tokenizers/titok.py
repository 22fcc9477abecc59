"""TiTok (arXiv 2406.07550): an image as 32 to 256 codes without a grid, from a plain ViT.

Patches and latent tokens attend to each other in the encoder; its latent outputs are quantized; the
decoder rebuilds the image from mask tokens beside the codes. Covers the paper's two-stage models,
the later single-stage ones with VQ or KL, TA-TiTok (2501.07730: text in the decoder) and
One-D-Piece (2501.10064: any prefix decodes). The networks take and give [0, 1]; the package's
[-1, 1] is converted in the methods that meet images.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from flextok.draws import Rng
from flextok.nn.devices import span, to_device
from flextok.nn.embeddings import sincos_2d
from flextok.nn.frozen import Frozen, NeedsWeights
from flextok.quantizers import KL, QUANTIZERS
from flextok.schema import Bounds, Depth, Size, build
from flextok.tokenizers.base import Callback, Indices, Tokenizer, as_images
from flextok.tokenizers.networks import add_places
from flextok.tokenizers.titok_networks import PixelHead, TiTokDecoder, TiTokEncoder
from flextok.tokenizers.vqgan import (
    ConvDecoder,
    MaskGITVQGAN,
    VQGANConfig,
    from_unit,
    to_unit,
)

Stage = Literal["proxy", "finetune", "single"]


@dataclass
class TiTokConfig:
    """Published sizes, dim x depth: small 512 x 8, base 768 x 12, large 1024 x 24.

    stage: "proxy" learns the indices of a MaskGIT-VQGAN (paper's first stage), "finetune" its
    pixels, by the decoder alone (second stage); "single" learns pixels from the start.
    """

    image_size: Size = 256
    patch_size: Size = 16
    num_tokens: Size = 128  # K
    head_dim: Size = 64
    encoder_dim: Size = 512
    encoder_depth: Depth = 8
    decoder_dim: Size = 512
    decoder_depth: Depth = 8
    quantizer: dict[str, Any] = field(
        default_factory=lambda: {"name": "vq", "codebook_size": 4096, "dim": 12}
    )
    stage: Stage = "single"
    proxy: VQGANConfig = field(default_factory=VQGANConfig)  # its image_size follows ours
    legacy: bool = False  # the first releases' layout of the encoder's output, see TiTokEncoder
    ordered: bool = False  # any prefix decodes (One-D-Piece)
    # weights at the start: wide or spread ones let small models route sooner, see init_weights
    init: Literal["published", "wide", "spread"] = "published"
    text_length: Annotated[int, Bounds(0, 65_536)] = (
        0  # TA-TiTok: text features that the decoder sees (77 of CLIP), 0 = none
    )
    text_dim: Size = 768


class TiTok(Tokenizer, NeedsWeights):
    """The tokenizer: encode images to K indices, decode them (any prefix with nested dropout).

    >>> tokenizer = TiTok.from_pretrained("outputs/titok/tokenizer")
    >>> indices = tokenizer.encode(images)       # (B, K)
    >>> images = tokenizer.decode(indices)
    """

    model_type = "titok"
    config_class = TiTokConfig
    resizable = (
        *(("encoder.patch_pos", "flat"), ("decoder.patch_pos", "flat")),
        *(("encoder.latent_tokens", "rows"), ("encoder.latent_pos", "rows")),
        ("decoder.latent_pos", "rows"),
    )
    codes_weights = ("encoder.", "quantizer.")
    codes_keys = ("image_size", "patch_size", "num_tokens", "head_dim", "legacy")
    stated = (
        ("num_tokens", "encoder.latent_tokens", 0),
        ("encoder_dim", "encoder.patch_embed.weight", 0),
        ("decoder_dim", "decoder.code_embed.weight", 0),
        ("encoder_depth", "encoder.blocks.", None),
        ("decoder_depth", "decoder.blocks.", None),
    )

    def __init__(self, config: TiTokConfig):
        super().__init__()
        self.config = config = self.checked(config)
        self.ordered = config.ordered
        if config.image_size % config.patch_size:
            raise ValueError(
                f"image_size={config.image_size} must be a multiple of "
                f"patch_size={config.patch_size}"
            )
        self.grid = config.image_size // config.patch_size
        self.quantizer = build(QUANTIZERS, config.quantizer, "quantizer")
        self.is_continuous = isinstance(self.quantizer, KL)
        self.frozen_proxy: Frozen | None = None  # see attach_proxy
        shared: dict[str, Any] = {"grid": self.grid, "num_tokens": config.num_tokens}
        self.encoder = TiTokEncoder(
            patch_size=config.patch_size,
            dim=config.encoder_dim,
            depth=config.encoder_depth,
            num_heads=config.encoder_dim // config.head_dim,
            out_dim=self.quantizer.dim * (2 if self.is_continuous else 1),  # mean and log-variance
            legacy=config.legacy,
            **shared,
        )
        self.decoder = TiTokDecoder(
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_dim // config.head_dim,
            code_dim=self.quantizer.dim,
            text_length=config.text_length,
            text_dim=config.text_dim,
            head=self._build_head(),
            **shared,
        )
        self.init_weights()

    def _build_head(self) -> nn.Module:
        """The decoder's head by stage; the second stage also gets its pixel decoder."""
        config, dim = self.config, self.config.decoder_dim
        self.proxy_vocab_size = 0
        if config.stage == "single":
            return PixelHead(dim, config.patch_size, self.grid)
        proxy = config.proxy
        downsample = 2 ** (len(proxy.multipliers) - 1)
        if downsample != config.patch_size:
            raise ValueError(
                f"patch_size={config.patch_size} must be {downsample}: the head gives the proxy "
                "one code for each patch"
            )
        quantizer = build(QUANTIZERS, proxy.quantizer, "quantizer")
        self.proxy_vocab_size = quantizer.codebook_size
        if config.stage == "finetune":
            self.pixel_quantizer = quantizer
            self.pixel_decoder = ConvDecoder(
                proxy.dim, proxy.multipliers, proxy.num_blocks, quantizer.dim, proxy.norm_groups
            )
        return nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, self.proxy_vocab_size)
        )

    def init_weights(self) -> None:
        """published: linear N(0, 0.02), cut at 2, no bias; wider in models narrower than the
        published ones, which would hardly see the image at first. Tokens and positions:
        N(0, 1/D). The convolutions and codebooks keep their own.

        wide: linear Xavier, queries and keys doubled, tokens and positions N(0, 1). Latents then
        look at different patches from the first step on.

        spread: linear Xavier, keys equal to queries (like looks for like: mimetic initialisation,
        arXiv 2305.09828), tokens N(0, 0.1); patches begin at sin-cos positions that set neighbours
        apart, and each latent at a place of its own among them."""
        init = self.config.init
        for part in (self.encoder, self.decoder):
            dim = part.class_token.shape[-1]
            token_std = {"published": dim**-0.5, "wide": 1.0, "spread": 0.1}[init]
            for name, module in part.named_modules():
                if isinstance(module, nn.Linear):
                    if init == "published":  # 0.02 from D = 512 on
                        nn.init.trunc_normal_(module.weight, std=max(0.02, 0.45 * dim**-0.5))
                    else:
                        nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
                    if name.endswith("qkv"):
                        queries, keys, _ = module.weight.data.chunk(3)
                        if init == "wide":
                            queries.mul_(2)
                            keys.mul_(2)
                        elif init == "spread":
                            keys.copy_(queries)
            for name, parameter in part.named_parameters():
                if name.endswith(("_token", "_tokens", "_pos")):
                    nn.init.normal_(parameter, std=token_std)
            if init == "spread":
                places = sincos_2d(dim, self.grid, self.grid, temperature=10)
                part.patch_pos.data[1:] = places[0].flatten(1).T
                add_places(part.latent_pos, places)

    def attach_proxy(self, proxy: MaskGITVQGAN) -> None:
        """Give a first-stage model the frozen VQGAN whose indices it learns. It becomes no part of
        the state dict."""
        theirs = (proxy.image_size, proxy.num_tokens, proxy.vocab_size)
        ours = (self.image_size, self.grid**2, self.proxy_vocab_size)
        if theirs != ours:
            raise ValueError(
                f"the proxy has (pixels, indices, codes) {theirs}, TiTok expects {ours}"
            )
        self.frozen_proxy = Frozen(proxy)

    @property
    def proxy(self) -> MaskGITVQGAN:
        if self.frozen_proxy is None:
            raise ValueError(
                "a TiTok of the first stage (stage: proxy) has no pixels of its own: train the "
                "second stage, or call attach_proxy(vqgan)"
            )
        return self.frozen_proxy.to(self.device)

    def start_finetuning(self, first: "TiTok", proxy: MaskGITVQGAN) -> None:
        """Fill this second-stage model with a first-stage one's weights, and with the proxy's
        codebook and decoder for pixels."""
        state = dict(first.state_dict())
        for ours, part in (("pixel_quantizer", proxy.quantizer), ("pixel_decoder", proxy.decoder)):
            state |= {f"{ours}.{key}": value for key, value in part.state_dict().items()}
        copies = {key: value.clone() for key, value in state.items()}
        self.load_weights(copies, "the first stage and its proxy together")

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(to_unit(images).to(self.encoder.head.weight.dtype))

    @torch.no_grad()
    def decode(
        self,
        indices: Indices,
        *,
        keep: Tensor | int | None = None,
        text: Tensor | None = None,
        options: Any = None,
        generator: Rng = None,
        callback: Callback | None = None,
        **asked: Any,
    ) -> Tensor:
        """indices, keep: as for every tokenizer; text: (B, L, text_dim) for TA-TiTok. Returns
        images (B, 3, H, W) in [-1, 1]. Draws nothing.

        Models trained with nested dropout decode any k in [1, K]; others need all K. Raises
        ValueError on indices, keep or text that do not fit."""
        self.decode_options(asked, options)
        return as_images(self.decode_codes(self.codes_of(indices), keep, text))

    def decode_codes(
        self, codes: Tensor, keep: Tensor | int | None = None, text: Tensor | None = None
    ) -> Tensor:
        """codes: (B, k, C) float; keep and text as in `decode`. Returns images (B, 3, H, W), about
        [-1, 1], not clamped, with gradients."""
        lengths = self.check_keep(keep, codes)
        shortest, longest = (int(n) for n in span(lengths))
        codes = to_device(codes, self.device)[:, :longest]
        if text is not None:
            text = to_device(text, self.device)
        ragged = to_device(lengths, self.device) if shortest < longest else None
        out = self.decoder(codes, ragged, text)
        if self.config.stage == "single":
            return from_unit(out)
        probabilities = out.float().softmax(dim=-1)  # (B, N, V): a soft choice of proxy codes
        if self.config.stage == "proxy":
            quantizer, decoder = self.proxy.quantizer, self.proxy.decoder
        else:
            quantizer, decoder = self.pixel_quantizer, self.pixel_decoder
        every = torch.arange(self.proxy_vocab_size, device=codes.device)
        soft = probabilities @ quantizer.indices_to_codes(every).float()
        soft = rearrange(soft, "b (h w) c -> b c h w", h=self.grid)
        return from_unit(decoder(soft.to(decoder.conv_in.weight.dtype)))
