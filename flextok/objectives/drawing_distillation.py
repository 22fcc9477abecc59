"""The few-step drawer: a student takes in one Euler step what its teacher takes several for.

As in distillation.py, the student walks from noise by its own steps, and at the start of one of
them learns the mean velocity of the teacher's guided solution over it. Where few steps are too few
for the solution, the error's best answer is a mean, and blurred. So the latents that the last step
ends at also face a discriminator, which knows the draft and the true latents (adversarial
distillation: arXiv 2403.12015).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.flow.path import x0_of
from flextok.hub import Pretrained
from flextok.nn.frozen import Frozen
from flextok.objectives.adversarial import Adversarial, DiscriminatorConfig
from flextok.objectives.base import need, train_only
from flextok.objectives.distillation import Steps, Stretch, begin_student
from flextok.objectives.drawing import DrawingConfig, DrawingObjective
from flextok.objectives.flow import nested_dropout
from flextok.schema import Bounds, ConfigError, Size
from flextok.tokenizers import FlexTok
from flextok.tokenizers.decoding import solve


@dataclass
class DrawingDistillationConfig(DrawingConfig, DiscriminatorConfig):
    num_steps: Steps = 4  # the student's
    teacher_steps: Steps = 3  # the teacher's within each of them
    weight: Annotated[float, Bounds(0)] = 0.0  # of the adversarial loss; 0 = no discriminator
    start_step: Annotated[int, Bounds(0)] = 0
    dim: Size = 64
    num_stages: Annotated[int, Bounds(1, 16)] = 2


class DrawingDistillationObjective(Adversarial, DrawingObjective):
    config_class = DrawingDistillationConfig
    models = ("flextok",)
    starts = ("teacher",)
    model: FlexTok
    config: DrawingDistillationConfig

    def begin(self, teacher: Pretrained | None = None) -> None:
        """teacher: a trained FlexTok with a drawer, as which the model begins. From here on it
        decodes in config.num_steps Euler steps without guidance. Raises ConfigError where one of
        them has no drawer."""
        model, config = self.model, self.config
        trained = need("teacher", teacher, FlexTok)
        if model.drawer is None or trained.drawer is None:
            raise ConfigError(
                "drawing_distillation trains model.drawer from a teacher's: of first decoders it "
                "is objective {name: distillation}"
            )
        begin_student(model, trained, config.num_steps)
        train_only(model, ["drawer"])
        model.drawer.null_draft.requires_grad_(False)  # guidance is the teacher's
        self.teacher = Frozen(trained)
        self.nested_dropout = nested_dropout(model, config)
        if config.weight:
            channels, side, _ = model.drawer.noise_shape
            channels += 3 * model.drawer.vae.downsample**2
            self.add_discriminator(channels, max(1, side // 2**config.num_stages))

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """batch: as of DrawingObjective."""
        draws, found = self.found(batch, generator)
        latents, draft, keep = found["latents"], found["draft"], found["keep"]
        device, decode = latents.device, self.model.config.decode
        teacher = self.teacher.to(device)
        stretch = Stretch.drawn(draws, decode, self.config.teacher_steps)
        start = stretch.walked[-1]
        own, guided = (drawer.conditions(draft) for drawer in (self.drawer, teacher.drawer))
        noise = draws(torch.randn, self.drawer.noise_shape, device)
        x = decode.scaled(noise, keep, self.model.num_tokens)
        with torch.no_grad():
            x = solve(own, x, decode, times=stretch.walked)
            target = stretch.taught(guided, x, teacher.config.decode)
        velocity = own.given(x, start).float()
        distill = (velocity - target).square().mean()
        losses = {"loss": distill, "distill": distill}
        if not (self.has_discriminator and self.model.training):
            return losses
        if len(stretch.walked) < self.config.num_steps:
            return {**losses, "loss": distill + self.without_discriminator()}
        condition = F.pixel_unshuffle(draft, self.drawer.vae.downsample)  # (B, 3 f f, h, w)
        real, fake = (
            torch.cat([x0, condition.to(x0.dtype)], dim=1)
            for x0 in (latents.float(), x0_of(velocity, x, start))
        )
        return self.against_discriminator(losses, real, fake)
