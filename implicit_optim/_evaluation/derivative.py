"""Derivatives of a sum over tasks: by plain autograd where nothing is composed, else by torch.func.

``torch.func`` composes with everything, but it wraps every operation again, which for a small network
costs as much as the operation itself. Inside a solve there is nothing to compose with.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from implicit_optim._evaluation.autograd import check_closed, foreign
from implicit_optim._evaluation.replaced import (
    along_cotangents,
    noting_leaves,
    recording,
    written_out,
)
from implicit_optim._torch import in_forward_mode, in_transform, pytree

# A gradient, its Hessian's product, and the values.
Expansion = tuple[Any, Callable[[Any], Any], Tensor]


def is_composed() -> bool:
    """Whether a transform, forward mode or a compiler is active, so that plain autograd will not do."""
    return torch.compiler.is_compiling() or in_transform() or in_forward_mode()


def _alone() -> bool:
    """Whether nobody records or transforms what is computed."""
    if is_composed():  # first: a compiler does not take the other questions
        return False
    return not (torch.is_grad_enabled() or torch.is_inference_mode_enabled())


@contextlib.contextmanager
def _recording(derivatives: int) -> Iterator[None]:
    """Record a graph of which so many derivatives will be taken."""
    with torch.enable_grad(), no_checkpoints(), recording(derivatives):
        yield


def no_checkpoints() -> contextlib.AbstractContextManager[None]:
    """Refuse activation checkpointing, as torch.func does: its second pass misses the replacements."""
    if is_composed():
        return contextlib.nullcontext()
    refusal = "torch.func transforms do not yet support saved tensor hooks"
    return torch.autograd.graph.disable_saved_tensors_hooks(refusal)


Ends = Sequence[Any] | None


def gradient(values: Callable[[Any], Tensor], x: Any, *, ends: Ends = None) -> tuple[Any, Tensor]:
    """Gradient of ``values(x).sum()``, and the values.

    Args:
        values: of a tensor or a pytree, ``[*batch]``.
        x: tensor or pytree of tensors.
        ends: where else the graph of the values may end; a tensor that requires grad and is not among
            them is an error, see `check_closed`. Default: no check.

    Returns:
        The gradient, like x, and the values ``[*batch]``.
    """
    if is_composed() or torch.is_inference_mode_enabled():
        return torch.func.grad(_sum_and_values(values), has_aux=True)(x)
    leaves, spec = pytree.tree_flatten(x)
    record = torch.is_grad_enabled()
    # Differentiate with respect to an alias: the values may also depend on what x was made from.
    leaves = [leaf.view_as(leaf) if record else leaf.detach() for leaf in leaves]
    fresh = [leaf.requires_grad_() for leaf in leaves if not leaf.requires_grad]

    def attempt() -> tuple[Any, Tensor]:
        each = _checked(lambda: values(pytree.tree_unflatten(leaves, spec)), leaves, ends)
        slopes = _grad([each], leaves, create_graph=record)
        if not record or (len(fresh) == len(leaves) and foreign([*slopes, each], leaves) is None):
            slopes, each = [slope.detach() for slope in slopes], each.detach()
        return pytree.tree_unflatten(slopes, spec), each

    with no_checkpoints() if record else _recording(1):
        try:
            return attempt()
        except RuntimeError as error:
            # torch's batch norm in a model that itself takes two derivatives.
            if "3rd+ order" not in str(error):
                raise
        with written_out():
            return attempt()


def second_order(values: Callable[[Any], Tensor], x: Any, *, ends: Ends = None) -> Expansion:
    """Gradient of ``values(x).sum()``, its Hessian's product with a kept graph, and the values.

    Args:
        values: of a pytree, ``[*batch]``.
        x: pytree of tensors.
        ends: see `gradient`.

    Returns:
        The gradient, like x; the product, from and to pytrees like x; the values ``[*batch]``.
    """
    if not _alone():
        first = torch.func.grad(_sum_and_values(values), has_aux=True)
        slope, pull, each = cast(Any, torch.func.vjp(first, x, has_aux=True))
        return slope, lambda direction: pull(direction)[0], each
    leaves, spec = pytree.tree_flatten(x)
    with _recording(2):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        each = _checked(lambda: values(pytree.tree_unflatten(leaves, spec)), leaves, ends)
        slopes = _grad([each], leaves, create_graph=True)

    def product(direction: Any) -> Any:
        along = pytree.tree_leaves(direction)
        return pytree.tree_unflatten(_grad(slopes, leaves, along, retain_graph=True), spec)

    return pytree.tree_unflatten([s.detach() for s in slopes], spec), product, each.detach()


def vjp(
    fn: Callable[[Any], Any], x: Any, *, transpose: bool = False, ends: Ends = None
) -> tuple[Any, Callable[[Any], Any]]:
    """``fn(x)`` and its vector-Jacobian product with a kept graph, itself differentiable.

    Args:
        fn: from a pytree of tensors to one.
        x: the point.
        transpose: whether fn is itself a vector-Jacobian product, so that only gradients with respect to
            its cotangent are computed.
        ends: see `gradient`.

    Returns:
        The value, and the function from cotangents like the value to a pytree like x.
    """
    if not _alone():
        out, pull = cast(Any, torch.func.vjp(fn, x))
        return out, lambda cotangent: pull(cotangent)[0]
    leaves, spec = pytree.tree_flatten(x)
    with _recording(2):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        result = _checked(lambda: fn(pytree.tree_unflatten(leaves, spec)), leaves, ends)
        out, out_spec = pytree.tree_flatten(result)

    def back(cotangent: Any) -> Any:
        of = pytree.tree_leaves(cotangent)
        again = torch.is_grad_enabled()
        with along_cotangents() if transpose else contextlib.nullcontext():
            pulled = _grad(out, leaves, of, retain_graph=True, create_graph=again)
        return pytree.tree_unflatten(pulled, spec)

    return pytree.tree_unflatten([o.detach() for o in out], out_spec), back


def _checked(evaluate: Callable[[], Any], leaves: list[Tensor], ends: Ends) -> Any:
    """The result, whose graph ends at the leaves and at ``ends`` alone."""
    if ends is None:
        return evaluate()
    with noting_leaves() as made:
        result = evaluate()
        check_closed(pytree.tree_leaves(result), [*leaves, *ends, *made])
    return result


def _sum_and_values(values: Callable[[Any], Tensor]) -> Callable[[Any], tuple[Tensor, Tensor]]:
    def total(x: Any) -> tuple[Tensor, Tensor]:
        each = values(x)
        return each.sum(), each

    return total


def _grad(
    outputs: list[Tensor], inputs: list[Tensor], along: list[Tensor] | None = None, **settings: bool
) -> list[Tensor]:
    """``torch.autograd.grad``; an output that depends on nothing has gradient zero."""
    along = [torch.ones_like(o) for o in outputs] if along is None else along
    used = [(o, a) for o, a in zip(outputs, along, strict=True) if o.requires_grad]
    if not used:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outs, cotangents = zip(*used, strict=True)
    return list(torch.autograd.grad(outs, inputs, cotangents, materialize_grads=True, **settings))
