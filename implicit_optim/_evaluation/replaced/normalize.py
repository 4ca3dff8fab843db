"""torch is wrong: at a vector of zeros second derivatives are NaN, though ``eps`` makes them exist.

Dead features and padding are such vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """``x / max(|x|, eps)``; the arguments are torch's."""
    if out is not None:
        return NotImplemented
    zero = (input == 0).all(dim, keepdim=True)
    norm = torch.linalg.vector_norm(input.masked_fill(zero, 1), p, dim, keepdim=True)
    return input / norm.clamp(min=eps).masked_fill(zero, eps)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Sums of products of normalised numbers; the arguments are torch's."""
    x1, x2 = torch.broadcast_tensors(x1, x2)
    return (normalize(x1, 2.0, dim, eps) * normalize(x2, 2.0, dim, eps)).sum(dim)


ENTRIES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.normalize: normalize,
    F.cosine_similarity: cosine_similarity,
}
