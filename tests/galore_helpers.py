"""Gradients with known singular values, and what is asked of bases, for the tests of GaLore."""

from __future__ import annotations

import torch

SHAPES = [(48, 20), (20, 48), (24, 24), (3, 20, 31), (2, 3, 17, 12), (2, 2), (3, 40)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spectrum(*shape: int, falls: float, seed: int = 0) -> torch.Tensor:
    """Matrices (..., m, n) whose singular values fall by a factor each."""
    u, s, vh = torch.linalg.svd(draw(*shape, seed=seed).double(), full_matrices=False)
    s = falls ** torch.arange(s.shape[-1]).double()
    return (u * s @ vh).float()


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sine of the largest angle between two subspaces, the largest of a batch."""
    a, b = a.double(), b.double()
    return float(torch.linalg.matrix_norm(a @ a.mT - b @ b.mT, 2).max())


def assert_orthonormal(columns: torch.Tensor, tolerance: float = 5e-6) -> None:
    unit = torch.eye(columns.shape[-1])
    torch.testing.assert_close(columns.mT @ columns, unit.expand(*columns.shape[:-2], -1, -1), rtol=0, atol=tolerance)
