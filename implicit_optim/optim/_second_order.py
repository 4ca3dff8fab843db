"""What the optimizers share that differentiate a closure's loss twice: the anatomy of LBFGS."""

from __future__ import annotations

import abc
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._checks import check
from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._vectors import Layout
from implicit_optim.optim._curvature import Tensors, gauss_newton, gradient, hessian
from implicit_optim.optim._joint import Closure, Joint, Move, Trials, scalar, write


class SecondOrder(Joint, abc.ABC):
    """A rule that moves all parameters together by the curvature of the loss of a closure."""

    _settings: ClassVar[tuple[str, ...]] = ("curvature",)

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        curvature: type[Hessian] | type[GaussNewton],
    ) -> None:
        if curvature not in (Hessian, GaussNewton):
            raise TypeError(f"curvature must be Hessian or GaussNewton, got {curvature!r}")
        check("damping", defaults["damping"], "be finite and >= 0")
        self.curvature = curvature
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("damping", 0.0)

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
        name = type(self).__name__
        if closure is None:
            raise RuntimeError(f"{name} needs a closure that returns the loss: opt.step(closure)")
        params, layout = self._parameters()
        held = [p.grad for p in params]
        for p in params:
            p.grad = None

        def values(flat: Tensor) -> Tensor:
            write(params, layout, flat)
            return self._read(closure())[0]

        def grad_and_value(flat: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                loss = values(flat)
            return gradient(loss, params, layout), loss.detach()

        try:
            at = self._linearize(closure, params, layout)
            assert at.gradient is not None and at.value is not None
            propose = partial(self._propose, at=at, trials=Trials(values, grad_and_value))
            return self._move(params, layout, at.gradient, at.value, propose)
        except RuntimeError as error:
            if "second time" in str(error) or "not have a grad_fn" in str(error):
                raise RuntimeError(_BACKWARD.format(name)) from error
            raise
        finally:
            for p, grad in zip(params, held, strict=True):
                p.grad = grad

    @abc.abstractmethod
    def _propose(self, start: Tensor, at: Linearized, trials: Trials) -> Move:
        """The rule.

        Args:
            start: the parameters, flat.
            at: curvature, gradient and value there, all finite but perhaps the curvature.
            trials: what is minimised, of flat parameters.
        """

    def _linearize(self, closure: Closure, params: Tensors, layout: Layout) -> Linearized:
        """Curvature, gradient and value of what is minimised, at the parameters."""
        damping = self.param_groups[0]["damping"]
        with torch.enable_grad():
            loss, output = self._read(closure())
            if any(p.grad is not None for p in params):
                raise RuntimeError(_BACKWARD.format(type(self).__name__))
            if output is None:
                slope, product = hessian(loss, params, layout)
            else:
                slope, product = gauss_newton(loss, output, params, layout)
        mv = product if damping == 0 else lambda x: product(x) + damping * x
        return Linearized(mv, lambda r: r, slope.detach(), loss.detach())

    def _read(self, result: Any) -> tuple[Tensor, Tensor | None]:
        """What is minimised, 0-d, and the output, from what the closure returned."""
        loss, output = result, None
        if self.curvature is GaussNewton:
            if not (isinstance(result, tuple) and len(result) == 2 and torch.is_tensor(result[1])):
                raise TypeError("for GaussNewton the closure must return (loss, output), tensors")
            loss, output = result
        loss = scalar(loss)
        return -loss if self.param_groups[0]["maximize"] else loss, output


_BACKWARD = (
    "the closure called backward(): {} differentiates the loss itself, twice. Return the "
    "loss without calling backward(). Derivatives that are part of the loss it must take under "
    "torch.enable_grad()"
)
