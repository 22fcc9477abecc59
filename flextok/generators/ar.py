"""GPT-style autoregressive generator over ordered indices, coarse to fine (FlexTok, section 3.3).

A start token carries the class; a text is read by cross-attention in every block. Learned absolute
positions; pre-norm blocks with SwiGLU. Position j reads the start token and indices < j and
predicts index j.

With `groups`, one step predicts all indices of a group, independently of one another given those of
the groups before it (DetailFlow, arXiv 2505.21473; ResTok, 2601.03955, whose groups grow). In a
group of n, each position reads the index n places before its own, and attends to all positions of
its group and of those before it. Groups of one index are the model without groups.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flextok.draws import Rng, uniform_steps
from flextok.generators.base import Asked, Generator
from flextok.generators.conditioning import Cond, Condition, NoConditioner, make_conditioner
from flextok.generators.sampling import MAX_SCALE, check_temperature, pick
from flextok.nn.attention import KVCache
from flextok.nn.blocks import Block, LayerNorm
from flextok.nn.devices import check_finite, to_device
from flextok.nn.frozen import in_eval
from flextok.schema import ConfigError, Depth, Many, Share, Size, check_number
from flextok.tokenizers.base import Callback, check_indices

MAX_TOP_K = 2**31 - 1


@dataclass
class GenerateOptions:
    """How generate() samples."""

    temperature: float = 1.0
    top_k: int = 0  # 0 = all
    top_p: float = 0.0  # 0 = all
    guidance_scale: float = 1.5  # the published text models: 3.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_number("top_k", self.top_k, 0, MAX_TOP_K, whole=True, hint=" (0 keeps all)")
        check_number("top_p", self.top_p, 0, 1, hint=" (0 and 1 keep all)")
        check_number("guidance_scale", self.guidance_scale, 0, MAX_SCALE, hint=" (1 = none)")


@dataclass
class GPTConfig:
    """vocab_size and num_tokens come from the tokenizer where train.py builds the model."""

    vocab_size: Many = 64_000
    num_tokens: Size = 256
    depth: Depth = 12
    dim: Size | None = None  # 64 * depth
    num_heads: Size | None = None  # depth
    conditioner: dict[str, Any] = field(
        default_factory=lambda: {"name": "class", "num_classes": 1000}
    )
    dropout: Share = 0.0  # on the input embeddings
    # how many indices each step predicts, such as [1, 1, 2, 4, 8, 16] for num_tokens=32: in all
    # num_tokens, and no step fewer than the step before it; None = one index a step
    groups: list[Size] | None = None
    generate: GenerateOptions = field(default_factory=GenerateOptions)

    def __post_init__(self) -> None:
        if self.groups is not None:
            check_groups(self.groups, self.num_tokens)


class GPT(Generator):
    """Decoder-only transformer over a tokenizer's indices, conditioned on a class, a text or
    nothing."""

    model_type = "gpt"
    streams = True
    config_class = GPTConfig
    resizable = (("positions", "rows"), ("conditioner.embedding.weight", "classes"))
    local_paths = ("conditioner.encoder.model",)
    stated = (
        ("vocab_size", "embedding.weight", 0),
        ("num_tokens", "positions", 0),
        ("dim", "embedding.weight", 1),
        ("depth", "blocks.", None),
    )

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config = self.checked(config)
        sizes = [1] * config.num_tokens if config.groups is None else config.groups
        self.grouped = sizes[-1] > 1
        # of each index: the size of its group, and the number of indices up to the group's end
        self.group_sizes = [size for size in sizes for _ in range(size)]
        ends = zip(sizes, itertools.accumulate(sizes), strict=True)
        self.group_ends = [end for size, end in ends for _ in range(size)]
        dim = config.dim or 64 * config.depth
        self.conditioner = make_conditioner(config.conditioner, dim)
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.start = nn.Parameter(torch.empty(dim))
        self.positions = nn.Parameter(torch.empty(config.num_tokens, dim))
        self.dropout = nn.Dropout(config.dropout)
        num_heads = config.num_heads or config.depth
        cross_attention = self.conditioner.cross_attention
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, eps=1e-6, affine=True, cross_attention=cross_attention)
            for _ in range(config.depth)
        )
        self.norm = LayerNorm(dim, eps=1e-6, affine=True)
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        # (layers, rows, steps) -> layers for generating index by index, set by flextok.cpu
        self.lay_out: Callable[[nn.Module, int, int], nn.Module] | None = None
        self.init_weights()

    def init_weights(self) -> None:
        """Linear and embeddings: N(0, 0.02); projections back into the residual stream: smaller by
        sqrt(2 depth) (GPT-2); norms: one; biases: zero. A text encoder begins as it was made."""
        residual_std = 0.02 / (2 * self.config.depth) ** 0.5
        for name, parameter in self.named_parameters():
            if name.startswith("conditioner.encoder."):
                continue
            if "norm" in name:
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("proj.weight", "fc2.weight")):
                nn.init.normal_(parameter, std=residual_std)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, indices: Tensor, cond: Cond, drop: Tensor | None = None) -> Tensor:
        """indices: (B, k) long, 0 <= k < num_tokens; cond: what the conditioner takes, (B,) labels
        or B prompts; drop: (B,) bool, True = null condition. Returns logits (B, k+1, V) of indices
        0..k."""
        return self.head(self.features(indices, self.condition(cond, drop)))

    def features(self, indices: Tensor, condition: Condition) -> Tensor:
        """indices: as in `forward`. Returns what enters the head, (B, k+1, D)."""
        x = self.join_start(indices, condition)
        groups, mask = self.group_mask(0, x.shape[1]), context_mask(condition)
        # values and no keys: sharded, a block has its weights in its own forward alone
        context = None if condition.context is None else condition.context.values
        for block in self.blocks:
            x = block(x, groups, is_causal=True, context=context, context_mask=mask)
        return self.norm(x[:, : indices.shape[1] + 1])

    def contexts(self, condition: Condition) -> list[tuple[Tensor, Tensor] | None]:
        """Keys and values of the context for each block's cross-attention, to be computed once for
        all steps of generating; None without a context."""
        if condition.context is None:
            return [None] * len(self.blocks)
        blocks: Any = self.blocks
        return [block.cross_attn.keys_values(condition.context.values) for block in blocks]

    def join_start(self, indices: Tensor, condition: Condition, first: int = 0) -> Tensor:
        """indices: (B, k) long. Returns the input embeddings (B, n, D) of the positions from
        `first` to the end of index k's group, the n = k + 1 - first next ones without groups: each
        is that of the index which the position reads, or where there is none of the start token
        with its condition, and its position."""
        end = self.group_ends[indices.shape[1]]
        reads = [max(-1, j - self.group_sizes[j]) for j in range(first, end)]  # -1: the start token
        low = min(reads)
        x = self.embedding(indices[:, max(0, low) :])
        if low < 0:
            start = self.start + condition.start.to(self.start.dtype)
            x = torch.cat([start[:, None], x], dim=1)
        if self.grouped:
            x = x[:, [j - low for j in reads]]
        return self.dropout(x + self.positions[first:end])

    def group_mask(self, first: int, end: int) -> Tensor | None:
        """Which positions those from `first` to `end` attend to, (end - first, end) bool: all of
        their own group and of those before it. None without groups: it is causal."""
        if not self.grouped:
            return None
        device = self.positions.device
        ends = torch.tensor(self.group_ends[first:end], device=device)
        return torch.arange(end, device=device) < ends[:, None]

    @in_eval
    @torch.no_grad()
    def generate(
        self,
        cond: Asked,
        *,
        num_tokens: int | None = None,
        options: GenerateOptions | None = None,
        generator: Rng = None,
        prefix: Tensor | None = None,
        callback: Callback | None = None,
        caches: list[KVCache] | None = None,
        **asked: Any,
    ) -> Tensor:
        """As for every generator; callback(k, indices) is given the first k, (B, k). Guidance is
        u + scale (c - u) on logits, both branches in one batch. Each index of a row takes one
        uniform number from its generator, and all are drawn before the first. caches: of
        `new_caches` or `take_caches`; what they hold of the prefix is not computed again, and
        afterwards they hold as many positions as there are indices. The prefix and num_tokens may
        end inside a group, whose other indices do not depend on where. Raises ValueError for
        options out of range, and NotFinite where the logits are not."""
        chosen = self.generate_options(asked, options)
        steps = self.stream(
            cond,
            num_tokens=num_tokens,
            options=chosen,
            generator=generator,
            prefix=prefix,
            caches=caches,
        )
        for indices in steps:
            if callback is not None:
                callback(indices.shape[1], indices)
        return indices

    @torch.no_grad()
    def stream(
        self,
        cond: Asked,
        *,
        num_tokens: int | None = None,
        options: GenerateOptions | None = None,
        generator: Rng = None,
        prefix: Tensor | None = None,
        caches: list[KVCache] | None = None,
        **asked: Any,
    ) -> Iterator[Tensor]:
        """As generate, but in the mode that the model is in, and yields the first indices (B, k) as
        soon as they are there: k = p + 1, ..., num_tokens, or only the prefix itself where it has
        all. With groups, k grows by a group in each step."""
        chosen = self.generate_options(asked, options)
        scale = chosen.guidance_scale
        total = self.check_num_tokens(num_tokens)

        device = self.device
        rows = self.prepare(cond)
        batch = len(rows)
        if prefix is None:
            prefix = torch.empty(batch, 0, dtype=torch.long)
        elif prefix.ndim != 2 or len(prefix) != batch or prefix.shape[1] > total:
            raise ValueError(
                f"prefix has shape {tuple(prefix.shape)}, expected ({batch}, p) with p <= {total}"
            )
        elif prefix.shape[1]:
            check_indices(prefix, total, self.vocab_size)
        indices = torch.empty(batch, total, dtype=torch.long, device=device)
        done = prefix.shape[1]
        indices[:, :done] = to_device(prefix, device)
        if done == total:
            yield indices
            return
        guided = self.is_guided(chosen)
        condition = self.conditioner(rows)
        if guided:
            condition = condition.join(self.conditioner(self.conditioner.null_like(rows)))
        repeat = 2 if guided else 1
        if caches is None:
            caches = self.new_caches(batch, total, guided)
        contexts, mask = self.contexts(condition), context_mask(condition)
        blocks: Any = self.blocks
        head: Any = self.head
        if self.lay_out is not None:
            most = repeat * batch * max(self.group_sizes[done:total])
            steps = len(set(self.group_ends[done:total]))
            blocks, head = (self.lay_out(x, most, steps) for x in (blocks, head))
        draws = uniform_steps(total - done, batch, generator, device).T  # (B, total - p)
        drawn = done
        largest: list[Tensor] = []  # logit of each step; checked at the end, once
        while True:
            first, end = caches[0].length, self.group_ends[done]
            stop = min(end, total)
            x = self.join_start(indices[:, :done].repeat(repeat, 1), condition, first)
            groups = self.group_mask(first, end)
            for block, cache, context in zip(blocks, caches, contexts, strict=True):
                x = block(x, groups, True, cache=cache, context=context, context_mask=mask)
                cache.length = stop  # the rest of a group that is cut comes again with its indices
            logits = head(self.norm(x[:, done - first : stop - first]).flatten(0, 1))
            if guided:
                c, u = logits.chunk(2)
                logits = u + scale * (c - u)
            some = draws[:, done - drawn : stop - drawn].flatten()
            new = pick(logits, some, chosen.temperature, chosen.top_k, chosen.top_p)
            largest.append(logits.abs().amax())
            indices[:, done:stop] = new.view(batch, -1)
            done = stop
            yield indices[:, :done]
            if done == total:
                check_finite(torch.stack(largest), "the generator's logits")
                return

    def is_guided(self, options: GenerateOptions) -> bool:
        """Whether each row needs one of the null condition, which an unconditional model has none
        of beside its own."""
        return options.guidance_scale != 1 and not isinstance(self.conditioner, NoConditioner)

    def new_caches(self, batch: int, length: int, guided: bool = False) -> list[KVCache]:
        """Empty caches, one for each block, for so many rows and indices; guided: with as many rows
        of the null condition behind them."""
        dim = self.positions.shape[1]
        heads = self.config.num_heads or self.config.depth
        rows, length = 2 * batch if guided else batch, self.group_ends[length - 1]
        return [KVCache(rows, heads, length, dim // heads, like=self.start) for _ in self.blocks]

    def take_caches(
        self, caches: list[KVCache], batch: int, rows: Tensor, prefix: int, length: int
    ) -> list[KVCache]:
        """Caches of generate() for a batch, as they are for another one whose row j has the first
        `prefix` indices of row rows[j], (n,) long, and grows to `length` indices."""
        rows = torch.cat([rows + first for first in range(0, len(caches[0].k), batch)])
        return [cache.take(rows, prefix, self.group_ends[length - 1]) for cache in caches]


def check_groups(sizes: list[int], num_tokens: int) -> None:
    """Raises ConfigError unless the sizes never fall and are num_tokens in all."""
    if sum(sizes) != num_tokens:
        raise ConfigError(
            f"groups={sizes} hold {sum(sizes)} indices in all, but num_tokens={num_tokens}: change "
            "the sizes so that their sum is num_tokens"
        )
    if falls := [(a, b) for a, b in itertools.pairwise(sizes) if b < a]:
        a, b = falls[0]
        raise ConfigError(
            f"groups={sizes}: a group of {b} cannot read all indices of one of {a} before it: "
            "order the sizes so that none is smaller than the one before it"
        )


def context_mask(condition: Condition) -> Tensor | None:
    """(B, 1, 1, L) bool for cross-attention, or None without a context."""
    return None if condition.context is None else condition.context.mask[:, None, None, :]
