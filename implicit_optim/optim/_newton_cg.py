"""Newton-CG with a line search as a ``torch.optim`` class, with the anatomy of LBFGS."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._flat import Layout
from implicit_optim._linear_solver import CG, LinearSolver
from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._search import Armijo, Line, Search
from implicit_optim._solution import Status
from implicit_optim._solver._newton_cg import newton_direction
from implicit_optim.optim._curvature import Tensors, gauss_newton, gradient, hessian
from implicit_optim.optim._gd import check_tensor_lr
from implicit_optim.optim._joint import Closure, Joint, write

_CG = CG(max_steps=5)
_ARMIJO = Armijo()


class NewtonCG(Joint):
    """Newton's method with directions from conjugate gradients and a line search.

    ``d = -(A + damping I)^-1 grad`` by CG, ``params <- params + t d`` with t from the search. A is
    the Hessian or the Gauss-Newton matrix of the loss in all parameters together. On a quadratic
    one step with enough CG iterations reaches the minimiser.

    Unlike LBFGS's, the closure must **not** call ``backward()``: it returns the loss, of the same
    data each time it is called. It runs once with a graph, and once a trial of the search without
    (with one for ``StrongWolfe``, which asks for slopes).
    ``.grad`` is neither read nor changed. What happened is in ``state`` of the first parameter:

    - ``"n_iter"``: calls of ``step`` so far.
    - ``"grad_norm"``: norm of the gradient at the start of the step.
    - ``"step_length"``: lr times t; 0 where the parameters were left as they were.
    - ``"status"``: a [`Status`][implicit_optim.Status] code, also as the property ``status``.
      With a step length of 0, ``LINE_SEARCH`` or ``NONFINITE``: no step was possible. Else that of
      the linear solve for the direction, such as ``NEGATIVE_CURVATURE`` where CG stopped early.

    Args:
        params: parameters or named parameters, in a single group, of one dtype and device. Frozen
            ones are left out; those that the loss does not use stay where they are.
        lr: factor on the direction, > 0, hence on the first step tried; a float or a 0-d tensor. 1
            is Newton's. A scheduler may change it, also to 0.
        linear_solver: how to solve for the direction. Default: 5 steps of CG.
        line_search: how to choose t. Default: Armijo backtracking from 1.
        curvature: [`Hessian`][implicit_optim.Hessian], or
            [`GaussNewton`][implicit_optim.GaussNewton]: then the closure returns ``(loss, output)``
            and the matrix is ``J^T H_out J``: J of the output in the parameters, H_out of the loss
            in the output. A term of the loss that does not pass through the output, such as weight
            decay, is in the gradient and the search but not in the matrix: add it as ``damping``.
        damping: added to A's diagonal, >= 0, in units of the curvature.
        maximize: ascend instead: minimise minus the loss.

    Raises:
        TypeError: a parameter is complex, or a setting is of the wrong kind.
        ValueError: a setting is out of range, or there is more than one group.

    Examples:
        >>> import torch
        >>> x = torch.zeros(1, requires_grad=True)
        >>> opt = NewtonCG([x])
        >>> for _ in range(4):
        ...     loss = opt.step(lambda: (x.cosh() - x).sum())
        >>> round(x.item(), 4), opt.status.name  # asinh(1)
        (0.8814, 'SUCCESS')
        >>> opt.state[x]["n_iter"], opt.state[x]["step_length"]
        (4, 1.0)

    Source: Nocedal & Wright 2006, algorithm 7.1; Rajeswaran et al. 2019, section 4 (Hessian-free);
    Schraudolph 2002, section 3 (Gauss-Newton products).
    """

    _settings = ("linear_solver", "line_search", "curvature")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float | Tensor = 1.0,
        linear_solver: LinearSolver = _CG,
        line_search: Search = _ARMIJO,
        curvature: type[Hessian] | type[GaussNewton] = Hessian,
        damping: float = 0.0,
        maximize: bool = False,
    ) -> None:
        check_tensor_lr(lr)
        for value, kind in ((linear_solver, LinearSolver), (line_search, Search)):
            if not isinstance(value, kind):
                raise TypeError(f"expected a {kind.__name__} object, got {value!r}")
        if curvature not in (Hessian, GaussNewton):
            raise TypeError(f"curvature must be Hessian or GaussNewton, got {curvature!r}")
        if not 0 <= damping < math.inf:
            raise ValueError(f"Invalid damping: {damping}: it must be finite and >= 0")
        self.linear_solver, self.line_search = linear_solver, line_search
        self.curvature = curvature
        super().__init__(params, {"lr": lr, "damping": damping, "maximize": maximize})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("damping", 0.0)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one Newton step.

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
        if closure is None:
            raise RuntimeError("NewtonCG needs a closure that returns the loss: opt.step(closure)")
        group = self.param_groups[0]
        params, layout = self._parameters()
        held = [p.grad for p in params]
        for p in params:
            p.grad = None
        length, status = 0.0, Status.NONFINITE
        try:
            at = self._linearize(closure, params, layout)
            assert at.gradient is not None and at.value is not None
            grad_norm = float(torch.linalg.vector_norm(at.gradient))
            if math.isfinite(grad_norm) and bool(at.value.isfinite()):
                length, status = self._search(closure, params, layout, at)
        except RuntimeError as error:
            if "second time" in str(error) or "not have a grad_fn" in str(error):
                raise RuntimeError(_BACKWARD) from error
            raise
        finally:
            for p, grad in zip(params, held, strict=True):
                p.grad = grad

        self._tell(grad_norm, length, status)
        return -at.value if group["maximize"] else at.value

    def _linearize(self, closure: Closure, params: Tensors, layout: Layout) -> Linearized:
        """Curvature, gradient and value of what is minimised, at the parameters."""
        damping = self.param_groups[0]["damping"]
        with torch.enable_grad():
            loss, output = self._read(closure())
            if any(p.grad is not None for p in params):
                raise RuntimeError(_BACKWARD)
            if output is None:
                gradient, product = hessian(loss, params, layout)
            else:
                gradient, product = gauss_newton(loss, output, params, layout)
        mv = product if damping == 0 else lambda x: product(x) + damping * x
        return Linearized(mv, lambda r: r, gradient.detach(), loss.detach())

    def _search(
        self, closure: Closure, params: Tensors, layout: Layout, at: Linearized
    ) -> tuple[float, Status]:
        """Move the parameters along Newton's direction as far as the line search says."""
        assert at.gradient is not None and at.value is not None
        lr = self.param_groups[0]["lr"]
        direction, slope, status = newton_direction(at, at.gradient, self.linear_solver)
        direction, slope = lr * direction, lr * slope
        start = layout.ravel(params).clone()
        end = start

        def value(t: Tensor) -> Tensor:
            write(params, layout, start + t * direction)
            return self._read(closure())[0]

        def grad_and_value(t: Tensor) -> tuple[Tensor, Tensor]:
            write(params, layout, start + t * direction)
            with torch.enable_grad():
                loss = self._read(closure())[0]
            return gradient(loss, params, layout), loss.detach()

        try:
            line = Line(direction, value, grad_and_value)
            t, found = self.line_search.search(line, at.value, slope)
            proposal = start + t * direction
            if not found:
                return 0.0, Status.LINE_SEARCH
            if not proposal.isfinite().all():
                return 0.0, Status.NONFINITE
            end = proposal
            return float(lr * t), Status(int(status))
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
    "the closure called backward(): NewtonCG differentiates the loss itself, twice. Return the "
    "loss without calling backward(). Derivatives that are part of the loss it must take under "
    "torch.enable_grad()"
)
