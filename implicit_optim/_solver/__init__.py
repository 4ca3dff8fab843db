"""Inner solvers: pure update rules on ``[*batch, n]``, and how to borrow one from torch.optim."""

from implicit_optim._solver._agd import agd
from implicit_optim._solver._base import Evaluation, Solver
from implicit_optim._solver._from_torch import from_torch
from implicit_optim._solver._gd import gd
from implicit_optim._solver._lbfgs import lbfgs
from implicit_optim._solver._newton_cg import newton_cg
from implicit_optim._solver._nonlinear_cg import nonlinear_cg
from implicit_optim._solver._proximal_gradient import proximal_gradient
from implicit_optim._solver._trust_region import trust_region

__all__ = [
    "Evaluation",
    "Solver",
    "agd",
    "from_torch",
    "gd",
    "lbfgs",
    "newton_cg",
    "nonlinear_cg",
    "proximal_gradient",
    "trust_region",
]
