"""Vector quantization (VQ-VAE, arXiv 1711.00937) with a codebook learned by gradient.

TiTok's is 4096 x 12 with z and codebook on the unit sphere (ViT-VQGAN, arXiv 2110.04627);
MaskGIT-VQGAN's is 1024 x 256 and plain. fp32 throughout: a distance decides an index.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.draws import Rng
from flextok.schema import Many, Size, Weight


class VQ(nn.Module):
    """Nearest code of a learned codebook; gradients pass straight through.

    The auxiliary loss is commitment |z - sg(code)|^2 + codebook_weight |sg(z) - code|^2.
    """

    def __init__(
        self,
        codebook_size: Many = 4096,
        dim: Size = 12,
        l2_norm: bool = True,
        commitment: Weight = 0.25,
        codebook_weight: Weight = 1.0,
    ):
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size={codebook_size} and dim={dim} must be at least 1")
        self.codebook_size, self.dim, self.l2_norm = codebook_size, dim, l2_norm
        self.commitment, self.codebook_weight = commitment, codebook_weight
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim))
        nn.init.uniform_(self.codebook, -1.0 / codebook_size, 1.0 / codebook_size)

    def forward(self, z: Tensor, generator: Rng = None) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, K, C) float. Returns codes (B, K, C) float32, exactly rows of the codebook (of
        unit length with l2_norm), indices (B, K) long, and the auxiliary loss, a scalar."""
        if z.shape[-1] != self.dim:
            raise ValueError(f"z has {z.shape[-1]} channels; the codebook has {self.dim}")
        with torch.autocast(z.device.type, enabled=False):  # fp32 island
            z = self._project(z.float())
            codebook = self._project(self.codebook.float())
            indices = nearest(z.detach(), codebook.detach())
            codes = F.embedding(indices, codebook)
            aux = self.commitment * F.mse_loss(z, codes.detach())
            aux = aux + self.codebook_weight * F.mse_loss(codes, z.detach())
            straight_through = codes.detach() + (z - z.detach())  # the value is exactly the code
        return straight_through, indices, aux

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """indices: (...) long in [0, codebook_size). Returns codes (..., C) float32."""
        return self._project(F.embedding(indices, self.codebook.float()))

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """codes: (..., C) float, any values, such as the mean of two codes. Returns the indices
        (...) long of the nearest codes."""
        return nearest(self._project(codes.float()), self._project(self.codebook.float()))

    def _project(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.l2_norm else x

    @torch.no_grad()
    def revive(
        self,
        z: Tensor,
        counts: Tensor,
        threshold: int = 1,
        generator: torch.Generator | None = None,
    ) -> int:
        """Move every code that was chosen fewer than `threshold` times onto a row of z, drawn with
        a probability in proportion to its squared distance to its code (as k-means++ does): the
        rows that are served worst get the free codes.

        z: (..., C) float, encoder outputs; counts: (codebook_size,) from `count_codes`, summed over
        as many batches as the caller likes. Returns the number of codes moved."""
        dead = counts.to(self.codebook.device) < threshold
        number = int(dead.sum())
        if number == 0:
            return 0
        rows = self._project(z.float().flatten(0, -2))
        rows = rows[rows.isfinite().all(dim=-1)]
        if len(rows) == 0:
            return 0
        codebook = self._project(self.codebook.float())
        error = (rows - codebook[nearest(rows, codebook)]).square().sum(dim=-1) + 1e-12
        source = rows.device if generator is None else generator.device
        chosen = torch.multinomial(error.to(source), number, replacement=True, generator=generator)
        self.codebook[dead] = rows[chosen.to(rows.device)].to(self.codebook)
        return number


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """z: (..., C); codebook: (V, C). Returns the indices (...) long of the nearest codes."""
    with torch.autocast(z.device.type, enabled=False):  # fp32 island
        # |z - e|^2 without |z|^2, which is the same for every code
        distance = codebook.square().sum(dim=-1) - 2 * z @ codebook.T
        return distance.argmin(dim=-1)


def count_codes(indices: Tensor, codebook_size: int) -> Tensor:
    """indices: any shape, long; those below 0 are left out. Returns how often each code occurs,
    (codebook_size,) long."""
    indices = indices.flatten()
    counts = torch.zeros(1 + codebook_size, dtype=torch.long, device=indices.device)
    return counts.index_add_(0, 1 + indices.clamp_min(-1), torch.ones_like(indices))[1:]


def codebook_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """counts: (V,) from `count_codes`. Returns the fraction of codes in use and the perplexity
    exp(entropy), scalars; V codes used alike give 1 and V."""
    used = (counts > 0).float().mean()
    p = counts.float() / counts.sum().clamp_min(1)
    return used, torch.exp(-torch.special.xlogy(p, p).sum())
