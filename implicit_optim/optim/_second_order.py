"""What the optimizers share that differentiate a closure's loss twice: the anatomy of LBFGS."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._flat import Layout
from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._solution import Status
from implicit_optim.optim._curvature import Tensors, gauss_newton, gradient, hessian
from implicit_optim.optim._joint import Closure, Joint, write

Value = Callable[[Tensor], Tensor]
GradAndValue = Callable[[Tensor], tuple[Tensor, Tensor]]


class Move(NamedTuple):
    """What a rule proposes: where to go (``None``: stay), how far that is, and how it went."""

    end: Tensor | None
    length: float
    status: Status


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
        damping = defaults["damping"]
        if not 0 <= damping < math.inf:
            raise ValueError(f"Invalid damping: {damping}: it must be finite and >= 0")
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
        group = self.param_groups[0]
        params, layout = self._parameters()
        held = [p.grad for p in params]
        for p in params:
            p.grad = None
        length, status = 0.0, Status.NONFINITE
        more: dict[str, float] = {}
        try:
            at = self._linearize(closure, params, layout)
            assert at.gradient is not None and at.value is not None
            grad_norm = float(torch.linalg.vector_norm(at.gradient))
            if math.isfinite(grad_norm) and bool(at.value.isfinite()):
                length, status, more = self._move(closure, params, layout, at)
        except RuntimeError as error:
            if "second time" in str(error) or "not have a grad_fn" in str(error):
                raise RuntimeError(_BACKWARD.format(name)) from error
            raise
        finally:
            for p, grad in zip(params, held, strict=True):
                p.grad = grad

        self._tell(grad_norm, length, status).update(more)
        return -at.value if group["maximize"] else at.value

    @abc.abstractmethod
    def _propose(
        self, start: Tensor, at: Linearized, value: Value, grad_and_value: GradAndValue
    ) -> tuple[Move, dict[str, float]]:
        """The rule.

        Args:
            start: the parameters, flat.
            at: curvature, gradient and value there, all finite but perhaps the curvature.
            value: what is minimised, of flat parameters.
            grad_and_value: its gradient too.

        Returns:
            The move, and what else goes into the state.
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

    def _move(
        self, closure: Closure, params: Tensors, layout: Layout, at: Linearized
    ) -> tuple[float, Status, dict[str, float]]:
        """Move the parameters to where the rule says, if that is finite."""
        start = layout.ravel(params).clone()
        end = start

        def value(flat: Tensor) -> Tensor:
            write(params, layout, flat)
            return self._read(closure())[0]

        def grad_and_value(flat: Tensor) -> tuple[Tensor, Tensor]:
            write(params, layout, flat)
            with torch.enable_grad():
                loss = self._read(closure())[0]
            return gradient(loss, params, layout), loss.detach()

        try:
            move, more = self._propose(start, at, value, grad_and_value)
            if move.end is None:
                return 0.0, move.status, more
            if not move.end.isfinite().all():
                return 0.0, Status.NONFINITE, more
            end = move.end
            return move.length, move.status, more
        finally:  # also where the closure raises: the parameters never stay at a trial point
            write(params, layout, end)

    def _read(self, result: Any) -> tuple[Tensor, Tensor | None]:
        """What is minimised, 0-d, and the output, from what the closure returned."""
        loss, output = result, None
        if self.curvature is GaussNewton:
            if not (isinstance(result, tuple) and len(result) == 2 and torch.is_tensor(result[1])):
                raise TypeError("for GaussNewton the closure must return (loss, output), tensors")
            loss, output = result
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            got = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
            raise TypeError(f"the closure must return the loss, a scalar tensor, got {got}")
        loss = loss.reshape(())
        return -loss if self.param_groups[0]["maximize"] else loss, output


_BACKWARD = (
    "the closure called backward(): {} differentiates the loss itself, twice. Return the "
    "loss without calling backward(). Derivatives that are part of the loss it must take under "
    "torch.enable_grad()"
)
