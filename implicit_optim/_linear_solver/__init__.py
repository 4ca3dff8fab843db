"""Linear solvers: frozen configurations with one batch-native ``solve``."""

from implicit_optim._linear_solver._auto import Auto
from implicit_optim._linear_solver._base import LinearSolver, safeguarded
from implicit_optim._linear_solver._cg import CG
from implicit_optim._linear_solver._direct import QR, Cholesky
from implicit_optim._linear_solver._gmres import GMRES
from implicit_optim._linear_solver._minres import MINRES
from implicit_optim._linear_solver._neumann import Neumann
from implicit_optim._linear_solver._steihaug import steihaug
from implicit_optim._linear_solver._woodbury import Woodbury

__all__ = [
    "Auto",
    "CG",
    "Cholesky",
    "GMRES",
    "LinearSolver",
    "MINRES",
    "Neumann",
    "QR",
    "Woodbury",
    "safeguarded",
    "steihaug",
]
