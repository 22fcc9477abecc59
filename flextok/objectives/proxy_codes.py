"""TiTok's first stage (arXiv 2406.07550): learn the indices of a trained MaskGIT-VQGAN."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.hub import Pretrained
from flextok.objectives.base import need
from flextok.objectives.nested_dropout import PrefixConfig, take_rows
from flextok.objectives.reconstruction import PrefixObjective, continue_from
from flextok.schema import ConfigError
from flextok.tokenizers import MaskGITVQGAN, TiTok


class ProxyCodesObjective(PrefixObjective):
    """The cross-entropy of the proxy's indices, and the quantizer's loss. The batch may hold them
    as "proxy_indices" (B, N)."""

    config_class = PrefixConfig
    models = ("titok",)
    starts = ("weights", "proxy")
    model: TiTok

    def begin(self, weights: Pretrained | None = None, proxy: Pretrained | None = None) -> None:
        """weights: as for the reconstruction's objective; proxy: the VQGAN, unless the model has
        one attached."""
        super().begin()
        if weights is not None:
            continue_from(self.model, need("weights", weights, TiTok))
        stage = self.model.config.stage
        if stage != "proxy":
            raise ConfigError(f"stage {stage!r} learns pixels, not a proxy's indices")
        if proxy is not None or self.model.frozen_proxy is None:
            self.model.attach_proxy(need("proxy", proxy, MaskGITVQGAN))

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        logits, aux, order = self.decoded(self.model.decoder, batch, generator)  # (B, N, V)
        truth = batch.get("proxy_indices")
        if truth is None:
            proxy = self.model.proxy
            with torch.no_grad():  # its encode(), but for checks that would wait for a GPU
                truth = proxy.quantizer(proxy.features(batch["image"]))[1]
        truth = take_rows(truth, order).flatten()
        losses = {
            "proxy": F.cross_entropy(logits.flatten(0, 1).float(), truth),
            "quantizer": aux,
        }
        return {"loss": losses["proxy"] + aux, **losses}
