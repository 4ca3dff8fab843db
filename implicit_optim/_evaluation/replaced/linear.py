"""A linear layer under vmap.

Ours is faster: torch multiplies the bias by 1 and adds it on its own. And torch is wrong: with a bias it
does not see autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_optim._evaluation.precision import autocast_is_on
from implicit_optim._evaluation.replaced.when import Way, way
from implicit_optim._torch import is_batched


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``input @ weight^T + bias`` for a batch of tasks."""
    if bias is None or torch.compiler.is_compiling() or not is_batched(weight):
        return NotImplemented
    if autocast_is_on(input.device):
        product = torch.matmul(input, weight.t())
        return product + bias.to(product.dtype)
    if input.ndim != 2 or way(weight) is not Way.OURS:
        return NotImplemented
    return torch.mm(input, weight.t()) + bias


ENTRIES: dict[Callable[..., Any], Callable[..., Any]] = {F.linear: linear}
