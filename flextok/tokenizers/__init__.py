"""Tokenizers: images <-> indices. base.py has the class that they all are."""

from flextok.tokenizers.base import NoOptions, Tokenizer
from flextok.tokenizers.decoding import DecodeOptions
from flextok.tokenizers.drawer import DrawerConfig
from flextok.tokenizers.flextok import FlexTok, FlexTokConfig
from flextok.tokenizers.length import LengthHeadConfig
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
    "DrawerConfig",
    "FlexTok",
    "FlexTokConfig",
    "LengthHeadConfig",
    "MaskGITVQGAN",
    "NoOptions",
    "TiTok",
    "TiTokConfig",
    "Tokenizer",
    "VQGANConfig",
]
