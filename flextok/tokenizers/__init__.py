"""Tokenizers: pictures <-> indices."""

from flextok.tokenizers.flextok import FlexTok, FlexTokConfig

TOKENIZERS = {"flextok": FlexTok}

__all__ = ["TOKENIZERS", "FlexTok", "FlexTokConfig"]
