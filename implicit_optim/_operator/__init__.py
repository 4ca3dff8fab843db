"""Linear operators: curvature of an inner problem, Jacobians, explicit matrices, damping."""

from implicit_optim._operator._base import Linearized, LowRank, Operator
from implicit_optim._operator._curvature import GaussNewton, Hessian
from implicit_optim._operator._dense import Damped, Dense
from implicit_optim._operator._jacobian import Jacobian

__all__ = [
    "Damped",
    "Dense",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "Linearized",
    "LowRank",
    "Operator",
]
