"""Linear operators: curvature of an inner problem, Jacobians, explicit matrices, and their algebra."""

from implicit_optim._operator._algebra import Damped, Product, Scaled, Sum
from implicit_optim._operator._base import Linearized, LowRank, Operator
from implicit_optim._operator._curvature import (
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    SafeguardedHessian,
)
from implicit_optim._operator._dense import Dense, Diagonal
from implicit_optim._operator._jacobian import Jacobian
from implicit_optim._operator._support import OnSupport

__all__ = [
    "Damped",
    "Dense",
    "Diagonal",
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "Linearized",
    "LowRank",
    "OnSupport",
    "Operator",
    "Product",
    "SafeguardedHessian",
    "Scaled",
    "Sum",
]
