"""Tokenizers: pictures <-> indices."""

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
