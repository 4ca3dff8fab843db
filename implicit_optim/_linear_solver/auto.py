"""The solver that looks at the matrix first, and says what it chose."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import LinearSolver, safeguarded
from implicit_optim._linear_solver.cg import CG
from implicit_optim._linear_solver.direct import QR, Cholesky
from implicit_optim._linear_solver.gmres import GMRES
from implicit_optim._linear_solver.minres import MINRES
from implicit_optim._operator import Linearized, dense_matrix
from implicit_optim._outcome import Solution
from implicit_optim._vectors import none_running


@dataclass(frozen=True)
class Auto(LinearSolver):
    """Chooses by size, symmetry and definiteness, task by task, and says what it chose.

    | | symmetric | not |
    |---|---|---|
    | n <= max_dense | Cholesky; QR for the tasks that are not positive definite | QR |
    | larger | CG; MINRES for the tasks in which it meets negative curvature | GMRES |

    An indefinite Hessian is so solved as it stands: the gradient is that of a saddle point. Where that
    is not wanted, take CG, which says so in its status.

    Args:
        rtol: tolerance relative to ``||b||`` of the iterative ones. Default: ``max(1e-6, 100 eps)``.
        max_dense: largest n for which the matrix is formed, by n products.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> A = iopt.Dense(torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, -1.0]))]))
        >>> solution = iopt.linear_solve(A, torch.ones(2, 2), iopt.Auto())
        >>> iopt.Auto.chosen(solution)
        {'Cholesky': 1, 'QR': 1}
    """

    stats_names: ClassVar = ("residual_norm", "rhs_norm", "choice")
    names: ClassVar = ("Cholesky", "QR", "CG", "MINRES", "GMRES")

    _must: ClassVar = dict(rtol="lie in [0, 1)", max_dense="be >= 0")

    rtol: float | None = None
    max_dense: int = 100

    @torch.no_grad()
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """See [`LinearSolver.solve`][implicit_optim.LinearSolver.solve].

        Returns:
            ``stats``: ``residual_norm = ||b - A x||``, ``rhs_norm`` and ``choice``, the place of what
            was chosen in ``Auto.names`` (int8); ``Auto.chosen(solution)`` counts them.
        """
        if b.shape[-1] <= self.max_dense:
            matrix = dense_matrix(operator.mv, b)
            direct = (Cholesky(), QR()) if operator.symmetric else (QR(),)
            solves = [partial(self._by, s, s.on_matrix, matrix, b) for s in direct]
        else:
            tol = self.rtol
            iterative = (
                (CG(rtol=tol), MINRES(rtol=tol)) if operator.symmetric else (GMRES(rtol=tol),)
            )
            solves = [partial(self._by, s, s.solve, operator, b) for s in iterative]
        solution = solves[0]()
        for solve in solves[1:]:  # it takes the tasks that are not positive definite
            solution = safeguarded(solution, solve, none=none_running)
        stats = {name: solution.stats[name] for name in self.stats_names}
        return solution._replace(stats=stats)

    def _by(self, solver: LinearSolver, solve: Callable[..., Solution], *args: Any) -> Solution:
        """The solution by one of ``names``, with its place there."""
        value, status, stats = solve(*args)
        choice = torch.full_like(status, self.names.index(type(solver).__name__))
        return self._solution(value, status, stats["residual_norm"], stats["rhs_norm"], choice)

    @classmethod
    def chosen(cls, solution: Solution) -> dict[str, int]:
        """How many tasks were solved with what; reading it synchronises with the device."""
        places = solution.stats["choice"].flatten().tolist()
        return {name: places.count(i) for i, name in enumerate(cls.names) if i in places}
