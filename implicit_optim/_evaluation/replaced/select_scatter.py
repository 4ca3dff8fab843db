"""torch is wrong: under vmap the first derivative of `select_scatter` is another row's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """``input`` with ``src`` in place of ``input.select(dim, index)``."""
    start = range(input.size(dim))[index]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, start, start + 1)


ENTRIES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.select_scatter: select_scatter,
    Tensor.select_scatter: select_scatter,
}
