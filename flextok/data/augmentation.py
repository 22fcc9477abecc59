"""How training images are varied. Importing this imports no torch, for the commands' --help."""

from dataclasses import dataclass
from typing import Annotated, Literal

from flextok.schema import Bounds


@dataclass(kw_only=True)
class Augmentation:
    """Random changes of an image; what a rotation, a scaling or a shift uncovers is white."""

    crop: Annotated[Literal["center", "random"], "which square of an oblong image"] = "center"
    flip: Annotated[bool, "mirror half of the images"] = False
    rotate: Annotated[float, Bounds(0, 180), "rotate by up to so many degrees each way"] = 0.0
    scale: Annotated[
        float, Bounds(0, 1, open_high=True), "enlarge or shrink by up to this fraction"
    ] = 0.0
    shift: Annotated[
        float, Bounds(0, 0.5, open_high=True), "shift by up to this fraction of the size each way"
    ] = 0.0
    hue: Annotated[
        float, Bounds(0, 0.5), "turn the hues by up to this fraction of the colour circle each way"
    ] = 0.0
