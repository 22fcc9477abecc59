"""A text encoder over words that is trained along with the generator and needs no vocabulary."""

import re
import zlib
from collections.abc import Sequence

from torch import Tensor

from flextok.generators.text import Text, TrainedEncoder, check_prompts
from flextok.schema import Depth, Many, Share, Size

PIECES = 16  # of a word at most; of longer ones only the beginning, and the word as a whole
WORD = re.compile(r"\w+|[^\w\s]")


class WordEncoder(TrainedEncoder):
    """Words, each as itself and its character trigrams (fastText, arXiv 1607.04606, section 3.2),
    hashed into a table of embeddings, through a small T5 encoder. A sentence is a few tokens long,
    and "hearts" means much the same as "heart" though training may have shown one of them only."""

    def __init__(
        self,
        dim: Size = 128,
        depth: Depth = 2,
        num_heads: Size = 4,
        hidden_dim: Size | None = None,  # of the MLPs, 2 dim
        max_length: Size = 128,
        buckets: Many = 4096,
        dropout: Share = 0.0,
    ):
        if buckets < 1:
            raise ValueError(f"buckets={buckets} must be at least 1")
        vocab_size = 1 + buckets  # 0 is no piece
        super().__init__(vocab_size, dim, depth, num_heads, hidden_dim, max_length, dropout)
        self.buckets = buckets

    def identity(self) -> dict[str, int | str]:
        return {"encoder": "words", "max_length": self.max_length, "buckets": self.buckets}

    def indices(self, prompts: Sequence[str]) -> list[list[list[int]]]:
        """Prompts -> words -> PIECES indices into the table, 0 where there are fewer. The last
        word is an end mark."""
        check_prompts(prompts)
        words = [WORD.findall(prompt.casefold()) for prompt in prompts]
        self.warn_of_cuts(prompts, [len(some) + 1 for some in words], self.max_length)
        words = [[*some[: self.max_length - 1], "</s>"] for some in words]
        return [[self.pieces(word) for word in some] for some in words]

    def pieces(self, word: str) -> list[int]:
        marked = f"<{word}>"
        trigrams = [marked[i : i + 3] for i in range(len(marked) - 2)]
        pieces = list(dict.fromkeys([marked, *trigrams]))[:PIECES]
        indices = [1 + zlib.crc32(piece.encode()) % self.buckets for piece in pieces]
        return indices + [0] * (PIECES - len(indices))

    def forward(self, text: Text) -> Tensor:
        """text.values: (B, L, PIECES) long. Returns (B, L, E)."""
        real = text.values > 0
        embedded = (self.stack.embed_tokens(text.values) * real[..., None]).sum(2)
        embedded = embedded / real.sum(2, keepdim=True).clamp_min(1).sqrt()  # of unit variance
        options = {"attention_mask": text.mask.long(), "inputs_embeds": embedded}
        return self.stack(**options).last_hidden_state
