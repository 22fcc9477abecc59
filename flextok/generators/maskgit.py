"""MaskGIT (arXiv 2202.04200) over a tokenizer's indices: predict all masked ones, keep the surest,
repeat. TiTok's generators (2406.07550) are the two backbones: BERT (l32, b64) and U-ViT (s128).

The sequence is [condition, indices, features of the condition if it has any (text)].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.draws import Rng, uniforms
from flextok.generators.base import Asked, Generator
from flextok.generators.conditioning import Cond, Condition, NoConditioner, make_conditioner
from flextok.generators.sampling import MAX_SCALE, check_temperature, pick
from flextok.nn.devices import check_finite
from flextok.nn.frozen import in_eval
from flextok.nn.vit import ViTBlock
from flextok.schema import Bounds, Depth, Many, Share, Size, check_number
from flextok.tokenizers.base import Callback

Decay = Literal["constant", "linear", "power-cosine"]
MAX_STEPS = 1000


@dataclass
class MaskGITOptions:
    """How generate() samples. The published settings (temperature,
    guidance_scale, guidance_decay, num_steps): l32 9.5, 4.5, linear, 8; b64 11.0, 3.0, linear, 8;
    s128 2.8, 6.9, power-cosine, 64."""

    num_steps: int = 8
    temperature: float = 9.5  # of the Gumbel noise, annealed linearly to 0
    anneal_logits: bool = True  # divide logits by 0.5 + 0.8 (1 - r), soft early and sharp late
    guidance_scale: float = 4.5  # see guidance_weight
    guidance_decay: Decay = "linear"
    guidance_pow: float = 3.0  # of power-cosine

    def __post_init__(self) -> None:
        check_number("num_steps", self.num_steps, 1, MAX_STEPS, whole=True)
        check_temperature(self.temperature)
        check_number("guidance_scale", self.guidance_scale, 0, MAX_SCALE)
        check_number("guidance_pow", self.guidance_pow, 0, 100)
        guidance_weight(0.0, 1.0, self.guidance_decay)


@dataclass
class MaskGITConfig:
    """vocab_size and num_tokens come from the tokenizer where train.py builds the model."""

    vocab_size: Many = 4096
    num_tokens: Size = 32
    backbone: Literal["bert", "uvit"] = "bert"
    dim: Size = 768
    depth: Depth = 24  # blocks; odd for uvit, whose halves mirror each other around the middle one
    num_heads: Size = 16
    mlp_ratio: Annotated[float, Bounds(0.01, 64)] = 4.0
    conditioner: dict[str, Any] = field(
        default_factory=lambda: {"name": "class", "num_classes": 1000, "learned_null": True}
    )
    dropout: Share = 0.1
    generate: MaskGITOptions = field(default_factory=MaskGITOptions)


class MaskGIT(Generator):
    """Masked transformer over a tokenizer's indices: predicts all, keeps the surest, repeats."""

    model_type = "maskgit"
    streams = False
    config_class = MaskGITConfig
    resizable = (("positions", "rows"), ("conditioner.embedding.weight", "classes"))
    local_paths = ("conditioner.encoder.model",)
    stated = (
        ("vocab_size", "head.weight", 0),
        ("dim", "embedding.weight", 1),
        ("depth", "blocks.", None),
    )

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        self.config = config = self.checked(config)
        dim, half = config.dim, config.depth // 2
        self.is_uvit = config.backbone == "uvit"
        if self.is_uvit and config.depth % 2 == 0:
            raise ValueError(f"depth={config.depth} must be odd for a U-ViT: halves and a middle")
        self.mask_index = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size + 1, dim)  # codes, the mask
        self.conditioner = make_conditioner(config.conditioner, dim)
        self.positions = nn.Parameter(torch.empty(1 + config.num_tokens, dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            ViTBlock(
                dim,
                config.num_heads,
                config.mlp_ratio,
                eps=1e-5 if self.is_uvit else 1e-12,
                qkv_bias=not self.is_uvit,
                post_norm=not self.is_uvit,
                skip=self.is_uvit and i > half,
                dropout=config.dropout,
            )
            for i in range(config.depth)
        )
        # BERT normalises what enters its blocks, U-ViT what leaves them
        self.norm = nn.LayerNorm(dim, eps=1e-5 if self.is_uvit else 1e-12)
        # BERT's sentence marks: row 0 is added everywhere, row 1 is there for published weights
        self.segments = None if self.is_uvit else nn.Parameter(torch.empty(2, dim))
        self.head = nn.Linear(dim, config.vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear, embeddings and positions: N(0, 0.02), cut at 2; biases: zero; norms: one. An
        encoder of the condition begins as it was made."""
        for name, parameter in self.named_parameters():
            if name.startswith("conditioner.encoder."):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, indices: Tensor, cond: Cond, drop: Tensor | None = None) -> Tensor:
        """indices: (B, k) long, k <= num_tokens, masked ones equal to `mask_index`; cond: what the
        conditioner takes, (B,) labels; drop: (B,) bool, True = null condition. Returns logits
        (B, k, V)."""
        return self.logits(indices, self.condition(cond, drop))

    def logits(self, indices: Tensor, condition: Condition) -> Tensor:
        """indices: as in `forward`. Returns logits (B, k, V)."""
        return self.head(self.features(indices, condition))

    def features(self, indices: Tensor, condition: Condition) -> Tensor:
        """indices: as in `forward`. Returns what enters the head, (B, k, D)."""
        k, mask = indices.shape[1], None
        start = condition.start.to(self.positions.dtype)
        x = torch.cat([start[:, None], self.embedding(indices)], dim=1)
        x = x + self.positions[: 1 + k]  # (B, 1+k, D)
        if condition.context is not None:
            x = torch.cat([x, condition.context.values.to(x.dtype)], dim=1)  # (B, 1+k+L, D)
            mask = F.pad(condition.context.mask, (1 + k, 0), value=True)[:, None, None]
        if self.segments is not None:
            x = self.norm(x + self.segments[0])
        x = self.dropout(x)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.is_uvit and i > self.config.depth // 2:
                x = block(x, mask, skip=skips.pop())
            else:
                x = block(x, mask)
                if i < self.config.depth // 2:
                    skips.append(x)
        if self.is_uvit:
            x = self.norm(x)
        return x[:, 1 : 1 + k]

    @in_eval
    @torch.no_grad()
    def generate(
        self,
        cond: Asked,
        *,
        num_tokens: int | None = None,
        options: MaskGITOptions | None = None,
        generator: Rng = None,
        prefix: Tensor | None = None,
        uniform: Callable[[tuple[int, ...]], Tensor] | None = None,
        callback: Callback | None = None,
        **asked: Any,
    ) -> Tensor:
        """As for every generator; callback(steps, indices) is given (B, N) with `mask_index` where
        there is none yet. A step takes two uniform numbers for each position from the row's
        generator, and all are drawn before the first step. uniform: a source of draws in [0, 1) by
        shape in its place, as the published sampler takes them: a step draws (B, N, V) for the
        Gumbel noise of the indices, then (B, N) for the confidence. Raises ValueError for options
        out of range, and NotFinite where the logits are not."""
        if prefix is not None:
            raise ValueError("a MaskGIT continues no prefix: its indices come in no order")
        chosen = self.generate_options(asked, options)
        steps, total = chosen.num_steps, self.check_num_tokens(num_tokens)
        device = self.device
        cond = self.prepare(cond)
        condition = self.conditioner(cond)
        both = None
        if not isinstance(self.conditioner, NoConditioner):
            both = condition.join(self.conditioner(self.conditioner.null_like(cond)))
        batch = len(condition.start)
        indices = torch.full((batch, total), self.mask_index, device=device)
        if uniform is None:
            draws = uniforms((batch, steps, 2, total), generator, device)
        largest: list[Tensor] = []  # logit of each step; checked at the end, once
        for step, masked_left in enumerate(mask_schedule(total, steps)):
            rest = 1 - (step + 1) / steps  # 1 - r
            weight = guidance_weight(
                step / steps, chosen.guidance_scale, chosen.guidance_decay, chosen.guidance_pow
            )
            logits = self.guided_logits(indices, condition, both, weight)
            if chosen.anneal_logits:
                logits = logits / (0.5 + 0.8 * rest)
            largest.append(logits.abs().amax())
            noise = rest * chosen.temperature
            if uniform is None:  # the highest of logits + noise * Gumbel follows softmax(. / noise)
                u = draws[:, step, 0].flatten()
                drawn = pick(logits.flatten(0, 1), u, noise).view(batch, total)
                u_confidence = draws[:, step, 1].float()
            else:
                drawn = (logits + noise * gumbel(uniform(tuple(logits.shape)))).argmax(dim=-1)
                u_confidence = uniform(tuple(drawn.shape))
            confidence = logits.gather(-1, drawn[..., None])[..., 0]
            confidence = confidence + noise * gumbel(u_confidence)
            masked = indices == self.mask_index
            indices = torch.where(masked, drawn, indices)
            least = confidence.masked_fill(~masked, torch.inf).argsort(dim=-1)[:, :masked_left]
            indices = indices.scatter(-1, least, self.mask_index)
            if callback is not None:
                callback(step + 1, indices)
        check_finite(torch.stack(largest), "the generator's logits")
        return indices

    def guided_logits(
        self, indices: Tensor, condition: Condition, both: Condition | None, weight: float
    ) -> Tensor:
        """indices: (B, k) with masks; both: the condition and the null one, joined. Returns
        c + weight (c - u) in fp32, (B, k, V); the two run in one batch, and the conditional one
        alone at weight 0 or where there is no other."""
        if weight == 0 or both is None:
            return self.logits(indices, condition).float()
        c, u = self.logits(indices.repeat(2, 1), both).float().chunk(2)
        return c + weight * (c - u)


def mask_schedule(num_tokens: int, num_steps: int) -> list[int]:
    """How many positions stay masked after each step: floor(N arccos(r) / (pi/2)), r = (s+1)/S; at
    least one fewer than before while more than one is left, never none before the last step."""
    schedule, masked = [], num_tokens
    for step in range(1, num_steps):
        target = math.floor(num_tokens * math.acos(step / num_steps) / (math.pi / 2))
        masked = max(1, min(masked - 1, target))
        schedule.append(masked)
    return [*schedule, 0]


def guidance_weight(progress: float, scale: float, decay: Decay, power: float = 3.0) -> float:
    """The weight w of c + w (c - u) at `progress` = step / steps in [0, 1).

    constant: w = scale. linear: grows from 0 to it. Both have no guidance at 0. power-cosine (MDT,
    2303.14389): u + s (c - u), s growing from 1 to scale, so it has none at 1, and w = s - 1."""
    if decay == "constant":
        return scale
    if decay == "linear":
        return scale * progress
    if decay == "power-cosine":
        return (scale - 1) * (1 - math.cos(math.pi * progress**power)) / 2
    raise ValueError(f"guidance_decay={decay!r} must be constant, linear or power-cosine")


def gumbel(u: Tensor) -> Tensor:
    """u: uniform in [0, 1). Returns standard Gumbel noise of the same shape."""
    return -torch.log((-torch.log(u.clamp(min=1e-20))).clamp(min=1e-20))
