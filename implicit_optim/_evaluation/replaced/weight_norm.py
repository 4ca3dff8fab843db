"""torch is wrong: the second derivative of its fused kernel for weight norm is not that of its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_optim import _torch


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``: what both APIs for weight norm call in each forward.

    Args:
        v: the direction.
        g: the length.
        dim: each index of this dimension has a length of its own; with -1 the whole has one.
    """
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    rows = v.transpose(0, dim)
    norm = torch.linalg.vector_norm(rows.reshape(rows.size(0), -1), dim=1)
    return v * (g / norm.reshape(-1, *[1] * (v.dim() - 1)).transpose(0, dim))


ENTRIES: dict[Callable[..., Any], Callable[..., Any]] = {_torch.weight_norm: weight_norm}
