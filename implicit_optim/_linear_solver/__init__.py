"""Linear solvers: frozen configurations with one batch-native ``solve``."""

from implicit_optim._linear_solver._base import LinearSolver
from implicit_optim._linear_solver._cg import CG

__all__ = ["CG", "LinearSolver"]
