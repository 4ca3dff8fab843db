"""What solvers ask of vectors ``[*batch, n]`` beside elementwise operations and linear combinations.

Every sum over the n numbers of a vector is here. If the vectors are sharded over processes
(``DTensor``), each process sums its own numbers and the sums, one number per task, are gathered here
once instead of at each use.
"""

import math

import torch
from torch import Tensor


def dot(x: Tensor, y: Tensor) -> Tensor:
    """``x . y`` of every task."""
    return _together(torch.linalg.vecdot(x, y))


def norm(x: Tensor) -> Tensor:
    """``||x||`` of every task."""
    return _together(torch.linalg.vector_norm(x, dim=-1))


def unit(x: Tensor, length: Tensor) -> Tensor:
    """``x / length`` of every task; zero where the length is zero."""
    return x / torch.where(length > 0, length, math.inf).unsqueeze(-1)


def largest(x: Tensor) -> Tensor:
    """``max |x|`` of every task, NaN included; on a CPU ten times faster than the infinity norm."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    return _together(torch.maximum(x.amax(-1), -x.amin(-1)))


def power_of_two(b: Tensor) -> Tensor:
    """The power of two just below ``max |b|``, so that dividing by it loses nothing; 1 for zero."""
    most = largest(b)
    usable = (most > 0) & torch.isfinite(most)
    return torch.where(usable, most, 1.0).log2().floor().exp2()


def directions(coefficients: Tensor, basis: Tensor) -> Tensor:
    """``sum_j c_j v_j`` for ``c [*batch, k]`` and ``v [*batch, k, n]``."""
    return (coefficients.unsqueeze(-2) @ basis).squeeze(-2)


def products(basis: Tensor, x: Tensor) -> Tensor:
    """``v_j . x`` for ``v [*batch, k, n]``, ``[*batch, k]``."""
    return _together((basis @ x.unsqueeze(-1)).squeeze(-1))


def _together(sums: Tensor) -> Tensor:
    """The same on every process, of a DTensor, whose module takes long to import."""
    if not hasattr(sums, "full_tensor"):
        return sums
    return type(sums).from_local(sums.full_tensor(), sums.device_mesh)  # type: ignore[attr-defined]
