"""Linear solvers: ``(operator, b) -> (x, status, stats)`` for a batch of tasks.

It uses `_operator`, `_outcome` and `_vectors`; `_linear_solve` makes the solution differentiable.
"""

from implicit_optim._linear_solver.auto import Auto
from implicit_optim._linear_solver.base import LinearSolver, safeguarded
from implicit_optim._linear_solver.cg import CG
from implicit_optim._linear_solver.direct import QR, Cholesky
from implicit_optim._linear_solver.gmres import GMRES
from implicit_optim._linear_solver.minres import MINRES
from implicit_optim._linear_solver.neumann import Neumann
from implicit_optim._linear_solver.woodbury import Woodbury
