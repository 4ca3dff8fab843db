"""Query losses with their gradients, chunk by chunk: one graph in memory instead of all of them."""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._evaluation.autograd import check_closed, split_grads
from implicit_optim._evaluation.batching import pick
from implicit_optim._evaluation.derivative import gradient, is_composed, no_checkpoints
from implicit_optim._evaluation.evaluator import Evaluator
from implicit_optim._evaluation.replaced import noting_leaves
from implicit_optim._torch import pytree

OfTask = Callable[..., Any]  # (phi, *data) -> pytree of tensors, of one task


def of_tasks(one: OfTask, phi: Any, data: tuple[Any, ...], evaluator: Evaluator) -> Any:
    """``one(phi, *data)`` of every task, ``[T, ...]``."""
    with no_checkpoints():
        return evaluator.map(lambda phi, _, *data: one(phi, *data), phi, None, data)


def query_losses(
    loss: OfTask, phi: Any, data: tuple[Any, ...], evaluator: Evaluator
) -> Float[Tensor, " T"]:
    """Loss of every task at its adapted parameters, to be differentiated later.

    If the tasks are evaluated in chunks, each chunk's gradient is computed together with its losses,
    which frees the chunk's graph and lets threads share the work. Otherwise, or if the data require
    grad, autograd records everything.

    Args:
        loss: of one task, a scalar.
        phi: pytree of tensors ``[T, ...]``.
        data: pytrees of tensors ``[T, ...]``.
        evaluator: how the tasks are evaluated.

    Returns:
        The losses, differentiable as often as one likes.

    Raises:
        Foreign: something else than phi and the data wants a gradient.
    """
    leaves, spec = pytree.tree_flatten(phi)
    if is_composed() or not torch.is_grad_enabled():
        return of_tasks(loss, phi, data, evaluator)
    wanted = [t for t in pytree.tree_leaves(data) if isinstance(t, Tensor) and t.requires_grad]
    adapted = any(leaf.requires_grad for leaf in leaves)
    if adapted and not wanted and len(evaluator.batching.chunks(len(leaves[0]))) > 1:
        return _Eager.apply(loss, data, evaluator, spec, *leaves)[0]
    with noting_leaves() as made:
        result: Tensor = of_tasks(loss, phi, data, evaluator)
        check_closed([result], [*leaves, *wanted, *made])
    return result


class _Eager(torch.autograd.Function):
    """``(loss, data, evaluator, spec, *leaves of phi) -> (losses at phi, *their slopes)``."""

    @staticmethod
    def forward(
        loss: OfTask, data: tuple[Any, ...], evaluator: Evaluator, spec: Any, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        def part(chunk: slice) -> tuple[Tensor, ...]:
            own = pytree.tree_unflatten([leaf[chunk] for leaf in leaves], spec)
            args = (pick(data, chunk), evaluator.part(chunk))
            slopes, values = gradient(lambda phi: of_tasks(loss, phi, *args), own, ends=())
            return values, *pytree.tree_leaves(slopes)

        parts = evaluator.batching.run(part, len(leaves[0]))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *ctx.asked, ctx.spec = inputs[:4]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[4:], *output[1:])

    @staticmethod
    def backward(ctx: Any, along: Tensor | None, *_: Any) -> Any:
        count, needed = len(ctx.saved_tensors) // 2, ctx.needs_input_grad[4:]
        leaves, slopes = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if along is None:
            return (None,) * (4 + count)
        if torch.is_grad_enabled():
            loss, *args = ctx.asked

            def losses(leaves: list[Tensor]) -> Tensor:
                return cast(Tensor, of_tasks(loss, pytree.tree_unflatten(leaves, ctx.spec), *args))

            return *(None,) * 4, *split_grads(losses, leaves, needed, along)
        each = zip(slopes, needed, strict=True)
        columns = (along.reshape(-1, *[1] * (s.ndim - 1)) * s if need else None for s, need in each)
        return *(None,) * 4, *columns
