"""A convolutional variational autoencoder for black and white pictures of 28 x 28 pixels.

Shapes: N pictures, Z numbers that a picture is put into, W channels of the widest layer.
"""

import torch
from torch import nn


class Autoencoder(nn.Module):
    """An encoder to a normal distribution over Z numbers, and a decoder to how likely each pixel is white."""

    def __init__(self, num_latent: int, width: int) -> None:
        """Build with random first weights."""
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width // 2, kernel_size=4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, kernel_size=4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(width * 7 * 7, 256),
            nn.SiLU(),
            nn.Linear(256, 2 * num_latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(num_latent, 256),
            nn.SiLU(),
            nn.Linear(256, width * 7 * 7),
            nn.SiLU(),
            nn.Unflatten(1, (width, 7, 7)),
            nn.ConvTranspose2d(width, width // 2, kernel_size=4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(width // 2, 1, kernel_size=4, stride=2, padding=1),
        )

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [N, 1, 28, 28] of 0 and 1 to mean and logarithm of the variance, [N, Z] each."""
        mean, log_variance = self.encoder(image).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures to the mean of what they are put into, [N, Z], and what comes back of that, [N, 1, 28, 28] from 0 to 1."""
        mean, _ = self.encode(image)
        return mean, self.decoder(mean).sigmoid()
