"""Newton's method as ``torch.optim`` classes: with a line search, and in a trust region."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._linear_solver import CG, LinearSolver
from implicit_optim._operator import GaussNewton, Hessian
from implicit_optim._outcome import Status
from implicit_optim._search import Armijo, Search
from implicit_optim._solver import Evaluation, move, newton_direction, trust_region
from implicit_optim.optim._curvature import ClosureCurvature
from implicit_optim.optim._joint import ClosureLoss, Proposal

_CG = CG(max_steps=5)
_ARMIJO = Armijo()


class NewtonCG(ClosureCurvature):
    """Newton's method with directions from conjugate gradients and a line search.

    ``d = -(A + damping I)^-1 grad`` by CG, ``params <- params + t d`` with t from the search. A is
    the Hessian or the Gauss-Newton matrix of the loss in all parameters together. On a quadratic
    one step with enough CG iterations reaches the minimiser.

    Unlike that of LBFGS, the closure must **not** call ``backward()``: it returns the loss, of the
    same data in every call. It runs once with a graph, and once per trial of the search without (or
    with one for ``StrongWolfe``, which needs slopes). ``.grad`` is neither read nor changed. The
    ``state`` of the first parameter tells what happened:

    - ``"n_iter"``: calls of ``step`` so far.
    - ``"grad_norm"``: norm of the gradient at the start of the step.
    - ``"step_length"``: lr times t; 0 where the parameters were left as they were.
    - ``"status"``: a [`Status`][implicit_optim.Status] code, also as the property ``status``.
      With a step length of 0, ``NO_DESCENT`` or ``NONFINITE``: no step was possible. Otherwise that
      of the linear solve for the direction, such as ``NEGATIVE_CURVATURE`` where CG stopped early.

    Args:
        params: parameters or named parameters, in a single group, of one dtype and device. Frozen
            ones are left out; those that the loss does not use stay where they are.
        lr: factor on the direction, > 0, hence on the first step tried; a float or a 0-d tensor. 1
            is Newton's. A scheduler may change it, also to 0.
        linear_solver: solves for the direction. Default: 5 steps of CG.
        line_search: chooses t. Default: Armijo backtracking from 1.
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
    _must = dict(ClosureCurvature._must, lr="be finite and > 0")

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
        for value, kind in ((linear_solver, LinearSolver), (line_search, Search)):
            if not isinstance(value, kind):
                raise TypeError(f"expected a {kind.__name__} object, got {value!r}")
        self.linear_solver, self.line_search = linear_solver, line_search
        super().__init__(params, dict(lr=lr, damping=damping, maximize=maximize), curvature)

    def _propose(self, start: Tensor, at: Evaluation, loss: ClosureLoss) -> Proposal:
        """Along Newton's direction, as far as the line search says."""
        assert at.operator is not None
        lr = self.param_groups[0]["lr"]
        direction, slope, status = newton_direction(at.operator, at.grad, self.linear_solver)
        moved = move(loss, start, at, lr * direction, lr * slope, self.line_search)
        if not moved.found:
            return Proposal(None, 0.0, Status.NO_DESCENT)
        return Proposal(moved.end, float(lr * moved.length), Status(int(status)))


class TrustRegion(ClosureCurvature):
    """Newton's method in a trust region, for losses whose Hessian is indefinite.

    ``params <- params + p``, where p lowers the model ``grad . p + p.(A + damping I)p / 2`` in the
    ball ``||p|| <= radius``, by conjugate gradients that follow a direction of negative curvature to
    the boundary. The step is accepted if the loss falls by at least ``eta`` of what the model
    predicts; the radius grows and shrinks with the quality of the prediction.

    The closure is that of [`NewtonCG`][implicit_optim.NewtonCG]: it returns the loss, of the same
    data in every call, and does **not** call ``backward()``. It runs once with a graph and once
    without. ``.grad`` is neither read nor changed. There is no ``lr``, hence no learning-rate
    scheduler. The ``state`` of the first parameter tells what happened:

    - ``"n_iter"``: calls of ``step`` so far.
    - ``"grad_norm"``: norm of the gradient at the start of the step.
    - ``"step_length"``: norm of p; 0 if it was rejected and the parameters stayed as they were.
    - ``"radius"``: for the next step.
    - ``"status"``: a [`Status`][implicit_optim.Status] code, also as the property ``status``. A
      rejected step is a ``SUCCESS``; ``NO_DESCENT`` says that the radius is below rounding.

    Args:
        params: parameters or named parameters, in a single group, of one dtype and device. Frozen
            ones are left out; those that the loss does not use stay where they are.
        radius: at the start, > 0, in units of the parameters.
        max_radius: the radius never exceeds it.
        eta: least fraction of the predicted decrease, in [0, 1/4).
        cg_steps: most CG steps per step, one product each. Default: ``min(10 n, 1000)``. They end
            earlier at a residual of ``min(1/2, sqrt ||grad||) ||grad||``.
        curvature: [`Hessian`][implicit_optim.Hessian], or
            [`GaussNewton`][implicit_optim.GaussNewton]: then the closure returns ``(loss, output)``.
        damping: added to A's diagonal, >= 0, in units of the curvature.
        maximize: ascend instead: minimise minus the loss.

    Raises:
        TypeError: a parameter is complex, or a setting is of the wrong kind.
        ValueError: a setting is out of range, or there is more than one group.

    Examples:
        >>> import torch
        >>> x = torch.tensor([0.1], requires_grad=True)
        >>> opt = TrustRegion([x])
        >>> for _ in range(6):
        ...     loss = opt.step(lambda: (x**4 / 4 - x**2 / 2).sum())  # at 0.1 it curves down
        >>> round(x.item(), 4), opt.status.name, opt.state[x]["n_iter"]
        (1.0, 'SUCCESS', 6)

    Source: Nocedal & Wright 2006, algorithms 4.1 and 7.2; Steihaug 1983.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        radius: float = 1.0,
        max_radius: float = 1000.0,
        eta: float = 0.15,
        cg_steps: int | None = None,
        curvature: type[Hessian] | type[GaussNewton] = Hessian,
        damping: float = 0.0,
        maximize: bool = False,
    ) -> None:
        options = dict(radius=radius, max_radius=max_radius, eta=eta, cg_steps=cg_steps)
        super().__init__(params, dict(options, damping=damping, maximize=maximize), curvature)

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        self._rule(options)

    @staticmethod
    def _rule(options: dict[str, Any]) -> trust_region:
        return trust_region(**{k: options[k] for k in ("radius", "max_radius", "eta", "cg_steps")})

    def _propose(self, start: Tensor, at: Evaluation, loss: ClosureLoss) -> Proposal:
        """The rule of [`trust_region`][implicit_optim.trust_region]."""
        group = self.param_groups[0]
        radius = start.new_tensor(self._last_step().get("radius", group["radius"]))
        end, after, found = self._rule(group).step(loss, start, at, radius)
        if not end.isfinite().all():  # the curvature is not finite, and the radius means nothing
            return Proposal(None, 0.0, Status.NONFINITE, dict(radius=float(radius)))
        status = Status.SUCCESS if found else Status.NO_DESCENT
        length = float(torch.linalg.vector_norm(end - start))
        return Proposal(end, length, status, dict(radius=float(after)))
