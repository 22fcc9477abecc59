"""Losses beside the flow itself."""

from flextok.losses.alignment import RepresentationAlignment

__all__ = ["RepresentationAlignment"]
