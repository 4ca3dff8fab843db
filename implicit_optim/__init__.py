"""Exact, cheap gradients through an inner optimisation problem in PyTorch: implicit MAML and beyond."""

from implicit_optim._batch import Batching
from implicit_optim._error_bound import error_bound
from implicit_optim._flat import Layout
from implicit_optim._implicit import ImplicitMetaGradient, attach
from implicit_optim._inner_problem import InnerProblem
from implicit_optim._l1 import L1
from implicit_optim._linear_solve import linear_solve
from implicit_optim._linear_solver import (
    CG,
    GMRES,
    MINRES,
    QR,
    Auto,
    Cholesky,
    LinearSolver,
    Neumann,
    Woodbury,
)
from implicit_optim._meta_gradient import (
    FirstOrder,
    Implicit,
    MetaGradient,
    Reptile,
    Truncated,
    Unrolled,
)
from implicit_optim._meta_learner import MetaLearner
from implicit_optim._minimize import minimize
from implicit_optim._objective import FixedPoint, Objective, Root
from implicit_optim._operator import (
    Damped,
    Dense,
    Diagonal,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Jacobian,
    Linearized,
    LowRank,
    Operator,
    Product,
    SafeguardedHessian,
    Scaled,
    Sum,
)
from implicit_optim._proximal import Proximal
from implicit_optim._quadratic import inverse_proximal, proximal
from implicit_optim._report import Ignore, Raise, Report, SolveError, SolveWarning, Warn
from implicit_optim._running_stats import RunningStats
from implicit_optim._search import Armijo, FixedStep, Line, Search
from implicit_optim._solution import Solution, Status
from implicit_optim._solver import (
    Evaluation,
    Solver,
    agd,
    from_torch,
    gd,
    lbfgs,
    newton_cg,
    nonlinear_cg,
    proximal_gradient,
    trust_region,
)
from implicit_optim._strong_wolfe import StrongWolfe
from implicit_optim.optim import (
    AGD,
    GD,
    NesterovAGD,
    NewtonCG,
    NonlinearCG,
    ProximalGradient,
    TrustRegion,
)

__version__ = "0.1.0"

__all__ = [
    "AGD",
    "Armijo",
    "Auto",
    "Batching",
    "CG",
    "Cholesky",
    "Damped",
    "Dense",
    "Diagonal",
    "EmpiricalFisher",
    "Evaluation",
    "FirstOrder",
    "FixedPoint",
    "FixedStep",
    "GD",
    "GMRES",
    "GaussNewton",
    "Hessian",
    "Ignore",
    "Implicit",
    "ImplicitMetaGradient",
    "InnerProblem",
    "Jacobian",
    "L1",
    "Layout",
    "Line",
    "LinearSolver",
    "Linearized",
    "LowRank",
    "MINRES",
    "MetaGradient",
    "MetaLearner",
    "NesterovAGD",
    "Neumann",
    "NewtonCG",
    "NonlinearCG",
    "Objective",
    "Operator",
    "Product",
    "Proximal",
    "ProximalGradient",
    "QR",
    "Raise",
    "Report",
    "Reptile",
    "Root",
    "RunningStats",
    "SafeguardedHessian",
    "Scaled",
    "Search",
    "Solution",
    "SolveError",
    "SolveWarning",
    "Solver",
    "Status",
    "StrongWolfe",
    "Sum",
    "Truncated",
    "TrustRegion",
    "Unrolled",
    "Warn",
    "Woodbury",
    "agd",
    "attach",
    "error_bound",
    "from_torch",
    "gd",
    "inverse_proximal",
    "lbfgs",
    "linear_solve",
    "minimize",
    "newton_cg",
    "nonlinear_cg",
    "proximal",
    "proximal_gradient",
    "trust_region",
]
