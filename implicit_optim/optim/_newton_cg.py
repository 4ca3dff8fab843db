"""Newton-CG with a line search as a ``torch.optim`` class."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._linear_solver import CG, LinearSolver
from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._outcome import Status
from implicit_optim._search import Armijo, Line, Search
from implicit_optim._solver import newton_direction
from implicit_optim.optim._gd import check_tensor_lr
from implicit_optim.optim._joint import Move, Trials
from implicit_optim.optim._second_order import SecondOrder

_CG = CG(max_steps=5)
_ARMIJO = Armijo()


class NewtonCG(SecondOrder):
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
        self.linear_solver, self.line_search = linear_solver, line_search
        super().__init__(params, {"lr": lr, "damping": damping, "maximize": maximize}, curvature)

    def _propose(self, start: Tensor, at: Linearized, trials: Trials) -> Move:
        """Along Newton's direction, as far as the line search says."""
        assert at.gradient is not None and at.value is not None
        lr = self.param_groups[0]["lr"]
        direction, slope, status = newton_direction(at, at.gradient, self.linear_solver)
        direction, slope = lr * direction, lr * slope
        line = Line.of(trials, start, direction)
        t, found = self.line_search.search(line, at.value, slope)
        if not found:
            return Move(None, 0.0, Status.LINE_SEARCH)
        return Move(start + t * direction, float(lr * t), Status(int(status)))
