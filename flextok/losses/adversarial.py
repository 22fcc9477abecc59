"""The adversarial part of TiTok's decoder training: a patch discriminator (arXiv 1611.07004), the
hinge loss, and LeCam regularization (arXiv 2104.03310); and a discriminator of features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlurPool(nn.Module):
    """Halves a feature map after a binomial low-pass filter (arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(taps, taps) / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, C, ceil(H/2), ceil(W/2))."""
        x = F.pad(x, (1, 1 + x.shape[-1] % 2, 1, 1 + x.shape[-2] % 2))
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, stride=2, groups=x.shape[1])


class PatchDiscriminator(nn.Module):
    """Convolutions that judge a grid of patches: from `dim` channels on, `num_stages` halvings."""

    def __init__(
        self,
        dim: int = 128,
        num_stages: int = 3,
        slope: float = 0.1,
        channels: int = 3,
        grid: int = 16,
    ):
        super().__init__()
        self.grid = grid
        self.block_in = nn.Sequential(nn.Conv2d(channels, dim, 5, padding=2), nn.LeakyReLU(slope))
        self.blocks = nn.ModuleList()
        width = dim
        for stage in range(num_stages):
            out = dim * 2**stage
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(width, out, 3, padding=1),
                    BlurPool(),
                    nn.GroupNorm(32, out),
                    nn.LeakyReLU(slope),
                )
            )
            width = out
        self.to_logits = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.LeakyReLU(slope), nn.Conv2d(width, 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) in the same range in training and in use. Returns logits
        (B, 1, grid, grid), high = real."""
        x = self.block_in(images)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(F.adaptive_max_pool2d(x, self.grid))


class FeatureDiscriminator(nn.Module):
    """Heads that judge each position by the features that a trained network finds there, one head
    for each of its layers (LADD, arXiv 2403.12015)."""

    def __init__(self, num_layers: int, channels: int, dim: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(channels), nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, 1)
            )
            for _ in range(num_layers)
        )

    def forward(self, features: Tensor) -> Tensor:
        """features: (B, L, N, C). Returns logits (B, L, N, 1), high = real."""
        return torch.stack(
            [head(x) for head, x in zip(self.heads, features.unbind(1), strict=True)], dim=1
        )


class LeCam(nn.Module):
    """Keeps the discriminator's mean logits close to each other's moving average, which helps when
    data is scarce. The averages are buffers, so that a resumed run continues with them."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """logits: any shape. Returns the penalty, a scalar; the averages stay as they are."""
        real, fake = logits_real.float().mean(), logits_fake.float().mean()
        return F.relu(real - self.fake).square() + F.relu(self.real - fake).square()

    @torch.no_grad()
    def update(self, logits_real: Tensor, logits_fake: Tensor) -> None:
        """Move the averages towards these logits' means, if finite; once an optimizer step."""
        for average, logits in ((self.real, logits_real), (self.fake, logits_fake)):
            mean = logits.float().mean().to(average)
            average.lerp_(torch.where(mean.isfinite(), mean, average), 1 - self.decay)


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """logits: any shape, high = real. Returns a scalar (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def hinge_generator_loss(logits_fake: Tensor) -> Tensor:
    """logits_fake: any shape, high = real. Returns a scalar."""
    return -logits_fake.mean()
