"""Training against a discriminator, and the reconstruction that does: TiTok's second stage (arXiv
2406.07550), the single-stage recipe, and the MaskGIT-VQGAN."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from flextok.hub import Pretrained
from flextok.losses.adversarial import (
    LeCam,
    PatchDiscriminator,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from flextok.objectives.base import Objective, Part
from flextok.objectives.reconstruction import ReconstructionConfig, ReconstructionObjective
from flextok.schema import Bounds, Share, Size


@dataclass
class DiscriminatorConfig:
    """When and how strongly a discriminator counts."""

    weight: Annotated[float, Bounds(0)] = 0.01  # of the adversarial loss, in the model's
    # the step from which on it counts, and the discriminator learns
    start_step: Annotated[int, Bounds(0)] = 20_000
    lecam: Annotated[float, Bounds(0)] = 1e-3  # of LeCam regularization, in the discriminator's
    lecam_decay: Share = 0.999
    dim: Size = 128  # channels of the discriminator's first stage
    # the discriminator's learning rate; by default the model's
    lr: Annotated[float, Bounds(0, 10, open_low=True)] | None = None


@dataclass
class PatchDiscriminatorConfig(DiscriminatorConfig):
    """The same, with the size of a patch discriminator."""

    num_stages: Annotated[int, Bounds(1, 16)] = 3  # each halves the discriminator's grid


class Adversarial(Objective):
    """What objectives with a discriminator share.

    The published code steps the tokenizer, then the discriminator, on the losses of one and the
    same forward pass: each sees the other as it was before. So one optimizer with a group of
    parameters for each does the same in one backward pass; each part's gradients are clipped on
    their own. In eval mode there is no discriminator, nor before add_discriminator()."""

    config: DiscriminatorConfig

    def add_discriminator(self, discriminator: nn.Module) -> None:
        self.discriminator = discriminator
        self.lecam = LeCam(self.config.lecam_decay)
        self.judged: list[Tensor] = []  # mean logits of the real and the fake, of each micro-batch

    def against_discriminator(
        self, losses: dict[str, Tensor], real: Tensor, fake: Tensor
    ) -> dict[str, Tensor]:
        """The losses with those of deceiving the discriminator, and its own, in the total. real,
        fake: (B, ...), what it takes: images in [-1, 1], or features of latents."""
        losses = dict(losses)
        if self.step >= self.config.start_step:
            losses["adversarial"] = hinge_generator_loss(self.judge(fake)).float()
            losses["loss"] = losses["loss"] + self.config.weight * losses["adversarial"]
            critic = self.discriminator_losses(real.to(fake.dtype), fake.detach())
        else:
            critic = {"loss": self.without_discriminator()}
        losses["loss"] = losses["loss"] + critic["loss"]
        return losses | {f"discriminator_{name}": value for name, value in critic.items()}

    def without_discriminator(self) -> Tensor:
        """A loss of zero, with a gradient of zero for all weights, since DDP waits for one."""
        return 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()

    def judge(self, fake: Tensor) -> Tensor:
        """The discriminator's logits, with gradients to its input but not to its weights."""
        weights = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return torch.func.functional_call(self.discriminator, weights, (fake,))

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """real, fake: (B, ...). Returns scalars; notes the logits for LeCam."""
        logits = self.discriminator(torch.cat([real, fake]))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # fp32 island
        logits_real, logits_fake = logits.chunk(2)
        hinge = hinge_discriminator_loss(logits_real, logits_fake)
        lecam = self.lecam(logits_real, logits_fake)
        self.judged.append(torch.stack([logits_real.mean(), logits_fake.mean()]).detach())
        total = hinge + self.config.lecam * lecam
        return {"loss": total, "hinge": hinge, "lecam": lecam}

    @property
    def has_discriminator(self) -> bool:
        return "discriminator" in dict(self.named_children())

    def parts(self) -> list[Part]:
        if not self.has_discriminator:
            return super().parts()
        return [Part(self.model), Part(self.discriminator, self.config.lr)]

    def before_step(self, mean: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Moves LeCam's averages by the step's logits, over all micro-batches and processes. Before
        start_step, and in a step that it has not judged, takes the discriminator's gradients of
        zero away: AdamW would count them, decay the weights, move them by what it remembers, and
        take steps of several times its rate at the first true ones."""
        if self.has_discriminator and (self.step < self.config.start_step or not self.judged):
            for parameter in self.discriminator.parameters():
                parameter.grad = None
        if self.has_discriminator and self.judged:
            self.lecam.update(*mean(torch.stack(self.judged).mean(dim=0)))
            self.judged = []


@dataclass
class AdversarialConfig(PatchDiscriminatorConfig, ReconstructionConfig):
    """Keys of `objective` beside `name: adversarial`."""


class AdversarialObjective(Adversarial, ReconstructionObjective):
    """The reconstruction's losses, that of deceiving a discriminator, and the discriminator's
    own."""

    config_class = AdversarialConfig
    config: AdversarialConfig

    def begin(
        self,
        weights: Pretrained | None = None,
        first: Pretrained | None = None,
        proxy: Pretrained | None = None,
    ) -> None:
        super().begin(weights, first, proxy)
        self.add_discriminator(PatchDiscriminator(self.config.dim, self.config.num_stages))

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        losses, images, fake = self.reconstruct(batch, generator)
        return self.against_discriminator(losses, images, fake) if self.model.training else losses
