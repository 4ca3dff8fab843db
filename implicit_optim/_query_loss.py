"""Query losses whose gradient is taken with them: one graph at a time instead of all tasks' at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from implicit_optim._ambient import Ambient
from implicit_optim._batch import WHOLE, Batching, pick
from implicit_optim._derivative import gradient, is_composed


def query_losses(
    loss: Callable[..., Tensor],
    phi: Any,
    data: tuple[Any, ...],
    seed: int | None,
    batching: Batching,
) -> Float[Tensor, " T"]:
    """Loss of every task at adapted parameters, of which the gradient will be asked for.

    Where the tasks are gone through in chunks, the gradient of a chunk is taken with its losses: the
    next one finds its memory free, and chunks that are solved in threads are differentiated in threads.
    Elsewhere, and where a loss depends on something else that wants a gradient, autograd records all.

    Args:
        loss: ``(phi, *data) -> scalar`` of one task.
        phi: pytree of tensors ``[T, ...]``.
        data: pytrees of tensors ``[T, ...]``.
        seed: of the random numbers that a loss draws, or ``None`` if it may draw none.
        batching: the chunks.

    Returns:
        The losses, differentiable as often as one likes.
    """
    leaves, spec = pytree.tree_flatten(phi)
    losses = _Losses(loss, data, Ambient.now(leaves[0].device, seed), batching)
    wanted = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    if batching != WHOLE and wanted and not is_composed():
        try:
            return _Eager.apply(losses, spec, *leaves)[0]
        except _Foreign:
            pass
    return losses(phi)


@dataclass(frozen=True)
class _Losses:
    """The losses of a batch of tasks as a function of phi."""

    loss: Callable[..., Tensor]
    data: tuple[Any, ...]
    ambient: Ambient
    batching: Batching
    first: int = 0

    def __call__(self, phi: Any) -> Tensor:
        def one(phi: Any, _: None, *data: Any) -> Tensor:
            return self.loss(phi, *data)

        args = (phi, None, self.data, (True,), self.batching)
        losses: Tensor = self.ambient.over_tasks(one, *args, start=self.first)
        return losses

    def part(self, chunk: slice) -> _Losses:
        inner = self.batching if self.batching.loops else WHOLE
        return _Losses(self.loss, pick(self.data, chunk), self.ambient, inner, chunk.start)


class _Eager(torch.autograd.Function):
    """``(losses, spec, *leaves of phi) -> (losses at phi, *their slopes)``."""

    @staticmethod
    def forward(losses: _Losses, spec: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
        def part(chunk: slice) -> tuple[Tensor, ...]:
            own = pytree.tree_unflatten([leaf[chunk] for leaf in leaves], spec)
            # The data are cut where a graph is recorded: it tells whether they want a gradient.
            slopes, values = gradient(_of_phi_alone(lambda phi: losses.part(chunk)(phi)), own)
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
    def backward(ctx: Any, along: Tensor, *_: Any) -> Any:
        count = len(ctx.saved_tensors) // 2
        leaves, slopes = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():
            values = ctx.losses(pytree.tree_unflatten(leaves, ctx.spec))
            chosen = [leaf for leaf in leaves if leaf.requires_grad]
            pulled = iter(torch.autograd.grad(values, chosen, along, create_graph=True))
            return None, None, *(next(pulled) if leaf.requires_grad else None for leaf in leaves)
        each = (along.reshape(-1, *[1] * (slope.ndim - 1)) * slope for slope in slopes)
        return None, None, *each


class _Foreign(Exception):
    """Something else than phi wants a gradient of a loss."""


def _of_phi_alone(losses: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The same function, which raises `_Foreign` if its graph ends elsewhere than at its argument."""

    def values(phi: Any) -> Tensor:
        result, own = losses(phi), {id(leaf) for leaf in pytree.tree_leaves(phi)}
        ahead, seen = [result.grad_fn], set()
        while ahead:
            node: Any = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable") and id(node.variable) not in own:
                raise _Foreign
            ahead.extend(before for before, _ in node.next_functions)
        return result

    return values
