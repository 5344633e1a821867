"""A generator and its opponent for grey pictures of 28 x 28 pixels, after DCGAN (Radford, Metz, Chintala, 2016).

Shapes: N pictures, Z numbers of noise, W channels of the widest layer.
"""

import torch
from torch import nn


class Generator(nn.Module):
    """Noise [N, Z] to pictures [N, 1, 28, 28] from -1 to 1."""

    def __init__(self, num_noise: int, width: int) -> None:
        """Build with random first weights."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_noise, width * 7 * 7, bias=False),
            nn.Unflatten(1, (width, 7, 7)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width // 2, kernel_size=4, stride=2, padding=1, bias=False),  # [N, W / 2, 14, 14]
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, 1, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """See the class."""
        made: torch.Tensor = self.layers(noise)
        return made


class Critic(nn.Module):
    """Pictures [N, 1, 28, 28] to how real they look [N]. Without batch norm: each is judged by itself, as WGAN-GP needs."""

    def __init__(self, width: int) -> None:
        """Build with random first weights."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width // 2, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, width, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(width * 7 * 7, 1),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        scores: torch.Tensor = self.layers(image)[:, 0]
        return scores


class Networks(nn.Module):
    """Both, as one model."""

    def __init__(self, num_noise: int, width: int) -> None:
        """Build with random first weights."""
        super().__init__()
        self.generator = Generator(num_noise, width)
        self.critic = Critic(width)
