"""Tokenizers: pictures <-> indices. What training and sampling ask of each:

prepare_training(**start)     before training; parameters are the trained models that it starts from
loss(images, generator=, shared=)   a dict of scalars, "loss" the total
encode(images)                (B, 3, H, W) in [-1, 1], or PIL pictures -> indices (B, K)
decode(indices, generator=)   -> images; its other parameters are the tokenizer's own options,
                              which decode_options(asked) checks where it has some
num_tokens, image_size        K and H
vocab_size                    0 = continuous: then encode_codes and decode_codes, no indices
decodes_prefixes              whether decode takes the first k indices, or only all K
codes_weights, codes_settings what of the weights and the config decides the indices, see codes_id

A tokenizer with reconstruct and reconstruction_losses in place of a loss in one piece can be
trained against a discriminator, too.
"""

from flextok.tokenizers.flextok import FlexTok, FlexTokConfig
from flextok.tokenizers.titok import TiTok, TiTokConfig
from flextok.tokenizers.vqgan import MaskGITVQGAN, VQGANConfig

TOKENIZERS = {"flextok": FlexTok, "titok": TiTok, "maskgit_vqgan": MaskGITVQGAN}

__all__ = [
    "TOKENIZERS",
    "FlexTok",
    "FlexTokConfig",
    "MaskGITVQGAN",
    "TiTok",
    "TiTokConfig",
    "VQGANConfig",
]
