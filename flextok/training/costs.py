"""What one sample of a training step costs: operations, and bytes kept for the backward pass.

Formulas over an objective's transformer blocks, which tests compare with steps that were counted. A
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

from flextok.autoencoder import Autoencoder
from flextok.generators.base import Generator
from flextok.generators.conditioning import TextConditioner
from flextok.nn.blocks import AdaLNBlock, Block
from flextok.nn.vit import ViTBlock
from flextok.objectives import (
    AutoencoderObjective,
    CrossLengthObjective,
    DistillationObjective,
    DrawingDistillationObjective,
    DrawingObjective,
    Objective,
    ReconstructionObjective,
)
from flextok.objectives.adversarial import Adversarial
from flextok.tokenizers import FlexTok, TiTok
from flextok.tokenizers.drawer import DrawerBlock


class Cost(NamedTuple):
    flops: float
    saved: float = 0.0  # bytes


# what a block keeps of each position for the backward pass, in multiples of its width: inputs of
# products, of attention, of the activation and of gates; and inputs of norms, in fp32
KEPT: dict[type[nn.Module], tuple[float, int]] = {
    Block: (7 + 4 * 8 / 3, 2),
    AdaLNBlock: (11 + 4 * 8 / 3, 2),
    DrawerBlock: (11 + 4 * 8 / 3, 2),
    ViTBlock: (16, 0),
}


@dataclass
class Formulas:
    half: bool  # activations in 2 bytes, but for the norms that compute in fp32
    recompute: bool  # of a block keep the input only
    cached: bool = False  # the frozen first part is not run
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
        images = an_image(model)
        if isinstance(model, FlexTok):
            yield from self.flextok(objective, model, images)
            return
        if isinstance(model, Autoencoder):
            trains = any(p.requires_grad for p in model.encoder.parameters())
            yield self.run(lambda: model.posterior(images), 3 if trains else 1)
            latents = model.posterior(images)[0].detach().to(images.dtype)
            yield self.run(lambda: model.decode(latents), 3)
        elif isinstance(model, TiTok):
            yield from self.titok(model, images)
        else:
            yield self.run(lambda: model.decode_codes(model.features(images)), 3)
        made = images.clone().requires_grad_()
        if isinstance(objective, ReconstructionObjective | AutoencoderObjective):
            yield Cost(0, 16 * images.numel())  # what was made, in fp32 and in [0, 1]
            for held in objective.perceptual.networks.values():
                yield self.run(functools.partial(held.network, made, images), 2)
        if isinstance(objective, Adversarial) and objective.has_discriminator:
            # of the images, and of what was made of them
            yield self.run(lambda: objective.discriminator(torch.cat([images, images])), 3)
            yield self.run(lambda: objective.judge(made), 2)

    def generator(self, model: Any) -> Iterator[Cost]:
        """GPT and MaskGIT, whose loss reads logits in fp32."""
        length, vocab = model.num_tokens, model.config.vocab_size
        text = model.conditioner.encoder if isinstance(model.conditioner, TextConditioner) else None
        context = 0 if text is None else text.max_length
        if model.streams:
            yield self.stack(model.blocks, length, length**2 / 2, context)
        else:  # the condition is a position, and so is each of its features
            n = 1 + length + context
            yield self.stack(model.blocks, n, n**2)
        yield Cost(6 * length * model.head.weight.numel(), 4 * length * vocab)
        if text is not None:
            yield Cost(6 * context * matrices(model.conditioner, but="embed"))

    def flextok(self, objective: Any, model: FlexTok, images: Tensor) -> Iterator[Cost]:
        if not self.cached:
            yield from self.front(objective, images)
        if isinstance(objective, DrawingObjective):
            drawer, n = objective.drawer, objective.drawer.grid**2
            around = self.edges(drawer, n)
            yield from (self.stack(drawer.blocks, n, n**2), around)
            if isinstance(objective, DrawingDistillationObjective):
                velocity = self.stack(drawer.blocks, n, n**2, trained=False).flops
                velocity += around.flops / 3
                yield self.walking(objective, velocity, velocity)
            return
        times = getattr(objective.config, "draws_per_image", 1)
        for cost in self.flow(objective, model, images):
            yield Cost(times * cost.flops, times * cost.saved)
        self.recomputed *= times

    def flow(self, objective: Any, model: FlexTok, images: Tensor) -> Iterator[Cost]:
        """What a FlexTok's decoder learns from, for each draw of an image."""
        encoder, decoder = model.encoder, model.decoder
        patches = decoder.grid**2
        yield from self.coded(model, 2 if isinstance(objective, CrossLengthObjective) else 1)
        yield from (self.edges(encoder, patches), self.edges(decoder, patches))
        if isinstance(objective, DistillationObjective):
            full, null = (
                self.stack(decoder.blocks, n, n**2, trained=False).flops
                for n in (patches + model.num_tokens, patches + 1)  # one token stands for all: null
            )
            yield self.walking(objective, full, null)
            return
        if (prefixes := objective.prefix_alignment) is not None:
            yield self.run(lambda: prefixes.targets(images), 1)
            codes = images.new_empty(1, model.num_tokens, prefixes.embed.in_features)
            targets = images.new_empty(1, prefixes.head[-1].out_features)
            yield self.run(lambda: prefixes(codes, targets), 3)
        if objective.alignment is not None:
            alignment, side = objective.alignment, decoder.grid
            yield self.run(lambda: alignment.backbone.network(images, side, side), 1)
            shape = (decoder.head.in_features, side, side) if alignment.spatial else (patches, -1)
            features = images.new_empty(patches * decoder.head.in_features).view(1, *shape)
            yield self.run(lambda: alignment.projector(features), 3)

    def walking(self, objective: Any, given: float, null: float) -> Cost:
        """What distillation solves before its step: the student's way to its start, and from there
        the teacher's, with guidance. given, null: operations of a velocity."""
        options, decode = objective.config, objective.teacher.network.config.decode
        guided = given + null if decode.guidance_scale != 1 else given
        return Cost((options.num_steps - 1) / 2 * given + options.teacher_steps * guided)

    def front(self, objective: Objective, images: Tensor) -> Iterator[Cost]:
        """Of a FlexTok: what is frozen before the trained parts, and a latent cache spares."""
        yield self.run(lambda: objective.model.vae.encode(images, sample=False), 1)
        if isinstance(objective, DrawingObjective):  # a draft too
            yield self.run(lambda: objective.drawer.vae.encode(images, sample=False), 1)
            yield from self.coded(objective.model, 1)

    def coded(self, model: FlexTok, decodings: int) -> Iterator[Cost]:
        """Encoder and decoder, but for the layers around their blocks."""
        encoder, patches, registers = model.encoder, model.decoder.grid**2, model.num_tokens
        both = patches + registers
        if encoder.registers is None:
            yield self.stack(encoder.blocks, patches, patches**2)
        else:
            pairs = patches**2 + registers * both
            yield self.stack(encoder.blocks, both, pairs, unread=patches)
        for _ in range(decodings):
            yield self.stack(model.decoder.blocks, both, both**2, unread=registers)

    def titok(self, model: TiTok, images: Tensor) -> Iterator[Cost]:
        patches = model.grid**2
        n = 1 + patches + model.num_tokens
        for part in (model.encoder, model.decoder):
            yield self.stack(part.blocks, n, n**2)
            yield self.edges(part, patches)
        yield Cost(6 * patches * matrices(model.decoder.head))
        if model.config.stage == "proxy":
            yield self.run(lambda: model.proxy.features(images), 1)
        if model.config.stage == "finetune":
            decoder: Any = model.pixel_decoder
            codes = images.new_empty(1, decoder.conv_in.in_channels, model.grid, model.grid)
            yield self.run(lambda: decoder(codes), 3)

    def stack(
        self,
        blocks: Any,
        n: int,
        pairs: float,
        context: int = 0,
        unread: int = 0,
        trained: bool = True,
    ) -> Cost:
        """A network's blocks on `n` positions. pairs: of positions that attend; context: positions
        that cross-attention sees; unread: positions that nobody reads of the last block."""
        first, depth, dim = blocks[0], len(blocks), blocks[0].attn.proj.in_features
        inward = 2 * dim**2  # keys and values
        products = n * matrices(blocks, but="modulation")
        products -= unread * (matrices(blocks[-1], but="modulation") - inward)
        if context:
            products -= (n - context) * depth * inward
        forward = 2 * products
        attention = 4 * dim * ((depth - unread / n) * pairs + depth * n * context)
        if not trained or not any(p.requires_grad for p in blocks.parameters()):
            return Cost(forward + attention)
        flops, (numbers, norms) = 3 * forward + 3.5 * attention, KEPT[type(first)]
        if not isinstance(first, ViTBlock):
            norms += 2 if first.attn.qk_norm else 0
        if context:
            numbers, norms = numbers + 4 + 2 * context / n, norms + 1
        width = self.width
        block = n * dim * (width * numbers + 4 * norms)
        if not self.recompute:
            return Cost(flops, depth * block)
        flops += forward + attention
        if not isinstance(first, AdaLNBlock):  # whose gates need the last product
            mlp = first if isinstance(first, ViTBlock) else first.mlp
            flops -= 2 * n * depth * mlp.fc2.weight.numel()
        self.recomputed = max(self.recomputed, block)
        return Cost(flops, depth * n * dim * width)

    def edges(self, network: nn.Module, length: int) -> Cost:
        """The layers before and after a network's blocks."""
        layers = [layer for layer in network.children() if isinstance(layer, nn.Linear)]
        flops = 6 * length * sum(layer.weight.numel() for layer in layers)
        return Cost(flops, 4 * self.width * length * layers[-1].in_features)

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


def an_image(model: Any) -> Tensor:
    """(1, 3, H, W) on the meta device, in the model's precision."""
    shape = (1, 3, model.image_size, model.image_size)
    return torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta")


def matrices(network: nn.Module, but: str = "?") -> int:
    """Numbers in the matrices of a network, but those whose names hold `but`."""
    return sum(
        p.numel() for name, p in network.named_parameters() if p.ndim == 2 and but not in name
    )
