"""What may change when a run continues: each difference to its config.yaml is applied and told, or
refused by name before anything is written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flextok.config import ExperimentConfig, load_experiment
from flextok.schema import ConfigError, to_mapping

# The weights, their class names and the optimizer's state belong to these.
FIXED = {
    "another model": ("task", "model", "tokenizer", "start", "adversarial"),
    "other data": (
        *("data.train", "data.validation", "data.crop", "data.flip", "data.shift"),
        "data.token_variants",
    ),
    "another optimizer": ("optim.name",),
}
# but these may change on the way
FREE = tuple(f"adversarial.{key}" for key in ("weight", "start", "lecam", "lecam_decay", "lr"))
# These change no weight, so that a finished run needs no other words about them.
IDLE = (
    *("output_dir", "resume", "evaluation", "data.num_workers", "data.token_cache"),
    *(
        f"trainer.{key}"
        for key in (
            *("max_steps", "accelerator", "devices", "num_nodes", "log_every", "validate_every"),
            *("checkpoint_every", "keep_last", "max_nonfinite", "num_pictures", "compile"),
        )
    ),
)
Differences = dict[str, tuple[Any, Any]]  # dotted key -> what config.yaml has, what is asked for


def differences(there: Any, now: Any, key: str = "") -> Differences:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        found: Differences = {}
        for name in {**there, **now}:
            found |= differences(there.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        return found
    return {} if there == now or same_file(there, now) else {key: (there, now)}


def same_file(there: Any, now: Any) -> bool:
    """Whether two texts name one file or folder, such as a relative and an absolute path."""
    both = isinstance(there, str) and isinstance(now, str)
    return both and os.path.exists(there) and os.path.exists(now) and os.path.samefile(there, now)


def within(key: str, parts: tuple[str, ...]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def told(changes: Differences) -> str:
    return "; ".join(f"{k}={there!r} there, {now!r} now" for k, (there, now) in changes.items())


def check_changes(path: Path, config: ExperimentConfig, step: int) -> Differences:
    """What differs from the config.yaml at `path`, of a run that has come to `step`, and applies
    from now on. Raises ConfigError naming what cannot."""
    if not path.exists():
        return {}
    try:
        before = load_experiment(path)
    except ConfigError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} cannot be read ({reason}): write the run's config there again, or pass "
            "resume=false to start over"
        ) from None
    changes = differences(to_mapping(before), to_mapping(config))
    over = "choose another output_dir, or pass resume=false to start over there"
    for what, parts in FIXED.items():
        if fixed := {k: v for k, v in changes.items() if within(k, parts) and not within(k, FREE)}:
            moved = f" Data that only moved: correct {path}." if what == "other data" else ""
            raise ConfigError(
                f"{path.parent} holds a run of {what} ({told(fixed)}): {over}.{moved}"
            )
    averages = [c.optim.ema_decay > 0 for c in (before, config)]
    shards = [c.trainer.strategy == "fsdp2" for c in (before, config)]
    for name, (there, now) in {"optim.ema_decay": averages, "trainer.strategy": shards}.items():
        if there != now:
            raise ConfigError(
                f"{path.parent}: its checkpoints do not fit {told({name: changes[name]})}: {over}"
            )
    effective = {key: change for key, change in changes.items() if not within(key, IDLE)}
    if step >= config.trainer.max_steps and effective:
        raise ConfigError(
            f"{path.parent} is trained to its end, step {step}, and {told(effective)} would change "
            f"nothing: raise trainer.max_steps to train on, {over}"
        )
    return {k: v for k, v in changes.items() if k in effective or k == "trainer.max_steps"}
