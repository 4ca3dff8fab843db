"""torch lacks it: hardsigmoid has no second derivative (hardswish and the other activations have).

torch is wrong: of mish and `logaddexp` it is NaN where ``exp`` overflows: in float32 from 89 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_optim import _torch


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``relu6(x + 3) / 6``.

    Args:
        input: x.
        inplace: write it into x, where torch lets that be done.
    """
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``x tanh(softplus(x))``.

    Args:
        input: x.
        inplace: write it into x, where torch lets that be done.
    """
    x = input.clone() if inplace else input
    y = x * F.softplus(x).tanh()
    return input.copy_(y) if inplace else y


def logaddexp(input: Tensor, other: Tensor, **out: Any) -> Tensor:
    """``log(exp(x) + exp(y))``; torch's own of complex numbers, or into ``out``."""
    if out or input.is_complex() or other.is_complex():
        return NotImplemented
    return torch.stack(torch.broadcast_tensors(input, other)).logsumexp(0)


ENTRIES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.hardsigmoid: hardsigmoid,
    _torch.hardsigmoid: hardsigmoid,
    F.mish: mish,
    torch.logaddexp: logaddexp,
    Tensor.logaddexp: logaddexp,
}
