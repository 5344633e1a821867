"""How unlike two sets of pictures are."""

from __future__ import annotations

import torch


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The squared Fréchet distance between two sets of features [num, channels], each taken for a normal distribution.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): Dowson and Landau, 1982; for pictures made by networks, Heusel et al., 2017.
    """
    first, second = one.double(), other.double()
    covariances = torch.cov(first.T), torch.cov(second.T)
    # The eigenvalues of C1 C2 are those of a symmetric matrix with none below zero, up to rounding.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    apart = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    return float(apart + covariances[0].trace() + covariances[1].trace() - 2 * shared)
