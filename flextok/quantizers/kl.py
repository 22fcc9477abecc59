"""The continuous bottleneck of a VAE (arXiv 1312.6114) in a quantizer's place: no indices."""

import torch
from torch import Tensor, nn

from flextok.draws import Rng, draw
from flextok.schema import Size, Weight


class KL(nn.Module):
    """A diagonal Gaussian posterior: its sample in training, its mean in evaluation.

    z carries mean and log-variance, 2 dim channels, for codes of `dim` channels. The auxiliary loss
    is weight * KL(posterior || N(0, 1)), summed over registers and channels, averaged over B.
    """

    codebook_size = 0

    def __init__(self, dim: Size = 16, weight: Weight = 1e-6):
        super().__init__()
        self.dim, self.weight = dim, weight

    def forward(self, z: Tensor, generator: Rng = None) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, K, 2 dim) float. Returns codes (B, K, dim) float32, indices (B, 0) long (a
        continuous code has none) and the auxiliary loss."""
        if z.shape[-1] != 2 * self.dim:
            raise ValueError(f"z has {z.shape[-1]} channels; KL of dim {self.dim} takes two each")
        mean, logvar = moments(z)
        aux = self.weight * kl_divergence(mean, logvar).sum() / len(z)
        indices = torch.empty(len(z), 0, dtype=torch.long, device=z.device)
        if not self.training:
            return mean, indices, aux
        noise = draw(torch.randn, tuple(mean.shape), generator, z.device)
        return mean + torch.exp(logvar / 2) * noise, indices, aux

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        raise ValueError("a KL bottleneck is continuous: there are no indices to decode")


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """z: (B, K, 2C). Returns mean and log-variance, (B, K, C) float32 each."""
    mean, logvar = z.float().chunk(2, dim=-1)  # fp32 island: exp follows
    return mean, logvar.clamp(-30.0, 20.0)


def kl_to_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """The KL divergence of N(mean, exp(logvar)) from N(0, 1), of each value, in nats."""
    return (mean.square() + logvar.exp() - 1 - logvar) / 2


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """mean, logvar: (B, K, C). Returns KL to N(0, 1), (B, K), summed over channels."""
    return kl_to_normal(mean, logvar).sum(dim=-1)
