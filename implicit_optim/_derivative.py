"""Derivatives of a sum over tasks: by plain autograd where nobody else differentiates, else torch.func.

``torch.func`` composes with everything but wraps every operation once more, which costs a small network
as much as the operation itself. Inside a solve there is nothing to compose with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from implicit_optim._ambient import twice_differentiable
from implicit_optim._layers import along_cotangents, recording

# A gradient, its Hessian's product, and the values.
SecondOrder = tuple[Any, Callable[[Any], Any], Tensor]


def is_composed() -> bool:
    """Whether a transform, dual numbers or a compiler would see what is computed."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _alone() -> bool:
    """Whether not even a graph would see it."""
    if is_composed():  # first: a compiler does not take the other questions
        return False
    return not (torch.is_grad_enabled() or torch.is_inference_mode_enabled())


@contextlib.contextmanager
def _recording(derivatives: int) -> Iterator[None]:
    """Record a graph for so many derivatives; activation checkpointing is refused, as by torch.func."""
    refusal = "torch.func transforms do not yet support saved tensor hooks"
    hooks = torch.autograd.graph.disable_saved_tensors_hooks(refusal)
    with torch.enable_grad(), hooks, recording(derivatives):
        yield


def gradient(values: Callable[[Any], Tensor], x: Any) -> tuple[Any, Tensor]:
    """Gradient of ``values(x).sum()``, and the values.

    Args:
        values: of a tensor or a pytree, ``[*batch]``.
        x: tensor or pytree of tensors.

    Returns:
        The gradient, like x, and the values ``[*batch]``.
    """
    if not _alone():
        return torch.func.grad(_sum_and_values(values), has_aux=True)(x)
    with _recording(1):
        leaves, spec = pytree.tree_flatten(x)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        each = values(pytree.tree_unflatten(leaves, spec))
        return pytree.tree_unflatten(_grad([each], leaves), spec), each.detach()


def second_order(values: Callable[[Any], Tensor], x: Any) -> SecondOrder:
    """Gradient of ``values(x).sum()``, its Hessian's product with a kept graph, and the values.

    Args:
        values: of a pytree, ``[*batch]``.
        x: pytree of tensors.

    Returns:
        The gradient, like x; the product, from and to pytrees like x; the values ``[*batch]``.
    """
    if not _alone():
        first = torch.func.grad(_sum_and_values(values), has_aux=True)
        with twice_differentiable():
            slope, pull, each = cast(Any, torch.func.vjp(first, x, has_aux=True))
        return slope, lambda direction: pull(direction)[0], each
    leaves, spec = pytree.tree_flatten(x)
    with _recording(2), twice_differentiable():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        each = values(pytree.tree_unflatten(leaves, spec))
        slopes = _grad([each], leaves, create_graph=True)

    def product(direction: Any) -> Any:
        along = pytree.tree_leaves(direction)
        return pytree.tree_unflatten(_grad(slopes, leaves, along, retain_graph=True), spec)

    return pytree.tree_unflatten([s.detach() for s in slopes], spec), product, each.detach()


def vjp(
    fn: Callable[[Any], Any], x: Any, *, transpose: bool = False
) -> tuple[Any, Callable[[Any], Any]]:
    """``fn(x)`` and its vector-Jacobian product with a kept graph, itself differentiable.

    Args:
        fn: from a pytree of tensors to one.
        x: the point.
        transpose: whether fn is itself such a product, which is linear: of the kept graph only what
            depends on its cotangent is gone through.

    Returns:
        The value, and the function from cotangents like the value to a pytree like x.
    """
    if not _alone():
        with twice_differentiable():
            out, pull = cast(Any, torch.func.vjp(fn, x))
        return out, lambda cotangent: pull(cotangent)[0]
    leaves, spec = pytree.tree_flatten(x)
    with _recording(2), twice_differentiable():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out, out_spec = pytree.tree_flatten(fn(pytree.tree_unflatten(leaves, spec)))

    def back(cotangent: Any) -> Any:
        of = pytree.tree_leaves(cotangent)
        again = torch.is_grad_enabled()
        with along_cotangents() if transpose else contextlib.nullcontext():
            pulled = _grad(out, leaves, of, retain_graph=True, create_graph=again)
        return pytree.tree_unflatten(pulled, spec)

    return pytree.tree_unflatten([o.detach() for o in out], out_spec), back


def _sum_and_values(values: Callable[[Any], Tensor]) -> Callable[[Any], tuple[Tensor, Tensor]]:
    def total(x: Any) -> tuple[Tensor, Tensor]:
        each = values(x)
        return each.sum(), each

    return total


def _grad(
    outputs: list[Tensor], inputs: list[Tensor], along: list[Tensor] | None = None, **settings: bool
) -> list[Tensor]:
    """``torch.autograd.grad`` for which an output that depends on nothing has a zero gradient."""
    along = [torch.ones_like(o) for o in outputs] if along is None else along
    used = [(o, a) for o, a in zip(outputs, along, strict=True) if o.requires_grad]
    if not used:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outs, cotangents = zip(*used, strict=True)
    return list(torch.autograd.grad(outs, inputs, cotangents, materialize_grads=True, **settings))
