"""Linear operators: curvature of an inner problem, Jacobians, matrices, and their algebra.

It uses `_problem`, `_evaluation` and `_vectors`.
"""

from implicit_optim._operator.algebra import Damped
from implicit_optim._operator.base import Linearized, Operator, dense_matrix
from implicit_optim._operator.curvature import (
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    SafeguardedHessian,
)
from implicit_optim._operator.dense import Dense, Diagonal
from implicit_optim._operator.jacobian import Jacobian
from implicit_optim._operator.support import OnSupport
