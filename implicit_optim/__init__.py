"""Exact, cheap gradients through an inner optimisation problem in PyTorch: implicit MAML and beyond."""

import importlib
import warnings
from typing import Any

from implicit_optim import _vectors
from implicit_optim._evaluation import Batching, RunningStats
from implicit_optim._implicit import ImplicitMetaGradient, attach
from implicit_optim._linear_solve import linear_solve
from implicit_optim._linear_solver import (
    CG, GMRES, MINRES, QR, Auto, Cholesky, LinearSolver, Neumann, Woodbury,
)  # fmt: skip
from implicit_optim._meta_gradient import (
    FirstOrder, Implicit, MetaGradient, Reptile, Truncated, Unrolled,
)  # fmt: skip
from implicit_optim._meta_learner import MetaLearner
from implicit_optim._minimize import minimize
from implicit_optim._operator import (
    Damped, Dense, Diagonal, EmpiricalFisher, GaussNewton, Hessian, Jacobian, Linearized, Operator,
    SafeguardedHessian,
)  # fmt: skip
from implicit_optim._operator import algebra as _algebra
from implicit_optim._operator import base as _operator
from implicit_optim._outcome import (
    Ignore, Raise, Report, Solution, SolveError, SolveWarning, Status, Warn, error_bound,
)  # fmt: skip
from implicit_optim._problem import (
    L1, FixedPoint, InnerProblem, Objective, Proximal, Root, inverse_proximal, proximal,
)  # fmt: skip
from implicit_optim._search import Armijo, FixedStep, Line, Search, StrongWolfe
from implicit_optim._solver import (
    Evaluation, Solver, agd, from_torch, gd, lbfgs, newton_cg, nonlinear_cg, proximal_gradient,
    trust_region,
)  # fmt: skip
from implicit_optim.optim import (
    GD, NesterovAGD, NewtonCG, NonlinearCG, ProximalGradient, TrustRegion,
)  # fmt: skip

__version__ = "0.1.0"

# fmt: off
__all__ = [
    # What people call: a meta-learner and its settings,
    "MetaLearner", "Proximal", "RunningStats", "Batching",
    "Implicit", "Unrolled", "Truncated", "FirstOrder", "Reptile",
    # the three verbs, what they are given and what they return,
    "minimize", "attach", "linear_solve", "error_bound",
    "Objective", "L1", "Root", "FixedPoint", "proximal", "inverse_proximal",
    "Solution", "Status", "Report", "Warn", "Raise", "Ignore", "SolveWarning", "SolveError",
    # inner solvers and their line searches,
    "gd", "agd", "nonlinear_cg", "lbfgs", "newton_cg", "trust_region", "proximal_gradient", "from_torch",
    "Armijo", "StrongWolfe", "FixedStep",
    # linear solvers and matrices,
    "CG", "MINRES", "GMRES", "Neumann", "Woodbury", "Cholesky", "QR", "Auto",
    "Hessian", "GaussNewton", "SafeguardedHessian", "EmpiricalFisher", "Jacobian",
    "Dense", "Diagonal", "Damped",
    # and the classes of torch.optim.
    "GD", "NesterovAGD", "NewtonCG", "NonlinearCG", "TrustRegion", "ProximalGradient",
    # What people who extend it implement or are handed.
    "MetaGradient", "ImplicitMetaGradient", "InnerProblem", "Solver", "Evaluation", "Search", "Line",
    "LinearSolver", "Operator", "Linearized",
]
# fmt: on


# Names that were here once: gone with 0.2, what to write instead.
_WITHDRAWN: dict[str, tuple[Any, str]] = {
    "AGD": (NesterovAGD, "NesterovAGD"),
    "Layout": (_vectors.Layout, "problem.layout of an InnerProblem"),
    "LowRank": (_operator.LowRank, "what operator.linearize().low_rank() returns"),
    "Product": (_algebra.Product, "A @ B"),
    "Scaled": (_algebra.Scaled, "2 * A"),
    "Sum": (_algebra.Sum, "A + B"),
}


def __getattr__(name: str) -> Any:
    """``iopt.tasks`` at no cost until it is touched; names that are no longer here."""
    if name == "tasks":
        return importlib.import_module("implicit_optim.tasks")
    if name in _WITHDRAWN:
        value, instead = _WITHDRAWN[name]
        message = f"implicit_optim.{name} goes with version 0.2: use {instead}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
