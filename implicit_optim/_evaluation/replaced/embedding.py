"""torch is wrong: under vmap the padding row of all tasks but the first receives a gradient.

torch lacks it: `embedding_bag` has no second derivative. What no derivative of can be right is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``weight[input]``, where row ``padding_idx`` is a constant; the arguments are torch's.

    Raises:
        ValueError: ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` is set.
    """
    _refuse("embedding", max_norm=max_norm, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
    n = weight.size(0)
    if padding_idx is None or not -n <= padding_idx < n:
        return NotImplemented
    rows = F.embedding(input, weight)
    return torch.where((input == padding_idx % n).unsqueeze(-1), rows.detach(), rows)


def torch_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`embedding` with the arguments of ``torch.embedding``: a negative ``padding_idx`` is no row."""
    row = None if padding_idx < 0 else padding_idx
    return embedding(indices, weight, row, None, 2.0, scale_grad_by_freq, sparse)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums or means of the rows in each bag, without rows ``padding_idx``; the arguments are torch's.

    Raises:
        ValueError: the mode is "max", or ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` is set.
    """
    _refuse(
        "embedding_bag", max_norm=max_norm, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
    )
    if mode == "max":
        raise ValueError(
            'embedding_bag: mode="max" has no second derivative: use mode="sum" or "mean", or '
            "F.embedding followed by amax(-2)"
        )
    n = weight.size(0)
    if (
        mode not in ("sum", "mean")
        or input.is_nested
        or input.dim() != (2 if offsets is None else 1)
        or (
            per_sample_weights is not None
            and (mode, input.shape) != ("sum", per_sample_weights.shape)
        )
        or (padding_idx is not None and not -n <= padding_idx < n)
    ):
        return NotImplemented
    counts = torch.ones_like(input, dtype=weight.dtype)
    if padding_idx is not None:
        counts = counts.masked_fill(input == padding_idx % n, 0)
    shares = counts if per_sample_weights is None else counts * per_sample_weights
    rows = F.embedding(input, weight) * shares.unsqueeze(-1)
    if offsets is None:
        total, count = rows.sum(-2), counts.sum(-1)
    else:
        at = torch.arange(input.numel(), device=input.device)
        bag = (offsets.unsqueeze(-1) <= at).sum(0) - 1
        total = rows.new_zeros(offsets.numel(), weight.size(1)).index_add(0, bag, rows)
        count = counts.new_zeros(offsets.numel()).index_add(0, bag, counts)
        if include_last_offset:
            total, count = total[:-1], count[:-1]
    return total if mode == "sum" else total / count.clamp(min=1).unsqueeze(-1)


_REFUSED = {
    "max_norm": "torch renormalises the weight in place: use max_norm=None, and normalise it in forward",
    "scale_grad_by_freq": "the gradient is that of no function, in torch: use scale_grad_by_freq=False",
    "sparse": "the gradient has no second derivative: use sparse=False",
}


def _refuse(name: str, **settings: Any) -> None:
    for setting, value in settings.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: with {setting}={value} {_REFUSED[setting]}")


ENTRIES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: embedding,
    torch.embedding: torch_embedding,
    F.embedding_bag: embedding_bag,
}
