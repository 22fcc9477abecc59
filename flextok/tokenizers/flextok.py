"""FlexTok (arXiv 2502.13967): a picture as an ordered sequence of FSQ indices.

A ViT encoder with registers under a prefix-causal mask, FSQ, nested dropout, and a rectified-flow
decoder that rebuilds a plausible picture from any prefix. Time: t=1 is noise (flow/path.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.draws import Rng, draw
from flextok.flow.guidance import GUIDANCE, within
from flextok.flow.path import (
    TIME_SAMPLERS,
    Quantity,
    flow_error,
    interpolate,
    linear_times,
    shift_times,
    velocity_of,
    velocity_target,
)
from flextok.flow.solvers import SOLVERS
from flextok.losses import RepresentationAlignment
from flextok.nn.attention import Attention
from flextok.nn.blocks import SegmentModulation
from flextok.nn.devices import to_device
from flextok.nn.frozen import Frozen
from flextok.quantizers import QUANTIZERS
from flextok.schema import Bounds, ConfigError, Depth, Share, Size, build, check_number
from flextok.tokenizers.base import (
    Pictures,
    Tokenizer,
    as_images,
    check_finite,
    check_images,
    check_indices,
    check_keep,
    component,
    images_to_encode,
)
from flextok.tokenizers.distillation import DistillConfig, distillation_loss
from flextok.tokenizers.nested_dropout import NESTED_DROPOUT, LengthGroup, draw_groups
from flextok.tokenizers.networks import DecoderOutput, Encoder, FlowDecoder, add_places
from flextok.vae import VAES, IdentityVAE

MAX_STEPS, MAX_SCALE = 10_000, 1000  # of a decoder; more of them are a mistake


@dataclass
class DecodeOptions:
    """How decode() solves; the defaults are FlexTok's (appendix: 20 steps, APG 7.5)."""

    num_steps: int = 20
    solver: str = "euler"  # euler, heun, ab2
    guidance: dict[str, Any] = field(default_factory=lambda: {"name": "apg"})  # apg, cfg
    guidance_scale: float = 7.5  # 1 = none; in decode() a function of t, too
    guidance_interval: list[float] | None = None  # times [low, high] that are guided; None = all
    time_shift: float = 1.0  # > 1: more of the steps near the noise, see flow.path.shift_times

    def __post_init__(self) -> None:
        build(SOLVERS, self.solver, "solver")
        build(GUIDANCE, self.guidance, "guidance")
        check_number("num_steps", self.num_steps, 1, MAX_STEPS, whole=True)
        if not callable(self.guidance_scale):  # decode() takes a function of t, too
            check_number("guidance_scale", self.guidance_scale, 0, MAX_SCALE, hint=" (1 = none)")
        check_number("time_shift", self.time_shift, 0.001, 1000, hint=" (1 = equal steps)")
        if self.guidance_interval is not None:
            if len(self.guidance_interval) != 2:
                raise ValueError(f"guidance_interval={self.guidance_interval} must be [low, high]")
            within(1.0, *self.guidance_interval)


@dataclass
class FlexTokConfig:
    """Width is 64 x depth where no dim is given, as in the published sizes."""

    image_size: Size = 256
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
    # where registers begin: anywhere, or "spread", each at a place of its own in the picture, with
    # keys equal to queries: like looks for like (mimetic initialisation, arXiv 2305.09828)
    register_start: Literal["normal", "spread"] = "normal"
    nested_dropout: str = "pow2"
    drop_mode: Literal["mask", "truncate"] = "mask"  # mask token, or leave the sequence
    # how many lengths a training batch has when truncated: each runs apart, so fewer are larger
    batch_lengths: int = 8
    null_prob: Share = 0.2  # how often all codes become the null condition in training
    time_sampler: dict[str, Any] = field(default_factory=lambda: {"name": "mode", "scale": 0.25})
    prediction: Quantity = "velocity"  # what the decoder's head puts out
    loss_space: Quantity = "velocity"  # x0 weighs the velocity's error by t^2
    cross_length: float | None = None  # also decode all tokens; weight of the alignment to them
    max_timestep: Annotated[float, Bounds(0, open_low=True)] = (
        1.0  # of t in the time embedding; published models were made with 1000
    )
    repa: dict[str, Any] | None = None  # see losses.RepresentationAlignment; training only
    checkpoint_blocks: bool = False  # recompute activations in the backward pass
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    distill: DistillConfig | None = None  # a few-step decoder, trained from a teacher


class FlexTok(Tokenizer):
    """The tokenizer: encode pictures to ordered indices, decode any prefix of them.

    >>> tokenizer = FlexTok.from_pretrained("emoji")
    >>> indices = tokenizer.encode(images)              # (B, K)
    >>> pictures = tokenizer.decode(indices[:, :16])    # from 16 tokens
    """

    model_type = "flextok"
    stochastic = True
    config_class = FlexTokConfig
    training_only = ("repa.",)
    local_paths = ("vae.weights",)
    stated = (
        ("num_registers", "decoder.register_pos", 0),
        ("encoder_dim", "encoder.patch_embed.weight", 0),
        ("decoder_dim", "decoder.patch_embed.weight", 0),
        ("encoder_depth", "encoder.blocks.", None),
        ("decoder_depth", "decoder.blocks.", None),
    )
    codes_weights = ("vae.vae.encoder.", "vae.vae.quant_conv.", "encoder.", "quantizer.")

    def __init__(self, config: FlexTokConfig):
        super().__init__()
        if config.distill is not None:
            steps = {"num_steps": config.distill.num_steps, "solver": "euler"}
            fixed: dict[str, Any] = {**steps, "guidance_scale": 1.0, "guidance_interval": None}
            config = replace(config, decode=replace(config.decode, **fixed))
        self.config = config
        if config.batch_lengths < 1:
            raise ConfigError(f"batch_lengths={config.batch_lengths} must be at least 1")
        if config.cross_length is not None and (config.distill or config.nested_dropout == "none"):
            raise ConfigError(
                "cross_length compares prefixes in training: it needs a nested_dropout other than "
                "none, and no distill"
            )
        self.vae = build(VAES, config.vae, "vae")
        self.quantizer = build(QUANTIZERS, config.quantizer, "quantizer")
        self.sample_keep = build(NESTED_DROPOUT, config.nested_dropout, "nested dropout")
        self.sample_times = build(TIME_SAMPLERS, config.time_sampler, "time sampler")
        stride = self.vae.downsample * config.patch_size
        if config.image_size % stride:
            raise ValueError(f"image_size={config.image_size} must be a multiple of {stride}")
        grid = config.image_size // stride
        token_grid = check_token_grid(config.token_grid, config.num_registers, grid)
        encoder_dim = config.encoder_dim or 64 * config.encoder_depth
        decoder_dim = config.decoder_dim or 64 * config.decoder_depth
        shared: dict[str, Any] = {
            "channels": self.vae.channels,
            "grid": grid,
            "patch_size": config.patch_size,
            "num_registers": config.num_registers,
            "position_temperature": config.position_temperature,
            "checkpoint_blocks": config.checkpoint_blocks,
        }
        self.encoder = Encoder(
            dim=encoder_dim,
            depth=config.encoder_depth,
            num_heads=encoder_dim // config.head_dim,
            out_dim=self.quantizer.dim,
            token_grid=token_grid,
            **shared,
        )
        self.decoder = FlowDecoder(
            dim=decoder_dim,
            depth=config.decoder_depth,
            num_heads=decoder_dim // config.head_dim,
            code_dim=self.quantizer.dim,
            max_timestep=config.max_timestep,
            drop_mode=config.drop_mode,
            **shared,
        )
        self.repa: RepresentationAlignment | None = None  # see prepare_training
        self.teacher: Frozen | None = None  # likewise
        self.init_weights()

    def prepare_training(self, teacher: Any = None, weights: Any = None) -> None:
        """Load the VAE, and add what only training needs: the representation alignment that
        config.repa asks for, with its pretrained backbone. Without it the model is exactly the
        published one. `weights`: a trained model to go on from; one of another image_size lends
        its positions, interpolated. With config.distill: begin as `teacher`, and learn its decoder
        only. Raises ConfigError where one is missing, not asked for, or of other sizes."""
        if (teacher is None) != (self.config.distill is None):
            raise ConfigError("a few-step decoder needs both model.distill and start.teacher")
        if teacher is not None:
            if weights is not None or self.config.repa:
                raise ConfigError("with start.teacher leave out start.weights and model.repa")
            self._begin_as(teacher)
            self.encoder.requires_grad_(False)
            self.decoder.null_token.requires_grad_(False)  # guidance is the teacher's
            self.teacher = Frozen(teacher)
            return
        self.vae.load_weights()
        if weights is not None:
            self._begin_as(weights)
        if self.config.repa and self.repa is None:
            dim = self.decoder.head.in_features
            spec = {**self.config.repa, "name": "repa", "dim": dim}
            self.repa = build({"repa": RepresentationAlignment}, spec, "alignment")

    def _begin_as(self, trained: Any) -> None:
        if not isinstance(trained, FlexTok):
            raise ConfigError(f"start needs a flextok tokenizer, not a {trained.model_type}")
        both = [m.vae for m in (self, trained) if isinstance(m.vae, IdentityVAE)]
        if len(both) == 2 and both[1].is_measured and both[0].numbers() != both[1].numbers():
            shift, scale = both[1].numbers()
            raise ConfigError(
                f"model.vae={self.config.vae} is not that of the model it starts from: take "
                f"{{name: identity, shift: {shift}, scale: {scale}}}, or auto for both"
            )
        state = trained.state_dict()
        for name in ("encoder.patch_pos", "decoder.patch_pos"):
            grid = self.get_parameter(name).shape[-2:]
            if state[name].shape[-2:] != grid:
                state[name] = F.interpolate(state[name], tuple(grid), mode="bicubic")
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(
                f"model must have the sizes of what it starts from: {error}"
            ) from None

    @property
    def num_tokens(self) -> int:
        return self.config.num_registers

    @property
    def ordered(self) -> bool:  # type: ignore[override]
        return self.config.token_grid is None or self.config.nested_dropout != "none"

    @property
    def decode_defaults(self) -> DecodeOptions:
        return self.config.decode

    def codes_settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_tokens": config.num_registers,
            "token_grid": config.token_grid,
            "head_dim": config.head_dim,
            "vae": component(VAES, config.vae, unused="weights slicing"),
            "quantizer": component(QUANTIZERS, config.quantizer, unused="weight"),
        }

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of the noise that decode() begins with, for one picture: (C, h, w) of the latents."""
        side = self.image_size // self.vae.downsample
        return self.vae.channels, side, side

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
        tokens = (
            self.encoder.registers,
            self.decoder.register_pos,
            self.decoder.mask_token,
            self.decoder.null_token,
        )
        for token in tokens:
            if token is not None:
                nn.init.normal_(token, std=self.config.token_std)
        if self.config.register_start == "spread" and self.encoder.registers is not None:
            add_places(self.encoder.registers, self.encoder.patch_pos)
            add_places(self.decoder.register_pos, self.decoder.patch_pos)
            for module in self.modules():
                if isinstance(module, Attention):
                    module.wk.load_state_dict(module.wq.state_dict())
        nn.init.zeros_(self.decoder.head.weight)

    def velocity(
        self, x_t: Tensor, t: Tensor, registers: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The velocity at x_t (B, C, h, w) and t (B,) or (), whatever the head predicts."""
        return self._to_velocity(self.decoder(x_t, t, registers, mask).prediction, x_t, t)

    def _to_velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (
            prediction if self.config.prediction == "velocity" else velocity_of(prediction, x_t, t)
        )

    def loss(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        shared: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """images: (B, 3, H, W) float in [-1, 1]. Returns scalars; "loss" is the total. All random
        draws come from `generator`; the lengths from `shared` where it is given: in the same state
        in every process it gives all of them the same lengths, and so the same work.

        With config.cross_length = w each picture is decoded twice, from its random prefix ("flow")
        and from all tokens ("flow_full"), with the same noise, time and null condition; the total
        is their mean plus w times "align", the error of the prefix's prediction against that from
        all tokens, detached, weighed over time as the flow is. The best prediction from a prefix
        is the mean of the best ones from all tokens, so once those are right this only adds a
        target with less noise. After NesTok (2026), whose decoder is a ViT: with a flow decoder it
        is untested in the literature."""
        shared = generator if shared is None else shared
        if self.config.distill is not None:
            if self.teacher is None:
                raise ValueError("config.distill is set: call prepare_training(teacher) before")
            teacher = self.teacher.to(images.device)
            return distillation_loss(self, teacher, images, generator, shared)
        if not self.vae.has_weights:
            raise ValueError(
                "the VAE has random weights: set model.vae.weights and call prepare_training(), or "
                "load a trained model, before loss()"
            )
        check_images(images, self.image_size)
        batch, device = len(images), images.device
        groups = self.draw_groups(batch, shared)
        # on the CPU, since a null condition decides shapes
        u_order, u_null, u_time = draw(torch.rand, (3, batch), generator, torch.device("cpu"))
        images = images[to_device(u_order.argsort(), device)]  # any picture may get any length
        x0 = self.vae.encode(images, generator=generator)
        align, null = self.config.cross_length, u_null < self.config.null_prob
        noise = draw(torch.randn, tuple(x0.shape), generator, device).to(x0.dtype)
        t = self.sample_times(to_device(u_time, device))
        x_t = interpolate(x0, noise, t)
        predicts, space = self.config.prediction, self.config.loss_space
        target = x0 if predicts == "x0" else velocity_target(x0, noise)

        def decode(codes: Tensor, rows: slice, keep: Tensor | None) -> DecoderOutput:
            registers, mask = self.decoder.embed_codes(codes, keep, null[rows])
            return self.decoder(x_t[rows], t[rows], registers, mask)

        def error(prediction: Tensor, target: Tensor) -> Tensor:
            return flow_error(prediction, target, t, predicts, space)

        if align is None:
            encoded = [self.quantizer(self.encoder(x0[g.rows], g.length)) for g in groups]
        else:
            codes, _, aux = self.quantizer(self.encoder(x0))
            encoded = [(codes[g.rows], None, aux) for g in groups]
        outputs = [
            decode(codes[:, : g.length], g.rows, g.keep)
            for g, (codes, _, _) in zip(groups, encoded, strict=True)
        ]
        prediction = torch.cat([output.prediction for output in outputs])
        losses = {"flow": error(prediction, target)}
        total = losses["flow"]
        if align is not None:
            full = decode(codes, slice(None), None).prediction
            losses["flow_full"] = error(full, target)
            losses["align"] = error(prediction, full.detach())
            total = (losses["flow"] + losses["flow_full"]) / 2 + align * losses["align"]
        for g, (_, _, aux) in zip(groups, encoded, strict=True):
            total = total + aux * ((g.rows.stop - g.rows.start) / batch)
        if self.config.repa:
            if self.repa is None:
                raise ValueError("config.repa is set: call prepare_training() before loss()")
            features = torch.cat([output.features for output in outputs])
            losses["repa"] = self.repa(features, images)
            total = total + self.repa.weight * losses["repa"]
        return {"loss": total, **losses}

    def draw_groups(self, batch: int, generator: torch.Generator | None) -> list[LengthGroup]:
        """Nested dropout in training: the rows of a batch in groups that run apart. Truncated, each
        length is a group, as short as it can be; with mask tokens all are one."""
        truncates = self.config.drop_mode == "truncate"
        different = self.config.batch_lengths if truncates else batch
        groups = draw_groups(self.sample_keep, self.num_tokens, batch, different, generator)
        if truncates:
            return groups
        keep = torch.cat([group.keep for group in groups])
        return [LengthGroup(slice(0, batch), self.num_tokens, keep)]

    @torch.no_grad()
    def encode(
        self,
        images: Pictures,
        sample_posterior: bool | None = None,
        *,
        generator: Rng = None,
    ) -> Tensor:
        """images: (B, 3, H, W) float in [-1, 1], or one PIL picture or several, which are resized
        and cropped. Returns indices (B, K) long, coarse to fine.

        sample_posterior: draw the VAE's latents with `generator`, one or one for each row, in
        place of its posterior mode.
        Raises ValueError on a wrong shape, dtype or range."""
        latents = self.vae.encode(images_to_encode(self, images), sample_posterior, generator)
        weight = self.encoder.patch_embed.weight
        z = check_finite(self.encoder(latents.to(weight.dtype)), "the encoder's outputs")
        return self.quantizer(z)[1]

    @torch.no_grad()
    def decode(
        self,
        indices: Tensor,
        keep: Tensor | int | None = None,
        *,
        options: DecodeOptions | None = None,
        generator: Rng = None,
        noise: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
        **asked: Any,
    ) -> Tensor:
        """indices: (B, k) long, any 1 <= k <= K; keep: how many of the k to use, an int or
        (B,) long if ragged. Returns images (B, 3, H, W) in [-1, 1].

        options: config.decode by default; asked: single ones of DecodeOptions by name. The
        initial noise (B, C, h, w) is drawn from `generator`, one or one for each row, unless
        given. progress is called with the number of velocities evaluated so far. Raises
        ValueError on indices, keep or options out of range, and NotFinite where the images are
        not."""
        chosen = self.decode_options(asked, options)
        check_indices(indices, self.num_tokens, self.vocab_size)
        keep = check_keep(keep, *indices.shape)
        if keep.min() < self.num_tokens and not self.ordered:
            raise ValueError(
                f"this 2D grid decodes all {self.num_tokens} tokens only, got {int(keep.min())}: "
                "the first ones are just its upper rows"
            )
        device = self.device
        indices = to_device(indices, device)
        shape = (len(indices), *self.noise_shape)
        if noise is None:
            noise = draw(torch.randn, shape, generator, device)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        # the times stay on the CPU: reading one never waits for a GPU
        times = shift_times(linear_times(chosen.num_steps), chosen.time_shift)
        codes = self.quantizer.indices_to_codes(indices)
        x0 = self.solve(to_device(noise, device), times, codes, keep, chosen, progress)
        return as_images(self.vae.decode(x0))

    def decode_options(self, asked: Mapping[str, Any], options: Any = None) -> DecodeOptions:
        """As of every tokenizer. Raises ValueError, too, for an option that a distilled decoder
        fixes."""
        chosen = super().decode_options(asked, options)
        if self.config.distill is not None:
            for key in ("num_steps", "guidance_scale", "solver", "time_shift"):
                value, fixed = getattr(chosen, key), getattr(self.config.decode, key)
                if value != fixed:
                    raise ValueError(
                        f"{key}={value} must be {fixed} or left out: this decoder was distilled to "
                        "its few Euler steps, guidance included"
                    )
        return chosen

    @torch.no_grad()
    def solve(
        self,
        x: Tensor,
        times: Tensor,
        codes: Tensor,
        keep: Tensor,
        options: DecodeOptions | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """x: latents (B, C, h, w) at times[0]; times: (S+1,), decreasing; codes: (B, k, code_dim);
        keep: (B,) long on the CPU. All else as in decode. Returns latents at times[-1]."""
        chosen = options or self.config.decode
        registers, mask = self.decoder.embed_codes(codes, keep)
        one, everyone = torch.ones_like(keep), torch.ones_like(keep, dtype=torch.bool)
        null_registers, null_mask = self.decoder.embed_codes(codes[:, :1], one, everyone)
        calls = 0

        def conditional(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if progress is not None:
                progress(calls)
            return self.velocity(x, t, registers, mask)

        def unconditional(x: Tensor, t: Tensor) -> Tensor:
            return self.velocity(x, t, null_registers, null_mask)

        scale = chosen.guidance_scale
        if chosen.guidance_interval is not None:
            scale = within(scale, *chosen.guidance_interval)
        guide = build(GUIDANCE, chosen.guidance, "guidance")
        solve = build(SOLVERS, chosen.solver, "solver")
        return solve(guide(conditional, unconditional, scale), x, times)


def check_token_grid(
    token_grid: list[int] | None, num_registers: int, grid: int
) -> tuple[int, int] | None:
    """The (rows, columns) of a 2D baseline's tokens. Raises ValueError unless they make up
    num_registers tokens and divide the grid of patches."""
    if token_grid is None:
        return None
    if len(token_grid) != 2 or any(n < 1 or grid % n for n in token_grid):
        raise ValueError(f"token_grid={token_grid} must be two divisors of {grid}, the patches")
    rows, columns = token_grid
    if rows * columns != num_registers:
        raise ValueError(f"num_registers={num_registers} must be {rows * columns}, the token_grid")
    return rows, columns
