"""What a generator is: conditions -> indices of a tokenizer."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flextok.draws import Rng
from flextok.generators.conditioning import Cond, Conditioner
from flextok.hub import Pretrained
from flextok.schema import with_options


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
        what = f"{self.model_type} sampling option"
        return with_options(options or self.generate_defaults, asked, what)

    def generate(
        self,
        cond: Cond,
        num_tokens: int | None = None,
        *,
        options: Any = None,
        generator: Rng = None,
        prefix: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
        **asked: Any,
    ) -> Tensor:
        """cond: what the conditioner takes, (B,) labels, -1 = none, or B prompts, "" = none.
        Returns indices (B, num_tokens) long, all by default. options: of `generate_options`, or
        single ones by name. generator: one, or one for each row, which makes a row independent of
        its batch. prefix: (B, p) indices to continue from, part of the result, where the generator
        streams. progress is called with the number of steps done."""
        raise NotImplementedError

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """num_tokens, all if None. Raises ValueError outside [1, K]."""
        total = self.num_tokens if num_tokens is None else num_tokens
        if not 1 <= total <= self.num_tokens:
            raise ValueError(f"num_tokens={num_tokens} must be in [1, {self.num_tokens}]")
        return total
