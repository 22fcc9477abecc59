"""Trained networks: those that another model looks at in training, and those it is made of."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


class NeedsWeights(nn.Module):
    """A module that training must not find with the random weights it was built with. has_weights:
    whether it was ever given others, by load_state_dict of its own or of a module around it."""

    has_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(note_weights)


def note_weights(module: nn.Module, found: Any) -> None:
    """Called after load_state_dict. found.missing_keys: of the whole state dict."""
    assert isinstance(module, NeedsWeights), "it registered this"
    if not found.missing_keys:
        module.has_weights = True


def in_eval(method: F) -> F:
    """A network's method, run in eval mode; afterwards each module is in its own mode again."""

    @functools.wraps(method)
    def run(network: nn.Module, *args: Any, **options: Any) -> Any:
        training = [module for module in network.modules() if module.training]
        network.eval()
        try:
            return method(network, *args, **options)
        finally:
            for module in training:
                module.training = True

    return cast(F, run)


class Frozen:
    """Keeps a trained network beside its user: in no state dict, never trained, and shared by
    copies of the user, of which an average of the weights is one."""

    def __init__(self, network: nn.Module):
        self.network: Any = network.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Any:
        """The network itself, moved to `device`."""
        if all(parameter.device == device for parameter in self.network.parameters()):
            return self.network
        return self.network.to(device)

    def __deepcopy__(self, memo: object) -> "Frozen":
        return self
