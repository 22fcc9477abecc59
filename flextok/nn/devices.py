"""Where tensors live. encode, decode and generate move their inputs to the model's device and
return results there; a loss expects its inputs on it already, as training loops have them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flextok.schema import NotFinite

Device = str | int | torch.device | Mapping[str, str | int | torch.device]


def one_device(asked: Device) -> torch.device:
    """The device asked for, also as the map {"": device} of other libraries; "auto" = the current
    GPU where there is one, else MPS (Apple's), else the CPU. Raises ValueError for a map over
    several devices."""
    if isinstance(asked, Mapping):
        if set(asked) != {""}:
            raise ValueError(f'device_map={asked} must name one device: {{"": "cuda"}} or "auto"')
        asked = asked[""]
    if asked == "auto":
        kinds = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())]
        asked = next((name for name, is_there in kinds if is_there), "cpu")
    return torch.device(asked)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. A copy from the CPU to a GPU goes through pinned memory, so that the CPU does
    not wait until the GPU has done all work before it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def span(x: Tensor) -> list[float]:
    """The smallest and the largest value of x, read from its device at once. Raises ValueError
    where there is none."""
    if not x.numel():
        raise ValueError(f"an empty batch, of shape {tuple(x.shape)}: give at least one row")
    return torch.stack(x.aminmax()).cpu().tolist()


def check_finite(values: Tensor, what: str) -> Tensor:
    """The values. Raises NotFinite if one is NaN or infinite."""
    if (~values.isfinite()).any():
        raise NotFinite(
            f"{what} hold values that are not finite: the model's weights are damaged, or its "
            "training diverged"
        )
    return values


def widest(device: torch.device) -> torch.dtype:
    """The most precise floating-point type of a device: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
