"""Batches of tasks: how a function of one task is evaluated for all, masks and early exits."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Batching(enum.Enum):
    """How a function of one task is evaluated for a whole batch; the numbers are the same.

    Attributes:
        VMAP: one batched call, with ``torch.func.vmap``.
        LOOP: one call after the other, for operations that ``vmap`` does not know, such as ``nn.LSTM``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> problem = iopt.InnerProblem.bind(
        ...     lambda phi, theta: phi @ phi,
        ...     torch.ones(2, 3),
        ...     (),
        ...     batch_ndim=1,
        ...     batching=iopt.Batching.LOOP,
        ... )
        >>> problem.values(torch.ones(2, 3)).tolist()
        [3.0, 3.0]
    """

    VMAP = enum.auto()
    LOOP = enum.auto()


def over_tasks(
    one: Callable[..., Any],
    first: Any,
    theta: Any,
    data: tuple[Any, ...],
    shared: tuple[bool, ...],
    batching: Batching,
    *,
    random: bool = False,
) -> Any:
    """Evaluate ``one(first, theta, *data)`` for every task.

    Args:
        one: function of one task.
        first: pytree of tensors ``[*batch, ...]``.
        theta: pytree; a batch dimension is mapped where it is not shared.
        data: pytrees of tensors ``[*batch, ...]``.
        shared: one flag a batch dimension, outermost first: whether theta lacks it.
        batching: how.
        random: whether ``one`` may draw random numbers.

    Returns:
        A pytree of tensors ``[*batch, ...]``.
    """
    if not shared:
        return one(first, theta, *data)
    if batching is Batching.LOOP:
        results = []
        for i in range(_size(first)):
            own = theta if shared[0] else _pick(theta, i)
            args = (_pick(first, i), own, _pick(data, i), shared[1:], batching)
            results.append(over_tasks(one, *args))
        return pytree.tree_map(lambda *each: torch.stack(each), *results)
    for is_shared in reversed(shared):
        dims = (_dims(first), None if is_shared else _dims(theta), *_dims(data))
        one = torch.func.vmap(one, in_dims=dims, randomness="different" if random else "error")
    return one(first, theta, *data)


def _pick(tree: Any, i: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, tree)


def _dims(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tree)


def _size(tree: Any) -> int:
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


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
