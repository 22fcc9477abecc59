"""What a generator is: conditions -> indices of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok.draws import Rng
from flextok.generators.conditioning import Cond, Condition, Conditioner, class_label
from flextok.hub import Pretrained
from flextok.schema import ConfigError, whole_number, with_options
from flextok.tokenizers.base import Callback

Asked = Cond | str | int | Sequence[int]  # one condition, or one for each image


ELSEWHERE = {  # what other libraries' generate() takes -> what it is called here
    "max_new_tokens": "state num_tokens",
    "max_length": "state num_tokens",
    "do_sample": "temperature=0 takes the likeliest index each time, any other samples",
    "num_return_sequences": "repeat the condition in the list",
}


def as_batch(cond: Asked) -> Any:
    """One condition, a text or a whole number, as a batch of one; a batch as it is."""
    one = isinstance(cond, str) or (not isinstance(cond, Tensor) and whole_number(cond) is not None)
    return [cond] if one else cond


class Generator(Pretrained):
    """Generates the indices of a tokenizer for a batch of conditions."""

    conditioner: Conditioner
    streams: bool  # generates its indices in order: generate takes a prefix to continue from

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def sizes(self) -> tuple[int | None, int, int]:
        return None, self.num_tokens, self.vocab_size

    @property
    def generate_defaults(self) -> Any:
        """The dataclass of options that generate() takes where its caller states none."""
        return self.config.generate

    def generate_options(self, asked: Mapping[str, Any], options: Any = None) -> Any:
        """`options`, the defaults if None, with the single ones that are asked and not None. Raises
        ConfigError for an option that the generator does not have, or not with this value."""
        if theirs := next((key for key in asked if key in ELSEWHERE), None):
            raise ConfigError(f"{self.model_type} has no option {theirs!r}: {ELSEWHERE[theirs]}")
        what = f"{self.model_type} sampling option"
        return with_options(options or self.generate_defaults, asked, what)

    @property
    def class_names(self) -> list[str]:
        """The names of its classes by label, numbers where none are known."""
        known = self.metadata.get("class_names")
        return known or [str(number) for number in range(self.conditioner.num_classes)]

    def prepare(self, cond: Asked) -> Any:
        """cond: as in generate. Returns it as the conditioner's forward takes it. Raises
        ValueError."""
        several = as_batch(cond)
        if self.conditioner.num_classes and not isinstance(several, Tensor):
            names = self.class_names
            several = torch.tensor([class_label(one, names) for one in several])
        return self.conditioner.prepare(several, self.device)

    def condition(self, cond: Cond, drop: Tensor | None = None) -> Condition:
        """cond: what the conditioner takes, (B,) labels or B prompts; drop: (B,) bool, True = null
        condition."""
        return self.conditioner(self.conditioner.prepare(cond, self.device), drop)

    def generate(
        self,
        cond: Asked,
        *,
        num_tokens: int | None = None,
        options: Any = None,
        generator: Rng = None,
        prefix: Tensor | None = None,
        callback: Callback | None = None,
        **asked: Any,
    ) -> Tensor:
        """cond: (B,) labels or a list of class names or labels, -1 or "none" = no class; or a list
        of prompts, "" = none; or one of these. Returns indices (B, num_tokens) long, all by
        default. options: of `generate_options`, or single ones by name. generator: one, or one for
        each row, which makes a row independent of its batch. prefix: (B, p) indices to continue
        from, part of the result, where the generator streams. callback: called after each step
        with the number of steps done and the indices so far. It runs in eval mode."""
        raise NotImplementedError

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """num_tokens, all if None. Raises ValueError outside [1, K]."""
        total = self.num_tokens if num_tokens is None else num_tokens
        if not 1 <= total <= self.num_tokens:
            raise ValueError(f"num_tokens={num_tokens} must be in [1, {self.num_tokens}]")
        return total
