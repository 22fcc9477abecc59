"""What a drawer minimises: the flow's error on latents, given the draft of a random prefix."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flextok.draws import BatchDraws
from flextok.flow.path import TIME_SAMPLERS, interpolate, velocity_target
from flextok.hub import Pretrained, fingerprint
from flextok.nn.devices import to_device
from flextok.objectives.base import (
    Objective,
    draws_of,
    need,
    take_over,
    times_left_out,
    train_only,
)
from flextok.objectives.flow import nested_dropout
from flextok.objectives.nested_dropout import PrefixConfig, as_one, take_rows
from flextok.schema import ConfigError, Share, build, to_mapping
from flextok.tokenizers import FlexTok
from flextok.tokenizers.base import check_images, component
from flextok.tokenizers.drawer import Drawer
from flextok.vae import VAES


@dataclass
class DrawingConfig(PrefixConfig):
    """Keys of `objective` beside `name: drawing`."""

    null_prob: Share = 0.1  # how often the draft is left out, for guidance
    time_sampler: dict[str, Any] = field(
        default_factory=lambda: {"name": "thick_tailed", "mean": 0.3}
    )


class DrawingObjective(Objective):
    """Trains a FlexTok's drawer. The tokens, the first decoder and the VAEs stay as they are."""

    config_class: ClassVar[type] = DrawingConfig
    models = ("flextok",)
    starts: ClassVar[tuple[str, ...]] = ("weights", "drawer")
    model: FlexTok
    config: DrawingConfig

    def begin(self, weights: Pretrained | None = None, drawer: Pretrained | None = None) -> None:
        """weights: the trained tokenizer whose drafts are drawn around, with a drawer or without;
        drawer: a FlexTok whose drawer to go on with. It reads drafts and no tokens, so it may be
        that of another tokenizer. Raises ConfigError where a model lacks what is asked of it."""
        model, config = self.model, self.config
        if model.drawer is None:
            raise ConfigError("drawing trains model.drawer, which this model does not have")
        trained = need("weights", weights, FlexTok)
        model.drop_length_head()
        for name, part in trained.named_children():
            if name != "length_head":
                take_over(model.get_submodule(name), part.state_dict())
        if drawer is not None:
            other = need("drawer", drawer, FlexTok).drawer
            if other is None:
                raise ConfigError("start.drawer: this model has no drawer to go on with")
            take_over(model.drawer, other.state_dict())
        self.nested_dropout = nested_dropout(model, config)
        self.sample_times = build(TIME_SAMPLERS, config.time_sampler, "time sampler")
        if trained.drawer is None and drawer is None:
            self.warnings = times_left_out(self.sample_times, config.time_sampler)
        train_only(model, ["drawer"])

    @property
    def drawer(self) -> Drawer:
        assert self.model.drawer is not None, "begin() asks for one"
        return self.model.drawer

    def prepare(self, pretrained: bool = True) -> None:
        if pretrained and not self.drawer.vae.has_weights:
            self.drawer.vae.load_weights()

    def frozen_columns(self) -> tuple[str, ...]:
        return ("latents", "draft", "keep")

    def frozen_identity(self) -> dict[str, Any]:
        """Of the tokenizer, the first decoder's drafts, the lengths and the drawer's encoder."""
        model, asked = self.model, self.config
        assert model.config.drawer is not None, "begin() asks for one"
        parts = ("vae.", "encoder.", "quantizer.", "decoder.")
        drawer_vae = ("drawer.vae.vae.encoder.", "drawer.vae.vae.quant_conv.")
        config = to_mapping(replace(model.config, drawer=None))
        del config["length_head"]  # no draft depends on it
        return {
            "weights": fingerprint(model, (*parts, *drawer_vae)),
            "tokenizer": {**config, "vae": model.codes_settings()["vae"], "decode": None},
            "draft_options": to_mapping(model.config.drawer.draft),
            "drawer_vae": component(VAES, model.config.drawer.vae, unused="weights slicing"),
            "lengths": [asked.nested_dropout, asked.batch_lengths],
        }

    @torch.no_grad()
    def frozen(self, batch: Mapping[str, Any], draws: BatchDraws) -> dict[str, Tensor]:
        """batch: "image" (B, 3, H, W) in [-1, 1]. Returns "latents" (B, C, h, w) of the drawer's
        VAE, "draft" (B, 3, H, W) in [-1, 1] from a random prefix and "keep" (B,), its length."""
        model, images = self.model, batch["image"]
        check_images(images, *model.shapes)
        order, groups = self.nested_dropout.groups(draws)
        groups = groups if self.training else [as_one(groups)]
        images = take_rows(images, order)
        codes = model.quantizer(model.encoder(model.vae.encode(images, sample=False)))[0]
        size = (images.shape[2], images.shape[3])
        drafts = [model.draft(codes[g.rows, : g.length], g.keep, size) for g in groups]
        found = {
            "latents": self.drawer.vae.encode(images, sample=False),
            "draft": torch.cat(drafts),
            "keep": torch.cat([g.keep for g in groups]),
        }
        back = sorted(range(len(order)), key=order.__getitem__)
        return {name: take_rows(value, back) for name, value in found.items()}

    def found(
        self, batch: Mapping[str, Any], generator: torch.Generator | None
    ) -> tuple[BatchDraws, Mapping[str, Any]]:
        """The batch's draws, and what `frozen` returns for it where it does not hold this."""
        if not self.drawer.vae.has_weights:
            raise ValueError(
                "the drawer's VAE has random weights: set model.drawer.vae.weights and call "
                "prepare(), or load a trained model, before training"
            )
        cached = "latents" in batch
        draws = draws_of(batch, "latents" if cached else "image", generator)
        return draws, batch if cached else self.frozen(batch, draws)

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """batch: "image", or what `frozen` returns for it."""
        draws, found = self.found(batch, generator)
        x0 = found["latents"]
        u_null, u_time = draws(torch.rand, (2,), torch.device("cpu")).unbind(1)
        t = to_device(self.sample_times(u_time), x0.device)  # MPS has no ndtri
        noise = draws(torch.randn, tuple(x0.shape[1:]), x0.device).to(x0.dtype)
        null = u_null < self.config.null_prob
        velocity = self.drawer(interpolate(x0, noise, t), t, found["draft"], null)
        flow = (velocity.float() - velocity_target(x0, noise).float()).square().mean()
        return {"loss": flow, "flow": flow}
