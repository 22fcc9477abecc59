"""What one sample of a training step costs: operations, and bytes kept for the backward pass.

Formulas over an objective's transformer blocks, which tests hold against steps that were counted. A
matrix of P numbers takes 2 P operations a position forward and 4 P backward; attention 4 D a pair
of positions forward and 10 D backward, since the fused kernel computes its scores again. Networks
of convolutions have no such formula: torch counts a forward pass of theirs on the meta device.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from flextok.generators.base import Generator
from flextok.generators.conditioning import TextConditioner
from flextok.nn.blocks import AdaLNBlock, Block
from flextok.objectives import (
    AdversarialObjective,
    CrossLengthObjective,
    DistillationObjective,
    Objective,
    ReconstructionObjective,
)
from flextok.tokenizers import FlexTok, TiTok


class Cost(NamedTuple):
    flops: float
    saved: float = 0.0  # bytes


class Span(NamedTuple):
    """What attention of a block sees and computes."""

    seen: int  # positions that enter
    rows: int  # those that are computed
    pairs: float  # of a row and what it attends to
    context: int = 0  # length of what cross-attention sees


@dataclass
class Formulas:
    half: bool  # activations in 2 bytes, but for the norms that compute in fp32
    recompute: bool  # of a block keep the input only
    recomputed: float = 0.0  # bytes of the largest block that is at work in the backward pass

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.half else 4

    def step(self, objective: Objective) -> Cost:
        costs = list(self.parts(objective))
        flops = sum(cost.flops for cost in costs)
        return Cost(flops, sum(cost.saved for cost in costs) + self.recomputed)

    def parts(self, objective: Any) -> Iterator[Cost]:
        model = objective.model
        if isinstance(model, Generator):
            yield from self.generator(model)
            return
        size, dtype = model.image_size, next(model.parameters()).dtype
        images = torch.empty(1, 3, size, size, dtype=dtype, device="meta")
        if isinstance(model, FlexTok):
            yield from self.flextok(objective, model, images)
            return
        if isinstance(model, TiTok):
            yield from self.titok(model, images)
        else:
            yield self.run(lambda: model.decode_codes(model.features(images)), 3)
        made = images.clone().requires_grad_()
        if isinstance(objective, ReconstructionObjective):
            yield Cost(0, 16 * images.numel())  # what was made, in fp32 and in [0, 1]
            for held in objective.perceptual.networks.values():
                yield self.run(functools.partial(held.network, made, images), 2)
        if isinstance(objective, AdversarialObjective):  # the images, and what was made of them
            yield self.run(lambda: objective.discriminator(torch.cat([images, images])), 3)
            yield self.run(lambda: objective.judge(made), 2)

    def generator(self, model: Any) -> Iterator[Cost]:
        """GPT and MaskGIT, whose loss reads logits in fp32."""
        length, vocab = model.num_tokens, model.config.vocab_size
        text = model.conditioner.encoder if isinstance(model.conditioner, TextConditioner) else None
        context = 0 if text is None else text.max_length
        if model.streams:
            span = Span(length, length, length**2 / 2, context)
        else:  # the condition is a position, and so is each of its features
            n = 1 + length + context
            span = Span(n, n, n**2)
        yield self.stack(model.blocks, span)
        yield Cost(6 * length * model.head.weight.numel(), 4 * length * vocab)
        if text is not None:
            yield Cost(6 * context * matrices(model.conditioner, but="embed"))

    def flextok(self, objective: Any, model: FlexTok, images: Tensor) -> Iterator[Cost]:
        encoder, decoder = model.encoder, model.decoder
        patches, registers = decoder.grid**2, model.num_tokens
        both = patches + registers
        yield self.run(lambda: model.vae.encode(images, sample=False), 1)
        span = Span(both, both, patches**2 + registers * both)
        last = Span(both, registers, registers * both)
        if encoder.registers is None:
            span = last = Span(patches, patches, patches**2)
        yield self.stack(encoder.blocks, span, last)
        span, last = Span(both, both, both**2), Span(both, patches, patches * both)
        yield self.edges(encoder, patches)
        yield self.edges(decoder, patches)
        yield self.stack(decoder.blocks, span, last)
        if isinstance(objective, CrossLengthObjective):
            yield self.stack(decoder.blocks, span, last)
        if isinstance(objective, DistillationObjective):
            options, decode = objective.config, objective.teacher.network.config.decode
            full, null = (
                self.stack(decoder.blocks, Span(n, n, n**2), trained=False).flops
                for n in (both, patches + 1)  # one token stands for the null condition
            )
            guided = full + null if decode.guidance_scale != 1 else full
            yield Cost((options.num_steps - 1) / 2 * full + options.teacher_steps * guided)
        elif objective.alignment is not None:
            alignment, side = objective.alignment, decoder.grid
            yield self.run(lambda: alignment.backbone.network(images, side), 1)
            shape = (decoder.head.in_features, side, side) if alignment.spatial else (patches, -1)
            features = images.new_empty(patches * decoder.head.in_features).view(1, *shape)
            yield self.run(lambda: alignment.projector(features), 3)

    def titok(self, model: TiTok, images: Tensor) -> Iterator[Cost]:
        patches = model.grid**2
        n = 1 + patches + model.num_tokens
        span = Span(n, n, n**2)
        for part in (model.encoder, model.decoder):
            yield self.stack(part.blocks, span)
            yield self.edges(part, patches)
        yield Cost(6 * patches * matrices(model.decoder.head))
        if model.config.stage == "proxy":
            yield self.run(lambda: model.proxy.features(images), 1)
        if model.config.stage == "finetune":
            decoder: Any = model.pixel_decoder
            codes = images.new_empty(1, decoder.conv_in.in_channels, model.grid, model.grid)
            yield self.run(lambda: decoder(codes), 3)

    def edges(self, network: nn.Module, length: int) -> Cost:
        """The layers before and after the blocks."""
        layers = [layer for layer in network.children() if isinstance(layer, nn.Linear)]
        numbers = sum(layer.weight.numel() for layer in layers)
        return Cost(6 * length * numbers, 4 * self.width * length * layers[-1].in_features)

    def stack(
        self, blocks: Any, span: Span, last: Span | None = None, trained: bool = True
    ) -> Cost:
        """A network's blocks; last: of the last one, where that differs."""
        spans = [span] * (len(blocks) - 1) + [last or span]
        trains = trained and any(p.requires_grad for p in blocks.parameters())
        costs = [self.block(*pair, trains) for pair in zip(blocks, spans, strict=True)]
        flops, saved = (sum(numbers) for numbers in zip(*costs, strict=True))
        if trains and self.recompute:
            self.recomputed = max(self.recomputed, *(cost.saved for cost in costs))
            saved = len(blocks) * span.seen * self.width * blocks[0].attn.proj.in_features
        return Cost(flops, saved)

    def block(self, block: Any, span: Span, trained: bool) -> Cost:
        dim = block.attn.proj.in_features
        once = matrices(block, only="modulation")
        inward = 2 * dim**2  # keys and values, of all that is seen
        cross = inward if span.context else 0
        each = matrices(block) - once - inward - cross
        products = span.rows * each + span.seen * inward + span.context * cross + once
        forward = 2 * products, 4 * dim * (span.pairs + span.rows * span.context)
        if not trained:
            return Cost(sum(forward))
        flops = 3 * forward[0] + 3.5 * forward[1]
        if self.recompute:
            flops += sum(forward)
            if not isinstance(block, AdaLNBlock):  # whose gates need the last product
                mlp = block.mlp if isinstance(block, Block) else block
                flops -= 2 * span.rows * mlp.fc2.weight.numel()
        return Cost(flops, dim * self.kept(block, dim, span))

    def kept(self, block: Any, dim: int, span: Span) -> float:
        """Bytes that a block keeps, over its width: inputs of products, of attention and of the
        activation, and of norms."""
        seen, rows, w = span.seen, span.rows, self.width
        if not isinstance(block, Block | AdaLNBlock):  # a ViTBlock: x, h, k, v; q, y, x, h, MLP
            joined = 2 * rows if block.skip is not None else 0
            return w * (4 * seen + 4 * rows + joined + 2 * rows * block.fc1.out_features / dim)
        numbers = 3 * seen + 4 * rows + 4 * rows * block.mlp.fc1.out_features / dim
        islands = seen + rows  # inputs of the norms, in fp32
        if block.attn.qk_norm:
            islands += seen + rows
        if isinstance(block, AdaLNBlock):  # what is shifted, scaled and gated
            numbers += seen + 3 * rows
        elif span.context:
            numbers += 4 * rows + 2 * span.context
            islands += rows
        return w * numbers + 4 * islands

    def run(self, run: Callable[[], Any], passes: float) -> Cost:
        """A forward pass on the meta device, `passes` times: 1 for a frozen network, 2 where
        gradients go through one, 3 where it is trained."""
        kept: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            if not isinstance(x, nn.Parameter):
                kept[x.untyped_storage()._cdata] = x
            return x

        with (
            FlopCounterMode(display=False) as counter,
            saved_tensors_hooks(keep, lambda x: x),
            torch.set_grad_enabled(passes > 1),
        ):
            run()
        saved = sum(x.untyped_storage().nbytes() for x in kept.values())
        return Cost(passes * counter.get_total_flops(), saved)


def matrices(network: nn.Module, only: str = "", but: str = "?") -> int:
    """Numbers in the matrices of a network, of those whose names hold `only` and not `but`."""
    named = network.named_parameters()
    return sum(p.numel() for name, p in named if p.ndim == 2 and only in name and but not in name)
