"""The few-step drawer: a student takes in one Euler step what its teacher takes several for.

As in distillation.py, the student walks from noise by its own steps, and at the start of one of
them learns the mean velocity of the teacher's guided solution over it. Where few steps are too few
for the solution, the error's best answer is a mean, and blurred. So the latents that the last step
ends at also face a discriminator: they and the true ones get noise, and it judges the features that
the teacher, given the draft, computes of them (latent adversarial diffusion distillation, arXiv
2403.12015).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from flextok.flow.path import interpolate, x0_of
from flextok.hub import Pretrained
from flextok.losses.adversarial import FeatureDiscriminator
from flextok.nn.devices import to_device
from flextok.nn.frozen import Frozen
from flextok.objectives.adversarial import Adversarial, DiscriminatorConfig
from flextok.objectives.base import hold, need, train_only
from flextok.objectives.distillation import Steps, Stretch, begin_student
from flextok.objectives.drawing import DrawingConfig, DrawingObjective
from flextok.objectives.flow import nested_dropout
from flextok.schema import Bounds, ConfigError, Size
from flextok.tokenizers import FlexTok
from flextok.tokenizers.decoding import solve

JUDGED = slice(None, None, -2)  # of the teacher's blocks the last, and every second before it
MOST_NOISE = 0.8  # near pure noise a true image and a drawn one look alike


@dataclass
class DrawingDistillationConfig(DrawingConfig, DiscriminatorConfig):
    """Keys of `objective` beside `name: drawing_distillation`."""

    num_steps: Steps = 4  # the student's
    teacher_steps: Steps = 3  # the teacher's within each of them
    weight: Annotated[float, Bounds(0)] = 0.0  # of the adversarial loss; 0 = no discriminator
    start_step: Annotated[int, Bounds(0)] = 0
    dim: Size = 64  # the width of the discriminator's heads


class DrawingDistillationObjective(Adversarial, DrawingObjective):
    config_class = DrawingDistillationConfig
    models = ("flextok",)
    starts = ("teacher",)
    model: FlexTok
    config: DrawingDistillationConfig

    def begin(self, teacher: Pretrained | None = None) -> None:  # type: ignore[override]
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
        hold(model, [model.drawer.null_draft])  # guidance is the teacher's
        self.teacher = Frozen(trained)
        self.nested_dropout = nested_dropout(model, config)
        if config.weight:
            blocks, dim = trained.drawer.blocks, trained.drawer.dim
            self.add_discriminator(FeatureDiscriminator(len(blocks[JUDGED]), dim, config.dim))

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """batch: as for DrawingObjective."""
        draws, found = self.found(batch, generator)
        latents, draft, keep = found["latents"], found["draft"], found["keep"]
        device, decode = latents.device, self.model.config.decode
        teacher = self.teacher.to(device)
        stretch = Stretch.drawn(draws, decode, self.config.teacher_steps)
        start = stretch.walked[-1]
        own, guided = (drawer.conditions(draft) for drawer in (self.drawer, teacher.drawer))
        noise = draws(torch.randn, tuple(latents.shape[1:]), device)
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
        t = to_device(draws(torch.rand, (), torch.device("cpu")) * MOST_NOISE, device)
        noise = draws(torch.randn, tuple(latents.shape[1:]), device)

        def features(x0: Tensor) -> Tensor:  # (B, L, N, D)
            layers = teacher.drawer.features(interpolate(x0, noise, t), t, draft)
            return torch.stack([x for x, _ in layers][JUDGED], dim=1)

        with torch.no_grad():
            real = features(latents)
        return self.against_discriminator(losses, real, features(x0_of(velocity, x, start)))
