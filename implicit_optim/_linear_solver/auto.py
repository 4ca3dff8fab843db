"""The solver that looks at the matrix first, and says what it chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import LinearSolver, safeguarded
from implicit_optim._linear_solver.cg import CG
from implicit_optim._linear_solver.direct import QR, Cholesky, dense
from implicit_optim._linear_solver.gmres import GMRES
from implicit_optim._linear_solver.minres import MINRES
from implicit_optim._operator import Linearized
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

    _must: ClassVar = {"max_dense": "be >= 0"}

    rtol: float | None = None
    max_dense: int = 100
    _cg: CG = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_cg", CG(rtol=self.rtol))  # checks rtol

    @torch.no_grad()
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """See [`LinearSolver.solve`][implicit_optim.LinearSolver.solve].

        Returns:
            ``stats``: ``residual_norm = ||b - A x||``, ``rhs_norm`` and ``choice``, the place of what
            was chosen in ``Auto.names`` (int8); ``Auto.chosen(solution)`` counts them.
        """
        first, *others = self._candidates(operator, b)
        solution = first()
        for other in others:  # it takes the tasks that are not positive definite
            solution = safeguarded(solution, other, none=none_running)
        stats = {name: solution.stats[name] for name in self.stats_names}
        return solution._replace(stats=stats)

    def _candidates(self, operator: Linearized, b: Tensor) -> list[Callable[[], Solution]]:
        """What may solve it, in the order in which it is tried."""
        if b.shape[-1] > self.max_dense:
            iterative = (self._cg, MINRES(rtol=self.rtol))
            solvers = iterative if operator.symmetric else (GMRES(rtol=self.rtol),)
            return [partial(self._marked, s, s.solve, operator, b) for s in solvers]
        matrix = dense(operator, b, self.max_dense)
        direct = (Cholesky(), QR()) if operator.symmetric else (QR(),)
        return [partial(self._marked, s, s.on_matrix, matrix, b) for s in direct]

    def _marked(self, solver: LinearSolver, solve: Callable[..., Solution], *args: Any) -> Solution:
        """A solution with the place of its solver in ``names``."""
        value, status, stats = solve(*args)
        choice = torch.full_like(status, self.names.index(type(solver).__name__))
        return self._solution(value, status, stats["residual_norm"], stats["rhs_norm"], choice)

    @classmethod
    def chosen(cls, solution: Solution) -> dict[str, int]:
        """How many tasks were solved with what; reading it synchronises with the device."""
        places = solution.stats["choice"].flatten().tolist()
        return {name: places.count(i) for i, name in enumerate(cls.names) if i in places}
