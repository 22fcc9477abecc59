"""A tokenizer and a generator as diffusers has its models, and pipelines of them. All save and
load by diffusers' own rules: config.json and diffusion_pytorch_model.safetensors.

    autoencoder = AutoencoderFlexTok.from_flextok(flextok.load("emoji"))
    z = autoencoder.encode(images).latents            # (B, K, C), coarse to fine
    images = autoencoder.decode(z[:, :16]).sample     # (B, 3, H, W) in [-1, 1]
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import BaseOutput
from torch import Tensor

from flextok.draws import Rng
from flextok.generators import GENERATORS, Generator
from flextok.generators.base import Asked, as_batch
from flextok.images import Pictures
from flextok.schema import check_number, from_mapping
from flextok.tokenizers import FlexTok, FlexTokConfig
from flextok.tokenizers.base import as_images, images_to_encode, in_shape_of
from flextok.tree_search import repeated


@dataclass
class FlexTokEncoderOutput(BaseOutput):
    """What encode returns: the codes as latents, (B, K, C) float, and indices (B, K) long."""

    latents: Tensor
    indices: Tensor


class AutoencoderFlexTok(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A FlexTok whose latents are the codes of its tokens, any prefix of which decodes. settings:
    the fields of FlexTokConfig; metadata: facts beside the weights, as in config.json of ours."""

    @register_to_config
    def __init__(self, settings: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.tokenizer = FlexTok(from_mapping(FlexTokConfig, settings))
        self.tokenizer.metadata.update(metadata or {})

    @classmethod
    def from_flextok(cls, tokenizer: FlexTok) -> "AutoencoderFlexTok":
        """The same tokenizer, its weights shared. Raises ValueError for one of another type."""
        if not isinstance(tokenizer, FlexTok):
            raise ValueError(f"diffusers has FlexTok tokenizers only, not a {tokenizer.model_type}")
        with torch.device("meta"):
            model = cls(tokenizer.written_config(None), tokenizer.written_metadata(None))
        model.tokenizer = tokenizer
        return model.eval()

    @torch.no_grad()
    def encode(
        self,
        x: Pictures,
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
    ) -> FlexTokEncoderOutput | tuple[Tensor]:
        """x, height, width: as FlexTok.encode takes them."""
        images = images_to_encode(self.tokenizer, x, height, width)
        indices = self.tokenizer.encode(images)
        codes = self.tokenizer.codes_of(indices)
        return FlexTokEncoderOutput(codes, indices) if return_dict else (codes,)

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: Rng = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """z: the first k codes (B, k, C) float, or indices (B, k). Returns images (B, 3, H, W) in
        [-1, 1]. Steps, guidance and size are the model's own where None."""
        asked = {"num_steps": num_inference_steps, "guidance_scale": guidance_scale}
        options = self.tokenizer.decode_options({**asked, "height": height, "width": width})
        codes = z if z.is_floating_point() else self.tokenizer.codes_of(z)
        made = self.tokenizer.decode_codes(codes, options=options, generator=generator)
        images = as_images(made)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self, sample: Tensor, return_dict: bool = True, generator: Rng = None
    ) -> DecoderOutput | tuple[Tensor]:
        """sample: (B, 3, H, W) float in [-1, 1]. Returns its reconstruction from all tokens."""
        z = self.encode(sample, return_dict=False)[0]
        shape = in_shape_of(self.tokenizer, sample, None)
        return self.decode(z, return_dict=return_dict, generator=generator, **shape)


class FlexTokGenerator(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A generator of the package. model_type: its name in GENERATORS; settings: its config's
    fields; metadata: facts beside the weights, such as class_names."""

    @register_to_config
    def __init__(
        self, model_type: str, settings: dict[str, Any], metadata: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        kind: Any = GENERATORS[model_type]
        self.model: Generator = kind(from_mapping(kind.config_class, settings))
        self.model.metadata.update(metadata or {})

    @classmethod
    def from_flextok(cls, generator: Generator) -> "FlexTokGenerator":
        """The same generator, its weights shared."""
        with torch.device("meta"):
            config, facts = generator.written_config(None), generator.written_metadata(None)
            model = cls(generator.model_type, config, facts)
        model.model = generator
        return model.eval()


class FlexTokReconstructionPipeline(DiffusionPipeline):
    """Pictures to their reconstructions from the first tokens."""

    def __init__(self, autoencoder: AutoencoderFlexTok) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        num_tokens: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Rng = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """image: one picture or several, height and width: as FlexTok.encode takes them;
        num_tokens: all by default; generator: draws the initial noise; output_type: pil, np
        (B, H, W, 3) or pt (B, 3, H, W), both in [0, 1]. Returns `.images`."""
        model = self.autoencoder
        if num_tokens is not None:
            check_number("num_tokens", num_tokens, 1, model.tokenizer.num_tokens, whole=True)
        images = images_to_encode(model.tokenizer, image, height, width)
        size = in_shape_of(model.tokenizer, images, {"height": height, "width": width})
        z = model.encode(images).latents[:, :num_tokens]
        how = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        made = model.decode(z, generator=generator, **how, **size).sample
        images = self.image_processor.postprocess(made, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class FlexTokPipeline(DiffusionPipeline):
    """Classes or prompts to images: a generator draws indices, the tokenizer decodes them."""

    def __init__(self, autoencoder: AutoencoderFlexTok, transformer: FlexTokGenerator) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder, transformer=transformer)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        prompt: Asked,
        num_tokens: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        decoder_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Rng = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """prompt: prompts, class names or labels, as the generator takes them; num_tokens: all by
        default; height, width: of the images; guidance_scale: of the generator;
        num_inference_steps, decoder_guidance_scale: of the decoder; num_images_per_prompt: which
        follow each other; generator: one, or one for each image, draws the indices, then the
        decoder's noise. Returns `.images`, as FlexTokReconstructionPipeline does."""
        check_number("num_images_per_prompt", num_images_per_prompt, 1, 10_000, whole=True)
        prompts = as_batch(prompt)
        if num_images_per_prompt > 1:
            prompts = repeated(prompts, num_images_per_prompt)
        how = {"num_tokens": num_tokens, "guidance_scale": guidance_scale}
        indices = self.transformer.model.generate(prompts, generator=generator, **how)
        made = self.autoencoder.decode(
            indices,
            generator=generator,
            num_inference_steps=num_inference_steps,
            guidance_scale=decoder_guidance_scale,
            height=height,
            width=width,
        ).sample
        images = self.image_processor.postprocess(made, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
