"""Batches of tasks: masks and early exits for loops, leading dimensions for autograd.Functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


def none_left(running: Tensor) -> bool:
    """Whether a loop over a batch of tasks may stop early.

    Looking costs one host synchronisation. Where the answer cannot be known (under ``vmap``, on the
    ``meta`` device, while compiling) it is "no", and the loop runs to its end behind masks.

    Args:
        running: bool ``[*batch]``.

    Returns:
        True if no task is running any more.
    """
    if torch.compiler.is_compiling() or running.device.type == "meta" or is_batched(running):
        return False
    return not bool(running.any())


def is_batched(x: Tensor) -> bool:
    """Whether ``vmap`` stands between ``x`` and its numbers."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the tasks in ``mask [*batch]``, ``old`` for the others, over trailing dimensions."""
    return torch.where(mask.reshape(mask.shape + (1,) * (new.ndim - mask.ndim)), new, old)


def lead(tensors: Sequence[Any], dims: Sequence[int | None], size: int) -> list[Any]:
    """Give every tensor the new batch dimension in front, by moving it there or by a view.

    Args:
        tensors: tensors, or other leaves, which stay as they are.
        dims: where the batch dimension of each stands, ``None`` for one that has none.
        size: length of the batch dimension.

    Returns:
        The tensors ``[size, *shape]``.
    """

    def move(t: Any, dim: int | None) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)

    return [move(t, d) for t, d in zip(tensors, dims, strict=True)]


def split_grads(
    fn: Callable[[list[Any]], Any], leaves: Sequence[Any], needed: Sequence[bool], cotangent: Any
) -> list[Tensor | None]:
    """Vector-Jacobian product of ``fn(leaves)`` with respect to the leaves that are needed.

    Args:
        fn: function of the list of leaves.
        leaves: tensors and others.
        needed: which of them want a gradient.
        cotangent: like ``fn``'s value.

    Returns:
        One gradient a leaf, ``None`` where none is needed.
    """
    chosen = [i for i, need in enumerate(needed) if need]
    if not chosen:
        return [None] * len(leaves)

    def of_chosen(*values: Tensor) -> Any:
        merged = list(leaves)
        for i, value in zip(chosen, values, strict=True):
            merged[i] = value
        return fn(merged)

    _, pull = cast(Any, torch.func.vjp(of_chosen, *(leaves[i] for i in chosen)))
    result: list[Tensor | None] = [None] * len(leaves)
    for i, gradient in zip(chosen, pull(cotangent), strict=True):
        result[i] = gradient
    return result
