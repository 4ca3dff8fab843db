"""Linear operators: curvature of an inner problem, Jacobians, explicit matrices, and their algebra."""

from implicit_optim._operator._algebra import Damped, Product, Scaled, Sum
from implicit_optim._operator._base import Linearized, LowRank, Operator
from implicit_optim._operator._curvature import GaussNewton, Hessian
from implicit_optim._operator._dense import Dense
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
    "Product",
    "Scaled",
    "Sum",
]
