"""Pixels: TiTok's second stage and its single-stage recipe, and the MaskGIT-VQGAN."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.hub import Pretrained
from flextok.losses.perceptual import PerceptualLoss
from flextok.objectives.base import Objective, begin_with, draws_of, need, train_only
from flextok.objectives.nested_dropout import NestedDropout, PrefixConfig, as_one, take_rows
from flextok.schema import ConfigError, Weight
from flextok.tokenizers import MaskGITVQGAN, TiTok, Tokenizer
from flextok.tokenizers.base import check_images
from flextok.tokenizers.vqgan import to_unit


@dataclass
class ReconstructionConfig(PrefixConfig):
    """Keys of `objective` beside `name: reconstruction`."""

    perceptual: dict[str, Weight] = field(default_factory=dict)  # weights by name
    train: list[str] | None = None  # parts that learn; None = all, and in "finetune" the decoder


class PrefixObjective(Objective):
    """What objectives of TiTok and the VQGAN share: encoding, and decoding random prefixes."""

    config: PrefixConfig

    def begin(self) -> None:
        self.nested_dropout = NestedDropout.of(self.model, self.config, "uniform")

    def decoded(
        self,
        decode: Callable[..., Tensor],
        batch: Mapping[str, Any],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """What `decode` makes of the codes of each image, or of a random prefix, in an order of
        its own; the quantizer's loss; and this order."""
        images, text = batch["image"], batch.get("text_features")
        check_images(images, *self.model.shapes)
        draws = draws_of(batch, "image", generator)
        order, groups = self.nested_dropout.groups(draws)
        draws = draws.take(order)
        features = self.model.features(take_rows(images, order))
        codes, _, aux = self.model.quantizer(features, draws.generators)
        out = []
        ragged = len(groups) > 1 and not self.training
        for rows, length, keep in [as_one(groups)] if ragged else groups:
            options: dict[str, Any] = {"keep": keep} if ragged else {}
            if text is not None:
                options["text"] = take_rows(text, order[rows])
            out.append(decode(codes[rows, :length], **options))
        return torch.cat(out), aux, order


def continue_from(model: Tokenizer, trained: Tokenizer) -> None:
    """Take over a trained TiTok's or VQGAN's weights. Raises ConfigError where they do not fit."""
    legacy = isinstance(trained, TiTok) and trained.config.legacy
    if legacy and model.num_tokens != trained.num_tokens:
        raise ConfigError(
            f"model.num_tokens={model.num_tokens} must be {trained.num_tokens}: the outputs of a "
            "TiTok with legacy=true mix all of its tokens"
        )
    begin_with(model, trained)
    if isinstance(model, TiTok):
        model.has_weights = True


class ReconstructionObjective(PrefixObjective):
    """The squared error of the images, perceptual distances, and the quantizer's loss."""

    config_class = ReconstructionConfig
    models = ("titok", "maskgit_vqgan")
    starts = ("weights", "first", "proxy")
    config: ReconstructionConfig

    def begin(
        self,
        weights: Pretrained | None = None,
        first: Pretrained | None = None,
        proxy: Pretrained | None = None,
    ) -> None:
        """weights: a trained model of the same stage to go on from, also of another image size or
        number of tokens (begin_with). first, proxy: what a TiTok of the stage "finetune" begins
        with, unless it is trained already: its first stage, and the VQGAN whose decoder gives the
        pixels."""
        super().begin()
        model, train = self.model, self.config.train
        if weights is not None:
            continue_from(model, need("weights", weights, type(model)))
        stage = model.config.stage if isinstance(model, TiTok) else "single"
        if stage == "proxy":
            raise ConfigError("a TiTok of stage 'proxy' learns no pixels: objective=proxy_codes")
        if stage == "finetune":
            if first or proxy or not model.has_weights:
                trained = need("first", first, TiTok), need("proxy", proxy, MaskGITVQGAN)
                model.start_finetuning(*trained)
            train = train or ["decoder", "pixel_decoder", "pixel_quantizer"]
        elif first or proxy:
            name = "first" if first else "proxy"
            raise ConfigError(f"this {model.model_type} has no use for start.{name}")
        train_only(model, train)
        self.perceptual = PerceptualLoss(self.config.perceptual)

    def prepare(self, pretrained: bool = True) -> None:
        if used := self.perceptual.load(pretrained):
            self.model.metadata["perceptual"] = used

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return self.reconstruct(batch, generator)[0]

    def reconstruct(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Returns the losses, "l2" on [0, 1], as the published weights of the others presume; the
        images; and what became of them, (B, 3, H, W), about [-1, 1], both in one order."""
        made, aux, order = self.decoded(self.model.decode_codes, batch, generator)
        images = take_rows(batch["image"], order)
        losses = {
            "l2": F.mse_loss(to_unit(made.float()), to_unit(images.float())),
            "perceptual": self.perceptual(made, images),
            "quantizer": aux,
        }
        return {"loss": sum(losses.values(), images.new_zeros(())), **losses}, images, made
