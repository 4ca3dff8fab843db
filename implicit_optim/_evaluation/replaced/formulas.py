"""Formulas written out where torch is wrong, or torch lacks it: a derivative of a kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_optim import _torch
from implicit_optim._evaluation.replaced.table import replaces


@replaces(F.hardsigmoid, _torch.hardsigmoid)
def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``relu6(x + 3) / 6``. torch lacks it: the second derivative (hardswish has one)."""
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


@replaces(F.mish)
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``x tanh(softplus(x))``. torch is wrong: second derivatives are NaN where exp(x) overflows."""
    x = input.clone() if inplace else input
    y = x * F.softplus(x).tanh()
    return input.copy_(y) if inplace else y


@replaces(torch.logaddexp, Tensor.logaddexp)
def logaddexp(input: Tensor, other: Tensor, **out: Any) -> Tensor:
    """``log(exp(x) + exp(y))``. torch is wrong as in `mish`: in float32 from x = 89 on."""
    if out or input.is_complex() or other.is_complex():
        return NotImplemented
    return torch.stack(torch.broadcast_tensors(input, other)).logsumexp(0)


@replaces(F.normalize)
def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """``x / max(|x|, eps)``. torch is wrong: at a vector of zeros second derivatives are NaN.

    Dead features and padding are such vectors, and ``eps`` makes the derivatives exist.
    """
    if out is not None:
        return NotImplemented
    zero = (input == 0).all(dim, keepdim=True)
    norm = torch.linalg.vector_norm(input.masked_fill(zero, 1), p, dim, keepdim=True)
    return input / norm.clamp(min=eps).masked_fill(zero, eps)


@replaces(F.cosine_similarity)
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The product of two vectors of length one. torch is wrong as in `normalize`."""
    x1, x2 = torch.broadcast_tensors(x1, x2)
    return (normalize(x1, 2.0, dim, eps) * normalize(x2, 2.0, dim, eps)).sum(dim)


@replaces(torch.select_scatter, Tensor.select_scatter)
def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """``input`` with ``src`` for a row. torch is wrong: under vmap the derivative is another row's."""
    start = range(input.size(dim))[index]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, start, start + 1)


@replaces(_torch.weight_norm)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, called by both APIs for weight norm. torch is wrong: the second derivative.

    Each index of dimension ``dim`` has a length g of its own; with -1 the whole has one.
    """
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    rows = v.transpose(0, dim)
    norm = torch.linalg.vector_norm(rows.reshape(rows.size(0), -1), dim=1)
    return v * (g / norm.reshape(-1, *[1] * (v.dim() - 1)).transpose(0, dim))
