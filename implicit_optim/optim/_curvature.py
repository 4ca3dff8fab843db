"""What is common to the optimizers that use the curvature of a closure's loss, from its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._solver import Evaluation
from implicit_optim.optim._joint import Closure, ClosureLoss, Joint

Tensors = list[Tensor]
Matvec = Callable[[Tensor], Tensor]

_NO_GRAPH = (
    "no graph leads from the loss to the parameters, or for GaussNewton to the output: compute the "
    "loss, from the very output returned with it, without torch.no_grad(), .detach() or .item()"
)
_BACKWARD = (
    "the closure called backward(): {} differentiates the loss itself, twice. Return the "
    "loss without calling backward(). If the loss contains derivatives, compute them under "
    "torch.enable_grad()"
)


def pull(of: Tensor, at: Tensors, cotangent: Tensor | None = None, graph: bool = False) -> Tensors:
    """Vector-Jacobian product, zero where ``of`` does not depend on ``at``; keeps the graph.

    Unlike the products of `_evaluation` it differentiates a graph that somebody else has recorded.
    """
    how = dict(retain_graph=True, create_graph=graph, allow_unused=True)
    grads: Any = [None] * len(at)
    if of.requires_grad:
        grads = torch.autograd.grad(of, at, cotangent, **how)
    if cotangent is None and all(g is None for g in grads):
        raise RuntimeError(_NO_GRAPH)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(at, grads, strict=True)]


class GraphLoss(ClosureLoss):
    """The loss of a closure that leaves its derivatives to the optimizer; perhaps with an output."""

    needs = "returns the loss"
    optimizer: ClosureCurvature

    def gradient(self) -> tuple[Tensor, Tensor]:
        """See `ClosureLoss.gradient`."""
        with torch.enable_grad():
            loss, _ = self._read()
        return self._pulled(loss), loss.detach()

    def values(self, phi: Tensor, /) -> Tensor:
        """See `ClosureLoss.values`."""
        self.write(phi)
        return self._read()[0]

    def evaluate(self) -> Evaluation:
        """See `ClosureLoss.evaluate`; from one call of the closure."""
        with torch.enable_grad():
            loss, output = self._read()
            if any(p.grad is not None for p in self.params):
                raise RuntimeError(_BACKWARD.format(type(self.optimizer).__name__))
            grad, product = self._products(loss, output)
        damping, grad, value = self.options["damping"], grad.detach(), loss.detach()
        mv = product if damping == 0 else lambda x: product(x) + damping * x
        return Evaluation(value, grad, Linearized(mv, lambda r: r, grad, value))

    def _read(self) -> tuple[Tensor, Tensor | None]:
        """The loss and, for Gauss-Newton, the output, from one call of the closure."""
        loss, output = self.closure(), None
        if self.optimizer.curvature is GaussNewton:
            if not (isinstance(loss, tuple) and len(loss) == 2 and torch.is_tensor(loss[1])):
                raise TypeError("for GaussNewton the closure must return (loss, output), tensors")
            loss, output = loss
        return self.signed(loss), output

    def _pulled(self, of: Tensor, cotangent: Tensor | None = None, graph: bool = False) -> Tensor:
        """`pull` to the parameters, flat."""
        return self.layout.ravel(pull(of, self.params, cotangent, graph))

    def _products(self, loss: Tensor, output: Tensor | None) -> tuple[Tensor, Matvec]:
        """Gradient, and products with the Hessian or, given an output, with ``J^T H_out J``.

        Products with the Hessian pull back through the graph of the gradient. Products with J pull back
        through ``J^T``, which is linear in its cotangent (double vjp).
        """
        grad = self._pulled(loss, graph=output is None)
        if output is None:
            return grad, lambda x: self._pulled(grad, x)
        if not output.requires_grad:
            raise RuntimeError(_NO_GRAPH)
        (slope,) = pull(loss, [output], graph=True)
        cotangent = torch.zeros_like(output, requires_grad=True)
        transpose = self._pulled(output, cotangent, graph=True)

        def product(x: Tensor) -> Tensor:
            (push,) = pull(transpose, [cotangent], x)
            (bent,) = pull(slope, [output], push)
            return self._pulled(output, bent)

        return grad, product


class ClosureCurvature(Joint):
    """A rule that moves all parameters together by the curvature of the loss of a closure."""

    _settings: ClassVar[tuple[str, ...]] = ("curvature",)
    _must = dict(damping="be finite and >= 0")
    _later = dict(maximize=False, damping=0.0)

    def __init__(
        self, params: ParamsT, options: dict[str, Any], curvature: type[Hessian] | type[GaussNewton]
    ) -> None:
        if curvature not in (Hessian, GaussNewton):
            raise TypeError(f"curvature must be Hessian or GaussNewton, got {curvature!r}")
        self.curvature = curvature
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: returns the loss, for Gauss-Newton ``(loss, output)``, without ``backward()``.

        Returns:
            The loss at the start of the step, a scalar without a graph.

        Raises:
            RuntimeError: there is no closure, it called ``backward()``, or what it returned has no
                graph that leads to the parameters.
            TypeError: it returned something else than a scalar tensor.
            ValueError: the parameters differ in dtype or device.
        """
        loss = GraphLoss(self, closure)
        grads = [p.grad for p in loss.params]
        for p in loss.params:
            p.grad = None  # so that a backward() in the closure is noticed
        try:
            return self._take_step(loss)
        except RuntimeError as error:
            if "second time" in str(error) or "not have a grad_fn" in str(error):
                raise RuntimeError(_BACKWARD.format(type(self).__name__)) from error
            raise
        finally:
            for p, grad in zip(loss.params, grads, strict=True):
                p.grad = grad
