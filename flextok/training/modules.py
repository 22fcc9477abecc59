"""LightningModules: wiring of a model, its optimiser and its logs."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from flextok.config import OptimConfig
from flextok.draws import STEP, VALIDATION, derived_generator
from flextok.training.average import Average
from flextok.training.optim import make_optimizer, regroup, warmup_cosine
from flextok.training.sharding import is_sharded, shard


class TrainingModule(L.LightningModule):
    """Trains a model whose loss(*inputs, generator=) returns a dict of scalars with "loss".

    Every random draw of a step comes from a generator seeded by (seed, step, piece), the pieces
    being all batches of the step, over gradient accumulation and processes: a resumed run repeats
    exactly what an uninterrupted one would have drawn, and n processes do what one does with n
    times the accumulation.
    """

    def __init__(self, model: Any, optim: OptimConfig, max_steps: int, seed: int = 0):
        super().__init__()
        self.model, self.optim, self.max_steps, self.seed = model, optim, max_steps, seed
        self.average: Average | None = None

    def configure_model(self) -> None:
        if self.average is not None or is_sharded(self.model):
            return
        if self.device_mesh is not None:
            bf16 = self.trainer.precision == "bf16-mixed"
            shard(self.model, self.device_mesh["data_parallel"], bf16)
        if self.optim.ema_decay > 0:
            self.average = Average(self.model, self.optim.ema_decay)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        losses = self.losses(batch, self.draws(batch_index), self.shared_draws())
        self.log_losses("train", losses, len(next(iter(batch.values()))))
        return losses["loss"]

    def losses(
        self, batch: dict[str, Any], draws: torch.Generator, shared: torch.Generator
    ) -> dict[str, Tensor]:
        """The model's losses. draws: of this piece of the step; shared: the same in all pieces."""
        return self.model.loss(*self.inputs(batch), generator=draws)

    def shared_draws(self) -> torch.Generator:
        """The generator of what all pieces of a training step draw alike."""
        return derived_generator(self.seed, STEP, self.global_step)

    def draws(self, batch_index: int) -> torch.Generator:
        """The generator of a training step. Seeds the global one too, for dropout layers."""
        micro = batch_index % self.trainer.accumulate_grad_batches
        piece = micro * self.trainer.world_size + self.global_rank
        draws = derived_generator(self.seed, STEP, self.global_step, piece, 0)
        torch.manual_seed(draws.initial_seed())
        return draws

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        # the same draws at every validation, so that the curve shows the model and not the noise
        draws = derived_generator(self.seed, VALIDATION, batch_index, self.global_rank)
        losses = self.losses(batch, draws, derived_generator(self.seed, VALIDATION, batch_index))
        # Lightning averages the processes' counts in whole numbers: let these divide without rest
        self.log_losses("val", losses, batch["count"] * self.trainer.world_size)

    def log_losses(self, stage: str, losses: dict[str, Tensor], batch_size: int) -> None:
        # Lightning's own step count is off by one after an interruption inside a step
        options: dict[str, Any] = {"on_step": stage == "train", "on_epoch": stage == "val"}
        self.log("step", float(self.global_step), batch_size=1, **options)
        for name, value in losses.items():
            self.log(
                f"{stage}/{name}",
                value.detach(),
                prog_bar=name == "loss",
                batch_size=batch_size,
                sync_dist=stage == "val",
                **options,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["metadata"] = {**self.model.metadata, "step": self.global_step}
        checkpoint["optimizer_names"] = self.names_in(self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the optimizer's state into the groups that its present settings ask for."""
        before, states = checkpoint.get("optimizer_names"), checkpoint.get("optimizer_states")
        if before and states:
            after = [self.names_in(self.make_optimizer())]
            checkpoint["optimizer_states"] = [
                regroup(state, was, now)
                for state, was, now in zip(states, [before], after, strict=True)
            ]

    def names_in(self, optimizer: torch.optim.Optimizer) -> list[list[str]]:
        """The names of the parameters in each of its groups."""
        names = {parameter: name for name, parameter in self.named_parameters()}
        return [[names[p] for p in group["params"]] for group in optimizer.param_groups]

    def on_train_start(self) -> None:
        """A run that continues takes its optimizer's settings from the config, and from the
        checkpoint only what it has learned."""
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        schedule = config.scheduler
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        schedule.base_lrs = [settings["initial_lr"] for settings in self.settings]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, settings, factor in zip(
            optimizer.param_groups, self.settings, factors, strict=True
        ):
            group.update({**settings, "lr": settings["initial_lr"] * factor})

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.optim)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optimizer = self.make_optimizer()
        factor = warmup_cosine(self.optim.warmup_steps, self.max_steps, self.optim.final_lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class TokenizerModule(TrainingModule):
    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (batch["image"],)

    def losses(
        self, batch: dict[str, Any], draws: torch.Generator, shared: torch.Generator
    ) -> dict[str, Tensor]:
        return self.model.loss(*self.inputs(batch), generator=draws, shared=shared)


class GeneratorModule(TrainingModule):
    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        # a generator may write only the first tokens of an ordered tokenizer's
        indices = batch["indices"][:, : self.model.num_tokens]
        return indices, batch["text" if "text" in batch else "label"]
