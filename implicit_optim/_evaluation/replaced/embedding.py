"""torch is wrong: under vmap the padding row of all tasks but the first receives a gradient.

torch lacks it: `embedding_bag` has no second derivative. What no derivative of can be right is refused.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_optim._evaluation.replaced.table import TABLE, replaces, replaces_by_name


@replaces_by_name(F.embedding)
def embedding(f: Any) -> Tensor:
    """``weight[input]``, where row ``padding_idx`` is a constant.

    Raises:
        ValueError: ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` is set.
    """
    _refuse("embedding", f)
    n = f.weight.size(0)
    if f.padding_idx is None or not -n <= f.padding_idx < n:
        return NotImplemented
    rows = F.embedding(f.input, f.weight)
    return torch.where((f.input == f.padding_idx % n).unsqueeze(-1), rows.detach(), rows)


@replaces(torch.embedding)
def torch_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **settings: Any
) -> Any:
    """`embedding` with the arguments of ``torch.embedding``: a negative ``padding_idx`` is no row."""
    row = None if padding_idx < 0 else padding_idx
    return TABLE[F.embedding](indices, weight, row, None, 2.0, *args, **settings)


@replaces_by_name(F.embedding_bag)
def embedding_bag(f: Any) -> Tensor:
    """Sums or means of the rows in each bag, without rows ``padding_idx``.

    Raises:
        ValueError: the mode is "max", or ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` is set.
    """
    _refuse("embedding_bag", f)
    if f.mode == "max":
        raise ValueError(
            'embedding_bag: mode="max" has no second derivative: use mode="sum" or "mean", or '
            "F.embedding followed by amax(-2)"
        )
    n, own = f.weight.size(0), f.per_sample_weights
    odd = f.mode not in ("sum", "mean") or f.input.is_nested
    odd = odd or f.input.dim() != (2 if f.offsets is None else 1)
    odd = odd or (own is not None and (f.mode, f.input.shape) != ("sum", own.shape))
    if odd or (f.padding_idx is not None and not -n <= f.padding_idx < n):
        return NotImplemented
    counts = torch.ones_like(f.input, dtype=f.weight.dtype)
    if f.padding_idx is not None:
        counts = counts.masked_fill(f.input == f.padding_idx % n, 0)
    shares = counts if own is None else counts * own
    rows = F.embedding(f.input, f.weight) * shares.unsqueeze(-1)
    if f.offsets is None:
        total, count = rows.sum(-2), counts.sum(-1)
    else:
        at = torch.arange(f.input.numel(), device=f.input.device)
        bag = (f.offsets.unsqueeze(-1) <= at).sum(0) - 1
        total = rows.new_zeros(f.offsets.numel(), f.weight.size(1)).index_add(0, bag, rows)
        count = counts.new_zeros(f.offsets.numel()).index_add(0, bag, counts)
        if f.include_last_offset:
            total, count = total[:-1], count[:-1]
    return total if f.mode == "sum" else total / count.clamp(min=1).unsqueeze(-1)


_REFUSED = {
    "max_norm": "torch renormalises the weight in place: use max_norm=None, and normalise it in forward",
    "scale_grad_by_freq": "the gradient is that of no function, in torch: use scale_grad_by_freq=False",
    "sparse": "the gradient has no second derivative: use sparse=False",
}


def _refuse(name: str, f: Any) -> None:
    for setting, why in _REFUSED.items():
        value = getattr(f, setting)
        if value is not None and value is not False:
            raise ValueError(f"{name}: with {setting}={value} {why}")
