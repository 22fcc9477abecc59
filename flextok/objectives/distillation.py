"""The few-step decoder: a student takes in one Euler step what its teacher takes several for.

Progressive distillation (arXiv 2202.00512) done in one stage, with guidance taken in as in arXiv
2210.03142. The student begins as its teacher; its velocity at the start of each of its steps learns
the mean velocity of the teacher's own, guided solution over that step. The start is the student's
own: it walks there from noise, so it learns to mend what its earlier steps left wrong. Why not a
consistency, shortcut or MeanFlow model: those need the step's length as a new input, or derivatives
through the network; here the target is an exact function of the input, model and sampler stay as
they are, and a teacher's checkpoint loads as the student. docs/speed.md has a comparison.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from flextok.draws import BatchDraws
from flextok.flow.path import flow_error, x0_of
from flextok.hub import Pretrained
from flextok.nn.frozen import Frozen
from flextok.objectives.base import Objective, draws_of, hold, need
from flextok.objectives.flow import begin_as, nested_dropout
from flextok.objectives.nested_dropout import PrefixConfig, as_one, take_rows
from flextok.schema import Bounds, ConfigError
from flextok.tokenizers import FlexTok
from flextok.tokenizers.base import check_images
from flextok.tokenizers.decoding import MAX_STEPS, Conditions, DecodeOptions, solve

Steps = Annotated[int, Bounds(1, MAX_STEPS)]


@dataclass
class DistillationConfig(PrefixConfig):
    """Keys of `objective` beside `name: distillation`."""

    num_steps: Steps = 4  # the student's
    teacher_steps: Steps = 5  # the teacher's within each of them


def begin_student(model: FlexTok, teacher: FlexTok, num_steps: int) -> None:
    """The model begins as the teacher. From here on it decodes in so many Euler steps without
    guidance, and in no other way. Raises ConfigError where they are of other sizes or codes."""
    if model.num_tokens != teacher.num_tokens:
        raise ConfigError(
            f"model.num_registers={model.num_tokens} must be the teacher's {teacher.num_tokens}"
        )
    model.drop_length_head()
    begin_as(model, teacher)
    if model.codes_settings()["quantizer"] != teacher.codes_settings()["quantizer"]:
        raise ConfigError(
            f"model.quantizer={model.config.quantizer} is not the teacher's: a student's "
            "indices must mean the same, so leave it out"
        )
    fixed: dict[str, Any] = {"num_steps": num_steps, "solver": "euler"}
    fixed |= {"guidance_scale": 1.0, "guidance_interval": None}
    model.config = replace(
        model.config, decode=replace(model.config.decode, **fixed), distilled=True
    )


class Stretch(NamedTuple):
    """One of a student's steps."""

    walked: Tensor  # the times of its steps from noise to the start of this one
    within: Tensor  # the times of the teacher's, from this start to the end
    length: Tensor  # (), from start to end, negative

    @classmethod
    def drawn(cls, draws: BatchDraws, decode: DecodeOptions, teacher_steps: int) -> "Stretch":
        """decode: the student's."""
        times, i = decode.times(), draws.of_step("stretch").randrange(decode.num_steps)
        length = times[i + 1] - times[i]
        within = times[i] + length * torch.linspace(0, 1, teacher_steps + 1)
        return cls(times[: i + 1], within, length)

    def taught(self, guided: Conditions, x: Tensor, options: DecodeOptions) -> Tensor:
        """The teacher's mean velocity over it from x (B, C, h, w). options: the teacher's."""
        return (solve(guided, x, options, times=self.within) - x) / self.length


class DistillationObjective(Objective):
    """The squared error of the student's mean velocity over one of its steps, drawn for the whole
    batch. The condition is the images' codes; the teacher solves with its own config.decode."""

    config_class = DistillationConfig
    models = ("flextok",)
    starts = ("teacher",)
    model: FlexTok
    config: DistillationConfig

    def begin(self, teacher: Pretrained | None = None) -> None:
        """The model begins as the teacher, and only its decoder learns. From here on it decodes in
        config.num_steps Euler steps without guidance."""
        model, config = self.model, self.config
        trained = need("teacher", teacher, FlexTok)
        if model.drawer or trained.drawer:
            raise ConfigError(
                "distillation is of first decoders: of a drawer it is objective "
                "{name: drawing_distillation}"
            )
        begin_student(model, trained, config.num_steps)
        hold(model, model.encoder.parameters())
        hold(model, model.quantizer.parameters())  # a codebook
        hold(model, [model.decoder.null_token])  # guidance is the teacher's
        self.teacher = Frozen(trained)
        self.nested_dropout = nested_dropout(model, config)

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        student, images = self.model, batch["image"]
        check_images(images, *student.shapes)
        device, predicts = images.device, student.config.prediction
        teacher = self.teacher.to(device)
        draws = draws_of(batch, "image", generator)
        decode = student.config.decode
        stretch = Stretch.drawn(draws, decode, self.config.teacher_steps)
        start = stretch.walked[-1]
        order, groups = self.nested_dropout.groups(draws)
        groups = groups if self.training else [as_one(groups)]
        draws = draws.take(order)
        with torch.no_grad():
            latents = student.vae.encode(take_rows(images, order), generator=draws.generators)
        noise = draws(torch.randn, tuple(latents.shape[1:]), device)
        predictions, targets = [], []
        for rows, length, keep in groups:
            with torch.no_grad():
                codes = student.quantizer(student.encoder(latents[rows], length))[0][:, :length]
                x = decode.scaled(noise[rows], keep, student.num_tokens)
                if len(stretch.walked) > 1:
                    own = student.conditions(codes, keep)
                    x = solve(own, x, decode, times=stretch.walked)
                target = stretch.taught(teacher.conditions(codes, keep), x, teacher.config.decode)
            targets.append(x0_of(target, x, start) if predicts == "x0" else target)
            registers, mask = student.decoder.embed_codes(codes, keep)
            predictions.append(student.decoder(x, start, registers, mask).prediction)
        predicted, target = torch.cat(predictions), torch.cat(targets)
        loss = flow_error(predicted, target, start, predicts, "velocity")
        return {"loss": loss, "distill": loss}
