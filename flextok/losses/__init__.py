"""Losses beside the flow itself."""

from flextok.losses.alignment import PrefixAlignment, RepresentationAlignment

__all__ = ["PrefixAlignment", "RepresentationAlignment"]
