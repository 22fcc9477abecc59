"""FlexTok's objective: rectified flow from random prefixes (arXiv 2502.13967, section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.draws import BatchDraws
from flextok.flow.path import (
    TIME_SAMPLERS,
    Quantity,
    flow_error,
    interpolate,
    velocity_target,
)
from flextok.hub import Pretrained, fingerprint
from flextok.losses import PrefixAlignment, RepresentationAlignment
from flextok.nn.devices import to_device
from flextok.nn.frozen import NeedsWeights
from flextok.objectives.base import (
    Objective,
    begin_with,
    draws_of,
    need,
    times_left_out,
    train_only,
)
from flextok.objectives.nested_dropout import (
    LengthGroup,
    NestedDropout,
    PrefixConfig,
    as_one,
    take_rows,
)
from flextok.schema import ConfigError, Share, Size, build
from flextok.tokenizers import FlexTok
from flextok.tokenizers.base import check_images
from flextok.tokenizers.networks import DecoderOutput
from flextok.vae import IdentityVAE


@dataclass
class FlowConfig(PrefixConfig):
    """Keys of `objective` beside `name: flow`."""

    null_prob: Share = 0.2  # how often all codes become the null condition
    time_sampler: dict[str, Any] = field(default_factory=lambda: {"name": "mode", "scale": 0.25})
    loss_space: Quantity = "velocity"  # x0 weighs the velocity's error by t^2
    repa: dict[str, Any] | None = None  # see losses.RepresentationAlignment
    prefix_alignment: dict[str, Any] | None = None  # see losses.PrefixAlignment
    train: list[str] | None = None  # parts of the model that learn, such as [decoder]; None = all
    # how many times a step decodes each image, with a prefix, time and noise of its own (as MAR,
    # arXiv 2406.11838, does with its diffusion loss)
    draws_per_image: Size = 1


class Noised(NamedTuple):
    """A batch on the way from data to noise, its rows ordered by the length of their prefix."""

    images: Tensor | None  # (B, 3, H, W); a batch of latents may have none
    x0: Tensor  # (B, C, h, w), latents
    noise: Tensor
    t: Tensor  # (B,)
    x_t: Tensor
    null: Tensor  # (B,) bool, on the CPU, since a null condition decides shapes
    groups: list[LengthGroup]


class FlowObjective(Objective):
    """The flow's error where the decoder sees a random prefix, plus the quantizer's loss and, where
    they are asked for, the alignments of its features (repa) and of the prefixes."""

    config_class = FlowConfig
    models = ("flextok",)
    starts = ("weights",)
    model: FlexTok
    config: FlowConfig

    def begin(self, weights: Pretrained | None = None) -> None:
        """weights: a trained model to go on from, also of another image size or number of registers
        (begin_with). A drawer is left out, since its drafts change: train it again."""
        model, config = self.model, self.config
        model.drop_drawer()
        model.drop_length_head()
        self.nested_dropout = nested_dropout(model, config)
        self.sample_times = build(TIME_SAMPLERS, config.time_sampler, "time sampler")
        self.alignment: RepresentationAlignment | None = None
        self.prefix_alignment: PrefixAlignment | None = None
        if config.prefix_alignment is not None:
            if not model.ordered:
                raise ConfigError(
                    "objective.prefix_alignment is for prefixes: set model.ordered=true, or null"
                )
            if config.train is not None and "encoder" not in config.train:
                raise ConfigError(
                    f"objective.prefix_alignment trains the encoder, and objective.train="
                    f"{config.train} leaves it as it is: set prefix_alignment=null"
                )
        if weights is not None:
            begin_as(model, need("weights", weights, FlexTok))
        else:
            self.warnings = times_left_out(self.sample_times, config.time_sampler)
        train_only(model, config.train)

    def prepare(self, pretrained: bool = True) -> None:
        if pretrained and not self.model.vae.has_weights:
            self.model.vae.load_weights()
        weights = {} if pretrained else {"pretrained": False}
        if self.config.repa and self.alignment is None:
            spec = {**self.config.repa, "name": "repa", "dim": self.model.decoder.head.in_features}
            self.alignment = build({"repa": RepresentationAlignment}, spec | weights, "alignment")
        if self.config.prefix_alignment is not None and self.prefix_alignment is None:
            known = {"num_tokens": self.model.num_tokens, "code_dim": self.model.quantizer.dim}
            spec = {**self.config.prefix_alignment, "name": "prefix_alignment", **known}
            kinds = {"prefix_alignment": PrefixAlignment}
            self.prefix_alignment = build(kinds, spec | weights, "alignment")

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        if not self.model.vae.has_weights:
            raise ValueError(
                "the VAE has random weights: set model.vae.weights and call prepare(), or load a "
                "trained model, before training"
            )
        self.check(batch)
        key = "latents" if "latents" in batch else "image"
        noised = self.noised(*self.drawn_again(batch, draws_of(batch, key, generator)))
        codes, aux = self.encode(noised)
        seen = [some[:, : g.length] for g, some in zip(noised.groups, codes, strict=True)]
        if self.training:
            outputs = [
                self.predict(noised, some, g.rows, g.keep)
                for g, some in zip(noised.groups, seen, strict=True)
            ]
        else:
            every = as_one(noised.groups)
            padded = [F.pad(some, (0, 0, 0, every.length - some.shape[1])) for some in seen]
            outputs = [self.predict(noised, torch.cat(padded), every.rows, every.keep)]
        prediction = torch.cat([output.prediction for output in outputs])
        total, losses = self.flow_losses(noised, codes, prediction)
        total = total + aux
        for name in self.aligned():
            if noised.images is None:
                raise ValueError(f'objective.{name} reads images: give "image" beside "latents"')
            if (self.alignment if name == "repa" else self.prefix_alignment) is None:
                raise ValueError(f"config.{name} is set: call prepare() before training")
        if self.alignment is not None and noised.images is not None:
            features = torch.cat([output.features for output in outputs])
            losses["repa"] = self.alignment(features, noised.images)
            total = total + self.alignment.weight * losses["repa"]
        if self.prefix_alignment is not None and noised.images is not None:
            targets = self.prefix_alignment.targets(noised.images)
            errors = [
                self.prefix_alignment(some, targets[g.rows])
                for g, some in zip(noised.groups, codes, strict=True)
            ]
            losses["prefix_alignment"] = torch.cat(errors).mean()
            total = total + self.prefix_alignment.weight * losses["prefix_alignment"]
        return {"loss": total, **losses}

    def aligned(self) -> list[str]:
        """The terms that are asked for and read images."""
        asked = {"repa": bool(self.config.repa)}
        asked["prefix_alignment"] = self.config.prefix_alignment is not None
        return [name for name, on in asked.items() if on]

    def frozen_columns(self) -> tuple[str, ...]:
        if not isinstance(self.model.vae, NeedsWeights):  # its latents are the pixels
            return ()
        return ("latents", "image") if self.aligned() else ("latents",)

    def frozen_identity(self) -> dict[str, Any]:
        """Of the VAE's encoder: its decoder may go on being trained."""
        encoder = ("vae.vae.encoder.", "vae.vae.quant_conv.")
        return {
            "vae": self.model.codes_settings()["vae"],
            "vae_weights": fingerprint(self.model, encoder),
            "image_size": self.model.image_size,
        }

    def frozen(self, batch: Mapping[str, Any], draws: BatchDraws) -> dict[str, Tensor]:
        """The VAE's latents, and the images where an alignment reads them."""
        latents = self.model.vae.encode(batch["image"], generator=draws.generators)
        return {"latents": latents} | ({"image": batch["image"]} if self.aligned() else {})

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raises ValueError where its images or latents are not of the model's shapes."""
        images, latents = batch.get("image"), batch.get("latents")
        if images is not None:
            check_images(images, *self.model.shapes)
        if latents is not None and latents.shape[1:] != self.model.noise_shape:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (B, "
                f"{', '.join(map(str, self.model.noise_shape))}): they are another VAE's"
            )

    def drawn_again(
        self, batch: Mapping[str, Any], draws: BatchDraws
    ) -> tuple[Mapping[str, Any], BatchDraws]:
        """Training's batch with each row as often as config.draws_per_image asks, but for what the
        VAE encodes, once."""
        times = self.config.draws_per_image
        if times == 1 or not self.training:
            return batch, draws
        made = batch if "latents" in batch else self.frozen(batch, draws)
        held = [key for key in ("image", "latents") if key in made]
        return {key: made[key].repeat_interleave(times, 0) for key in held}, draws.repeat(times)

    def noised(self, batch: Mapping[str, Any], draws: BatchDraws) -> Noised:
        """batch: "image" (B, 3, H, W) in [-1, 1], or what `frozen` makes of it."""
        order, groups = self.nested_dropout.groups(draws)
        draws = draws.take(order)
        taken = {key: take_rows(batch[key], order) for key in ("image", "latents") if key in batch}
        u_null, u_time = draws(torch.rand, (2,), torch.device("cpu")).unbind(1)
        x0 = taken["latents"] if "latents" in taken else self.frozen(taken, draws)["latents"]
        t = to_device(self.sample_times(u_time), x0.device)  # MPS has no ndtri
        noise = draws(torch.randn, tuple(x0.shape[1:]), x0.device).to(x0.dtype)
        null = u_null < self.config.null_prob
        x_t = interpolate(x0, noise, t)
        return Noised(taken.get("image"), x0, noise, t, x_t, null, groups)

    def encode(self, noised: Noised) -> tuple[list[Tensor], Tensor]:
        """The codes of each group, and the quantizer's loss."""
        codes, aux = [], noised.x0.new_zeros((), dtype=torch.float32)
        encoder, z = self.model.encoder, None
        if not self.training:  # once, see as_one
            z = encoder(noised.x0, as_one(noised.groups).length)
        for rows, length, _ in noised.groups:
            outputs = encoder(noised.x0[rows], length) if z is None else z[rows, :length]
            some, _, loss = self.model.quantizer(outputs)
            codes.append(some)
            aux = aux + loss * ((rows.stop - rows.start) / len(noised.x0))
        return codes, aux

    def predict(
        self, noised: Noised, codes: Tensor, rows: slice, keep: Tensor | None
    ) -> DecoderOutput:
        registers, mask = self.model.decoder.embed_codes(codes, keep, noised.null[rows])
        return self.model.decoder(noised.x_t[rows], noised.t[rows], registers, mask)

    def flow_losses(
        self, noised: Noised, codes: list[Tensor], prediction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """codes: of each group. Returns the total and its terms."""
        flow = self.error(noised, prediction)
        return flow, {"flow": flow}

    def error(self, noised: Noised, prediction: Tensor, target: Tensor | None = None) -> Tensor:
        """The error of a prediction against a target, by default the true one."""
        predicts = self.model.config.prediction
        if target is None:
            target = velocity_target(noised.x0, noised.noise)
            target = noised.x0 if predicts == "x0" else target
        return flow_error(prediction, target, noised.t, predicts, self.config.loss_space)


def nested_dropout(model: FlexTok, config: PrefixConfig) -> NestedDropout:
    """As the model takes it: truncated, each length is a group as short as it can be; with mask
    tokens all rows are one."""
    return NestedDropout.of(model, config, "pow2", model.config.drop_mode == "truncate")


def begin_as(model: FlexTok, trained: FlexTok) -> None:
    """Take over a trained model's weights. Raises ConfigError where they do not fit."""
    both = [m.vae for m in (model, trained) if isinstance(m.vae, IdentityVAE)]
    if len(both) == 2 and both[1].is_measured and both[0].numbers() != both[1].numbers():
        shift, scale = both[1].numbers()
        raise ConfigError(
            f"model.vae={model.config.vae} is not that of the model it starts from: take "
            f"{{name: identity, shift: {shift}, scale: {scale}}}, or auto for both"
        )
    dropped = ("length_head.", *(["drawer."] if model.drawer is None else []))
    begin_with(model, trained, dropped)
