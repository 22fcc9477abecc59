"""Adversarial training of a tokenizer: TiTok's second stage (arXiv 2406.07550), the single-stage
recipe, and the MaskGIT-VQGAN."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flextok.config import AdversarialConfig, OptimConfig
from flextok.losses.adversarial import (
    LeCam,
    PatchDiscriminator,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from flextok.training.modules import TokenizerModule
from flextok.training.optim import parameter_groups


class AdversarialModule(TokenizerModule):
    """Trains a tokenizer that has `reconstruct` and `reconstruction_losses`, and a discriminator
    of its reconstructions.

    The published code steps the tokenizer, then the discriminator, on the losses of one and the
    same forward pass: each sees the other as it was before. So one AdamW with a group of parameters
    for each does the same in one backward pass; each part's gradients are clipped on their own.
    """

    def __init__(
        self,
        model: Any,
        optim: OptimConfig,
        max_steps: int,
        adversarial: AdversarialConfig,
        seed: int = 0,
    ):
        super().__init__(model, optim, max_steps, seed)
        self.adversarial = adversarial
        self.discriminator = PatchDiscriminator(adversarial.dim, adversarial.num_stages)
        self.lecam = LeCam(adversarial.lecam_decay)
        self.judged: list[Tensor] = []  # mean logits of the real and the fake, of each micro-batch

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        images = batch["image"]
        draws = {"generator": self.draws(batch_index), "shared": self.shared_draws()}
        reconstruction = self.model.reconstruct(images, **draws)
        losses = self.model.reconstruction_losses(images, reconstruction)
        fake, real = reconstruction.images, images.to(reconstruction.images.dtype)
        if self.global_step >= self.adversarial.start:
            losses["adversarial"] = hinge_generator_loss(self.judge(fake)).float()
            losses["loss"] = losses["loss"] + self.adversarial.weight * losses["adversarial"]
            critic = self.discriminator_losses(real, fake.detach())
        else:  # a gradient of zero, since DDP waits for one
            sums = [p.sum() for p in self.discriminator.parameters()]
            critic = {"loss": 0.0 * torch.stack(sums).sum()}
        total = losses["loss"] + critic["loss"]
        losses |= {f"discriminator_{name}": value for name, value in critic.items()}
        self.log_losses("train", losses, len(images))
        return total

    def judge(self, images: Tensor) -> Tensor:
        """The discriminator's logits, with gradients to the images but not to its weights."""
        weights = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return torch.func.functional_call(self.discriminator, weights, (images,))

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """real, fake: (B, 3, H, W) in [-1, 1]. Returns scalars; notes the logits for LeCam."""
        logits = self.discriminator(torch.cat([real, fake]))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # fp32 island
        logits_real, logits_fake = logits.chunk(2)
        hinge = hinge_discriminator_loss(logits_real, logits_fake)
        lecam = self.lecam(logits_real, logits_fake)
        self.judged.append(torch.stack([logits_real.mean(), logits_fake.mean()]).detach())
        total = hinge + self.adversarial.lecam * lecam
        return {"loss": total, "hinge": hinge, "lecam": lecam}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Moves LeCam's averages by the step's logits, over all micro-batches and processes."""
        if self.judged:
            self.lecam.update(*self.mean_over_processes(torch.stack(self.judged).mean(dim=0)))
            self.judged = []

    def mean_over_processes(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="mean")

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer()
        config = replace(self.optim, lr=self.adversarial.lr or self.optim.lr, lr_scale={})
        for group in parameter_groups(self.discriminator, config):
            optimizer.add_param_group(group)
        return optimizer

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val:
            for part in (self.model, self.discriminator):
                torch.nn.utils.clip_grad_norm_(part.parameters(), gradient_clip_val)
