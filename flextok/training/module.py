"""The LightningModule: an objective, its optimizer, the average of its weights, and its logs."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from flextok.data.datamodule import DataModule
from flextok.draws import STEP, VALIDATION, derived_generator
from flextok.objectives.base import Objective
from flextok.training.checkpoints import RUN_FORMAT
from flextok.training.optim import make_optimizer, warmup_cosine
from flextok.training.options import FitOptions
from flextok.training.sharding import is_sharded, shard


class TrainingModule(L.LightningModule):
    """Minimises an objective.

    Every random draw of a step comes from a generator seeded by (seed, step) and from the number of
    its row in the step's whole batch, over gradient accumulation and processes. So a resumed run
    repeats exactly what an uninterrupted one would have drawn, and n processes do what one does
    with n times the accumulation.

    Beside the objective's weights it keeps their exponential moving average, shared out as they
    are. Validation, images and exports use the average.
    """

    def __init__(self, objective: Objective, options: FitOptions):
        super().__init__()
        self.objective, self.options = objective, options
        self.average: nn.ParameterList | None = None
        self.finished: int | None = None  # the step that the objective was finished at

    def configure_model(self) -> None:
        if self.average is not None or is_sharded(self.objective):
            return
        if self.device_mesh is not None:
            bf16 = self.trainer.precision == "bf16-mixed"
            shard(self.objective, self.device_mesh["data_parallel"], bf16)
        if self.options.optim.ema_decay > 0:
            copies = [p.detach().clone() for p in self.trained()]
            self.average = nn.ParameterList(nn.Parameter(c, requires_grad=False) for c in copies)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.objective.parameters() if p.requires_grad]

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        step = self.global_step
        micro = batch_index % self.trainer.accumulate_grad_batches
        piece = micro * self.trainer.world_size + self.global_rank
        # the global generator serves dropout layers
        torch.manual_seed(derived_generator(self.options.seed, STEP, step, piece, 0).initial_seed())
        size = self.options.batch_size
        rows = range(piece * size, (piece + 1) * size)
        self.objective.step = step
        draws = derived_generator(self.options.seed, STEP, step)
        losses = self.objective({**batch, "row": rows}, draws)
        self.log_losses("train", losses, size)
        return losses["loss"]

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        # the same draws at every validation, so that the curve shows the model and not the noise,
        # and of each sample the same in any batch
        losses = self.objective(batch, derived_generator(self.options.seed, VALIDATION))
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

    # The optimizer, and what a run that continues takes over of it.

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optim = self.options.optim
        optimizer = make_optimizer(self.objective, optim)
        factor = warmup_cosine(optim.warmup_steps, self.options.max_steps, optim.final_lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def names_in(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """The names of its parameters, group by group."""
        names = {parameter: name for name, parameter in self.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run_format"] = RUN_FORMAT
        checkpoint["optimizer_names"] = self.names_in(self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the optimizer's state, parameter by parameter, into the groups that its present
        settings ask for."""
        optimizer = make_optimizer(self.objective, self.options.optim)
        number = {name: i for i, name in enumerate(self.names_in(optimizer))}
        for saved in checkpoint.get("optimizer_states", []):  # a folder has them by name
            names = checkpoint["optimizer_names"]
            saved["state"] = {
                number[names[i]]: state for i, state in saved["state"].items() if names[i] in number
            }
            saved["param_groups"] = optimizer.state_dict()["param_groups"]
        if "loops" in checkpoint:
            self.recount_batches(checkpoint)

    def recount_batches(self, checkpoint: dict[str, Any]) -> None:
        """Lightning counts batches, and places accumulation and validations by them: count those of
        the checkpoint's steps with the present number of batches a step."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for part in ("total", "current"):
            # one more than are "completed" in a checkpoint that was saved at a step's end
            missing = batches - progress[part]["ready"]
            progress[part] = {name: count + missing for name, count in progress[part].items()}

    def on_train_start(self) -> None:
        """A run that continues takes its optimizer's settings from the options, and from the
        checkpoint only what the optimizer has accumulated."""
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        schedule = config.scheduler
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        schedule.base_lrs = [settings["initial_lr"] for settings in self.settings]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, settings, factor in zip(
            optimizer.param_groups, self.settings, factors, strict=True
        ):
            group.update({**settings, "lr": settings["initial_lr"] * factor})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.objective.before_step(lambda x: self.trainer.strategy.reduce(x, reduce_op="mean"))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val:
            for part in self.objective.parts():
                nn.utils.clip_grad_norm_(part.module.parameters(), gradient_clip_val)

    # The average: TiTok's recipe for its first steps.

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Moves the average after the weights by 1 - min(decay, (1 + n) / (10 + n)), n = steps
        before this one, so that early weights are forgotten; the first step takes them over."""
        step = self.global_step
        super().optimizer_step(*arguments, **options)
        if self.average is not None:
            decay = min(self.options.optim.ema_decay, (1 + step) / (10 + step)) if step else 0.0
            with torch.no_grad():
                torch._foreach_lerp_(tuple(self.average), tuple(self.trained()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the objective's own weights."""
        if self.average is None:
            return
        for mine, theirs in zip(self.average, self.trained(), strict=True):
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)

    # Lightning calls the callbacks' hooks before these: at the end they still see the average.

    def on_validation_epoch_start(self) -> None:
        self.swap()

    def on_validation_epoch_end(self) -> None:
        self.swap()

    def on_train_end(self) -> None:
        self.swap()
        self.finish()  # before Lightning moves the weights to the CPU

    def finish(self) -> None:
        """Finish the objective with the averaged weights in place, once a step."""
        if self.finished != self.global_step:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            assert isinstance(data, DataModule), "fit() trains on one"
            self.objective.finish(data.samples())
            self.finished = self.global_step
