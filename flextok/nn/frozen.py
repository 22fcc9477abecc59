"""Trained networks that another model looks at in training."""

from typing import Any

import torch
from torch import nn


class Frozen:
    """Keeps a trained network beside its user: in no state dict, never trained, and shared by
    copies of the user, of which an average of the weights is one."""

    def __init__(self, network: nn.Module):
        self.network: Any = network.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Any:
        """The network itself, moved to `device`."""
        return self.network.to(device)

    def __deepcopy__(self, memo: object) -> "Frozen":
        return self
