"""Linear operators: curvature of an inner problem, explicit matrices, damping."""

from implicit_optim._operator._base import Linearized, Operator
from implicit_optim._operator._curvature import GaussNewton, Hessian
from implicit_optim._operator._dense import Damped, Dense

__all__ = ["Damped", "Dense", "GaussNewton", "Hessian", "Linearized", "Operator"]
