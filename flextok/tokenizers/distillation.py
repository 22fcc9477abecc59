"""The few-step decoder: a student takes in one Euler step what its teacher takes several for.

Progressive distillation (arXiv 2202.00512) done in one stage, with guidance taken in as in arXiv
2210.03142. The student begins as its teacher; its velocity at the start of each of its steps learns
the mean velocity of the teacher's own, guided solution over that step. The start is the student's
own: it walks there from noise, so it learns to mend what its earlier steps left wrong. Why not a
consistency, shortcut or MeanFlow model: those need the step's length as a new input, or derivatives
through the network; here the target is an exact function of the input, model and sampler stay as
they are, and a teacher's checkpoint loads as the student.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from flextok.draws import draw, host_random
from flextok.flow.path import flow_error, linear_times, shift_times, x0_of
from flextok.schema import Bounds
from flextok.tokenizers.base import check_images


@dataclass
class DistillConfig:
    """In a saved model it says: this decoder takes num_steps Euler steps and no guidance."""

    num_steps: Annotated[int, Bounds(1, 10_000)] = 4  # the student's
    teacher_steps: Annotated[int, Bounds(1, 10_000)] = 5  # the teacher's within each of them

    def __post_init__(self) -> None:
        for key in ("num_steps", "teacher_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"distill.{key}={getattr(self, key)} must be at least 1")


def distillation_loss(
    student: Any,
    teacher: Any,
    images: Tensor,
    generator: torch.Generator | None,
    shared: torch.Generator | None,
) -> dict[str, Tensor]:
    """images: (B, 3, H, W) in [-1, 1]: their codes are the condition. student, teacher: FlexTok
    with the same encoder; the teacher solves as its config.decode says. One of the student's steps
    is drawn for the whole batch, by `shared` as the lengths are: the same one in every process.
    Returns scalars; "loss" is the mean velocity's squared error."""
    config = student.config.distill
    check_images(images, student.image_size)
    batch, device = len(images), images.device
    groups = student.draw_groups(batch, shared)
    i = host_random(shared).randrange(config.num_steps)
    steps = shift_times(linear_times(config.num_steps), student.config.decode.time_shift)
    start, end = steps[i], steps[i + 1]
    within = start + (end - start) * torch.linspace(0, 1, config.teacher_steps + 1)
    images = images[draw(torch.rand, (batch,), generator, device).argsort()]
    with torch.no_grad():
        latents = student.vae.encode(images, generator=generator)
    noise = draw(torch.randn, (batch, *student.noise_shape), generator, device)
    predictions, targets = [], []
    for rows, length, keep in groups:
        with torch.no_grad():
            codes = student.quantizer(student.encoder(latents[rows], length))[0][:, :length]
            x = noise[rows]
            if i:
                x = student.solve(x, steps[: i + 1], codes, keep)
            target = (teacher.solve(x, within, codes, keep) - x) / (end - start)
            if student.config.prediction == "x0":
                target = x0_of(target, x, start)
        registers, mask = student.decoder.embed_codes(codes, keep)
        predictions.append(student.decoder(x, start, registers, mask).prediction)
        targets.append(target)
    predicted, target = torch.cat(predictions), torch.cat(targets)
    loss = flow_error(predicted, target, start, student.config.prediction, "velocity")
    return {"loss": loss, "distill": loss}
