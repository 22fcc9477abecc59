"""Tokenizers: images <-> indices. base.py has the class that they all are."""

from flextok.tokenizers.base import NoOptions, Tokenizer
from flextok.tokenizers.flextok import DecodeOptions, FlexTok, FlexTokConfig
from flextok.tokenizers.titok import TiTok, TiTokConfig
from flextok.tokenizers.vqgan import MaskGITVQGAN, VQGANConfig

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "flextok": FlexTok,
    "titok": TiTok,
    "maskgit_vqgan": MaskGITVQGAN,
}

__all__ = [
    "TOKENIZERS",
    "DecodeOptions",
    "FlexTok",
    "FlexTokConfig",
    "MaskGITVQGAN",
    "NoOptions",
    "TiTok",
    "TiTokConfig",
    "Tokenizer",
    "VQGANConfig",
]
