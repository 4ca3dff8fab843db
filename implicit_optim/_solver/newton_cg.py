"""Newton-CG with a line search: the paper's Hessian-free solver."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int8
from torch import Tensor

from implicit_optim._linear_solver import CG, LinearSolver, safeguarded
from implicit_optim._operator import Linearized
from implicit_optim._problem import InnerProblem
from implicit_optim._search import Armijo, Scalars, Search, Vectors
from implicit_optim._solver.base import Evaluation, NewtonMethod, Searching, State, Step, move
from implicit_optim._vectors import dot


def newton_direction(
    operator: Linearized, grad: Vectors, linear_solver: LinearSolver
) -> tuple[Vectors, Scalars, Int8[Tensor, "*batch"]]:
    """Descent direction ``-A^-1 grad``, its slope ``grad . d`` and the solve's status, per task.

    Where it meets negative curvature the solver returns its last iterate. If that is no descent
    direction, the task takes the preconditioned gradient, and if neither is that, the plain one.

    Args:
        operator: curvature A, linearised at the iterate.
        grad: gradient ``[*batch, n]``.
        linear_solver: solves for the direction.

    Returns:
        Direction ``[*batch, n]``, slope ``[*batch]`` and the solve's status ``[*batch]``.
    """
    solution = linear_solver.solve(operator, -grad)
    if (fallback := operator.fallback) is not None:
        solution = safeguarded(solution, lambda: linear_solver.solve(fallback(), -grad))
    direction = solution.value
    for simpler in (operator.precondition(-grad), -grad):
        slope = dot(grad, direction)
        descends = (slope <= 0).unsqueeze(-1)  # False for NaN as well
        direction = torch.where(descends, direction, simpler)
    return direction, dot(grad, direction), solution.status


@dataclass(frozen=True, kw_only=True)
class newton_cg(Searching, NewtonMethod):
    """Newton's method with directions from conjugate gradients and a line search.

    ``d = -A^-1 grad F`` by a few CG steps, ``phi <- phi + t d`` with t from the search. Each task has
    its own CG, step length and treatment of negative curvature. On a quadratic, one step with enough
    CG iterations reaches the minimiser.

    Args:
        linear_solver: solves for the direction. Default: 5 steps of CG, as in the paper.
        line_search: chooses t. Default: Armijo backtracking from 1.
        curvature: the matrix A, [`Hessian`][implicit_optim.Hessian],
            [`GaussNewton`][implicit_optim.GaussNewton] or
            [`SafeguardedHessian`][implicit_optim.SafeguardedHessian].
        max_steps: most Newton steps.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done (one host
            synchronisation each).

    Raises:
        TypeError: line_search is no line search.
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: (phi.cosh() - theta * phi).sum()
        >>> solver = iopt.newton_cg(tol=1e-6)
        >>> solution = iopt.minimize(F, torch.zeros(1), torch.ones(1), solver=solver)
        >>> round(solution.value.item(), 4), solution.stats["steps"].item()  # asinh(1)
        (0.8814, 4)

    Source: Nocedal & Wright 2006, algorithm 7.1; Rajeswaran et al. 2019, section 4 (Hessian-free:
    5 CG steps a direction, line search, 3 repeats).
    """

    linear_solver: LinearSolver = field(default_factory=lambda: CG(max_steps=5))
    line_search: Search = field(default_factory=Armijo)
    max_steps: int = 20

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One Newton step."""
        assert at.operator is not None
        direction, slope, _ = newton_direction(at.operator, at.grad, self.linear_solver)
        moved = move(problem, phi, at, direction, slope, self.line_search)
        return moved.end, state, moved.found
