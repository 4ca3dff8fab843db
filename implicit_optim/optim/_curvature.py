"""Products with the curvature of a loss that a closure returned, from its autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_optim._vectors import Layout

Tensors = list[Tensor]
Product = Callable[[Tensor], Tensor]

_NO_GRAPH = (
    "no graph leads from the loss to the parameters, or for GaussNewton to the output: compute the "
    "loss, from the very output returned with it, without torch.no_grad(), .detach() or .item()"
)


def _pull(of: Tensor, at: Tensors, cotangent: Any = None, graph: bool = False) -> Tensors:
    """Vector-Jacobian product, zero where ``of`` does not depend on ``at``; its graph is kept."""
    grads: tuple[Tensor | None, ...] = (None,) * len(at)
    if of.requires_grad:
        grads = torch.autograd.grad(
            of, at, cotangent, retain_graph=True, create_graph=graph, allow_unused=True
        )
    if cotangent is None and all(g is None for g in grads):
        raise RuntimeError(_NO_GRAPH)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(at, grads, strict=True)]


def gradient(loss: Tensor, params: Tensors, layout: Layout) -> Tensor:
    """The gradient alone, flat."""
    return layout.ravel(_pull(loss, params))


def hessian(loss: Tensor, params: Tensors, layout: Layout) -> tuple[Tensor, Product]:
    """Gradient, and products by one pull-back through its graph."""
    slope = layout.ravel(_pull(loss, params, graph=True))
    return slope, lambda x: layout.ravel(_pull(slope, params, x))


def gauss_newton(
    loss: Tensor, output: Tensor, params: Tensors, layout: Layout
) -> tuple[Tensor, Product]:
    """Gradient, and products ``J^T H_out J``; J is the transpose of a transpose (double vjp)."""
    at = gradient(loss, params, layout)
    if not output.requires_grad:
        raise RuntimeError(_NO_GRAPH)
    (slope,) = _pull(loss, [output], graph=True)
    cotangent = torch.zeros_like(output, requires_grad=True)
    transpose = layout.ravel(_pull(output, params, cotangent, graph=True))

    def product(x: Tensor) -> Tensor:
        (push,) = _pull(transpose, [cotangent], x)
        (bent,) = _pull(slope, [output], push)
        return layout.ravel(_pull(output, params, bent))

    return at, product
