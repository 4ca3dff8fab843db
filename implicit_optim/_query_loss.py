"""Query losses whose gradient is taken with them: one graph at a time instead of all tasks' at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from implicit_optim._ambient import Ambient
from implicit_optim._autograd import check_closed, split_grads
from implicit_optim._batch import Batching, pick
from implicit_optim._derivative import gradient, is_composed, no_checkpoints
from implicit_optim._replaced import noting_leaves, replaced


def query_losses(losses: OfTasks, phi: Any) -> Float[Tensor, " T"]:
    """Loss of every task at adapted parameters, of which the gradient will be asked for.

    Where the tasks are gone through in chunks, the gradient of a chunk is taken with its losses: the
    next one finds its memory free, and chunks that are solved in threads are differentiated in threads.
    Elsewhere, and where the data want a gradient, autograd records all.

    Args:
        losses: of every task, ``[T]``.
        phi: pytree of tensors ``[T, ...]``.

    Returns:
        The losses, differentiable as often as one likes.

    Raises:
        Foreign: something else than phi and the data wants a gradient.
    """
    leaves, spec = pytree.tree_flatten(phi)
    data = [t for t in pytree.tree_leaves(losses.data) if isinstance(t, Tensor) and t.requires_grad]
    wanted = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    if is_composed() or not torch.is_grad_enabled():
        return losses(phi)
    if wanted and not data and len(losses.batching.chunks(len(leaves[0]))) > 1:
        return _Eager.apply(losses, spec, *leaves)[0]
    with noting_leaves() as made:
        result: Tensor = losses(phi)
        check_closed([result], [*leaves, *data, *made])
    return result


@dataclass(frozen=True)
class OfTasks:
    """A function of one task's phi and data, as a function of all tasks' phi.

    Attributes:
        one: ``(phi, *data) -> pytree of tensors``.
        data: pytrees of tensors ``[T, ...]``.
        ambient: precision and random numbers.
        batching: how the tasks are evaluated.
        first: place of the first task in the batch that this one is a part of.
    """

    one: Callable[..., Any]
    data: tuple[Any, ...]
    ambient: Ambient
    batching: Batching
    first: int = 0

    def __call__(self, phi: Any) -> Any:
        """Its values, ``[T, ...]``."""
        one = lambda phi, _, *data: replaced(self.one, phi, *data)  # noqa: E731
        args = (phi, None, self.data, (True,), self.batching)
        with no_checkpoints():
            return self.ambient.over_tasks(one, *args, start=self.first)

    def part(self, chunk: slice) -> OfTasks:
        """The same function of a chunk of the tasks."""
        data, batching = pick(self.data, chunk), self.batching.within
        return replace(self, data=data, batching=batching, first=chunk.start)


class _Eager(torch.autograd.Function):
    """``(losses, spec, *leaves of phi) -> (losses at phi, *their slopes)``."""

    @staticmethod
    def forward(losses: OfTasks, spec: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
        def part(chunk: slice) -> tuple[Tensor, ...]:
            own = pytree.tree_unflatten([leaf[chunk] for leaf in leaves], spec)
            # The data are cut where a graph is recorded: it tells whether they want a gradient.
            slopes, values = gradient(losses.part(chunk), own, known=())
            return values, *pytree.tree_leaves(slopes)

        parts = losses.batching.run(part, len(leaves[0]))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.losses, ctx.spec, *leaves = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*leaves, *output[1:])

    @staticmethod
    def backward(ctx: Any, along: Tensor | None, *_: Any) -> Any:
        count, needed = len(ctx.saved_tensors) // 2, ctx.needs_input_grad[2:]
        leaves, slopes = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if along is None:
            return (None,) * (2 + count)
        if torch.is_grad_enabled():
            losses = lambda leaves: ctx.losses(pytree.tree_unflatten(leaves, ctx.spec))  # noqa: E731
            return None, None, *split_grads(losses, leaves, needed, along)
        each = zip(slopes, needed, strict=True)
        columns = (along.reshape(-1, *[1] * (s.ndim - 1)) * s if need else None for s, need in each)
        return None, None, *columns
