"""What Krylov methods ask of vectors ``[*batch, n]`` beside linear combinations.

Everything that sums over the n numbers of a vector stands here, so that they may one day be sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dot(x: Tensor, y: Tensor) -> Tensor:
    """``x . y`` of every task."""
    return torch.linalg.vecdot(x, y)


def norm(x: Tensor) -> Tensor:
    """``||x||`` of every task."""
    return torch.linalg.vector_norm(x, dim=-1)


def power_of_two(b: Tensor) -> Tensor:
    """The power of two just below ``max |b|``, so that dividing by it loses nothing; 1 for zero."""
    if b.shape[-1] == 0:
        return b.new_ones(b.shape[:-1])
    largest = b.abs().amax(dim=-1)
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, largest, 1.0).log2().floor().exp2()


def directions(coefficients: Tensor, basis: Tensor) -> Tensor:
    """``sum_j c_j v_j`` for ``c [*batch, k]`` and ``v [*batch, k, n]``."""
    return (coefficients.unsqueeze(-2) @ basis).squeeze(-2)


def products(basis: Tensor, x: Tensor) -> Tensor:
    """``v_j . x`` for ``v [*batch, k, n]``, ``[*batch, k]``."""
    return (basis @ x.unsqueeze(-1)).squeeze(-1)
