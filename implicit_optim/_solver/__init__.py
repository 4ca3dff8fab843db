"""Inner solvers: pure update rules on ``[*batch, n]``, which `_minimize` runs.

It uses `_search`, `_linear_solver`, `_operator`, `_problem`, `_outcome` and `_vectors`.
"""

from implicit_optim._solver.agd import agd, agd_update
from implicit_optim._solver.base import SOLVERS, Evaluation, Solver, move
from implicit_optim._solver.from_torch import from_torch
from implicit_optim._solver.gd import gd, gd_update
from implicit_optim._solver.lbfgs import lbfgs
from implicit_optim._solver.newton_cg import newton_cg, newton_direction
from implicit_optim._solver.nonlinear_cg import NonlinearCgState, conjugate_step, nonlinear_cg
from implicit_optim._solver.proximal_gradient import proximal_gradient, proximal_update
from implicit_optim._solver.trust_region import trust_region
