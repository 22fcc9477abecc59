"""Stage 0: what a KL autoencoder minimises (LDM, arXiv 2112.10752, section 3.1).

    L1 + perceptual distances + kl_weight * KL, and from a set step on the loss of deceiving a patch
    discriminator, with the discriminator's own.

All terms are means over pixel values, so their weights hold at any resolution.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.autoencoder import Autoencoder
from flextok.draws import BatchDraws
from flextok.hub import Pretrained
from flextok.losses.adversarial import PatchDiscriminator
from flextok.losses.perceptual import PerceptualLoss
from flextok.nn.devices import to_device
from flextok.objectives.adversarial import Adversarial, PatchDiscriminatorConfig
from flextok.objectives.base import draws_of, need, take_over, train_only
from flextok.quantizers.kl import kl_to_normal
from flextok.schema import Bounds, ConfigError, Share, Weight
from flextok.tokenizers.base import check_images


@dataclass
class AutoencoderObjectiveConfig(PatchDiscriminatorConfig):
    """Keys of `objective` beside `name: autoencoder`."""

    weight: Annotated[float, Bounds(0)] = 0.0  # of the adversarial loss; 0 = no discriminator
    perceptual: dict[str, Weight] = field(default_factory=dict)  # weights by name
    # of the KL in nats, summed over an image's latents and divided by the number of its values
    kl_weight: Annotated[float, Bounds(0)] = 1e-3
    equivariance: Share = 0.0  # of the steps, see `transform`
    smallest: Annotated[float, Bounds(0.25, 1)] = 0.5  # scale of the latents in such a step
    # in deviations of each channel, see `with_noise`
    latent_noise: Share = 0.0
    # parts of the model that learn, such as [post_quant_conv, decoder], which leave the latents as
    # they are; None = all
    train: list[str] | None = None


class AutoencoderObjective(Adversarial):
    """Reconstruction from a sample of the posterior. In eval mode without transforms."""

    config_class = AutoencoderObjectiveConfig
    models = ("autoencoder",)
    starts = ("weights",)
    model: Autoencoder
    config: AutoencoderObjectiveConfig
    noise_scale: Tensor  # (C, 1, 1)

    def begin(self, weights: Pretrained | None = None) -> None:
        """weights: a trained autoencoder of the same sizes to go on from."""
        model = self.model
        if weights is not None:
            trained = need("weights", weights, Autoencoder)
            take_over(model, trained.state_dict())
            mean, std = trained.config.latents_mean, trained.config.latents_std
            model.config = replace(model.config, latents_mean=mean, latents_std=std)
        train_only(model, self.config.train)
        if self.config.latent_noise:
            if model.config.latents_std is None:
                raise ConfigError(
                    f"objective.latent_noise={self.config.latent_noise} is in deviations of the "
                    f"latents, which this model has not stored: name a trained autoencoder, whose "
                    f"latents were measured, as start.weights"
                )
            scale = self.config.latent_noise * torch.tensor(model.config.latents_std)
            self.register_buffer("noise_scale", scale.view(-1, 1, 1), persistent=False)
        self.perceptual = PerceptualLoss(self.config.perceptual)
        if self.config.weight:
            self.add_discriminator(PatchDiscriminator(self.config.dim, self.config.num_stages))

    def prepare(self, pretrained: bool = True) -> None:
        if used := self.perceptual.load(pretrained):
            self.model.metadata["perceptual"] = used

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        images, draws = batch["image"], draws_of(batch, "image", generator)
        check_images(images, (self.model.image_size, self.model.image_size))
        mean, logvar = self.model.posterior(images)
        noise = draws(torch.randn, tuple(mean.shape[1:]), mean.device)
        latents = mean + (logvar / 2).exp() * noise
        if self.model.training:
            latents = self.with_noise(latents, draws)
            latents, images = self.transform(latents, images, draws.of_step())
        made = self.model.decode(latents)
        losses = {
            "l1": (made - images).abs().mean(),
            "perceptual": self.perceptual(made, images),
            "kl": kl_to_normal(mean, logvar).sum() / batch["image"].numel(),
        }
        total = losses["l1"] + losses["perceptual"] + self.config.kl_weight * losses["kl"]
        losses = {"loss": total, **losses}
        if self.has_discriminator and self.model.training:
            return self.against_discriminator(losses, images, made)
        return losses

    def with_noise(self, latents: Tensor, draws: BatchDraws) -> Tensor:
        """latents: (B, C, h, w). Adds Gaussian noise of a deviation drawn for each image, uniform
        between 0 and config.latent_noise times the channel's own, measured before training. So the
        decoder learns to decode generated latents, which are a little off (RAE, arXiv 2510.11690,
        draws the amount from half a normal distribution)."""
        if not self.config.latent_noise:
            return latents
        amount = draws(torch.rand, (1, 1, 1), latents.device) * self.noise_scale
        return latents + amount * draws(torch.randn, tuple(latents.shape[1:]), latents.device)

    def transform(
        self, latents: Tensor, images: Tensor, rng: random.Random
    ) -> tuple[Tensor, Tensor]:
        """Equivariance (EQ-VAE, arXiv 2502.09509): in a share of the steps, the whole batch's
        latents are flipped, turned by quarters and made smaller, and the images likewise. Latents
        that decode to such images vary smoothly, which later stages model more easily."""
        if rng.random() >= self.config.equivariance:
            return latents, images
        flips, turns = rng.random() < 0.5, rng.randrange(4)
        side, factor = latents.shape[-1], images.shape[-1] // latents.shape[-1]
        smaller = max(2, 2 * round(side * rng.uniform(self.config.smallest, 1) / 2))  # even sides

        def apply(x: Tensor, size: int) -> Tensor:
            x = (x.flip(-1) if flips else x).rot90(turns, (-2, -1))
            if size >= x.shape[-1]:
                return x
            return F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True)

        return apply(latents, smaller), apply(images, smaller * factor)

    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measures the latents, unless they are those of the model that training started from."""
        model = self.model
        encoder = (*model.encoder.parameters(), *model.quant_conv.parameters())
        if model.config.latents_mean is None or any(p.requires_grad for p in encoder):
            model.measure(to_device(batch["image"], model.device) for batch in batches)
