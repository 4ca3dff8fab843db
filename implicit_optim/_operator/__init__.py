"""Linear operators: curvature of an inner problem, Jacobians, matrices, and their algebra.

It uses `_problem`, `_evaluation` and `_vectors`.
"""

from implicit_optim._operator.algebra import Damped, Operator
from implicit_optim._operator.base import Linearized, dense_matrix
from implicit_optim._operator.curvature import (
    CurvatureChoice, EmpiricalFisher, GaussNewton, Hessian, SafeguardedHessian,
)  # fmt: skip
from implicit_optim._operator.dense import Dense, Diagonal
from implicit_optim._operator.jacobian import Jacobian
from implicit_optim._operator.support import OnSupport
