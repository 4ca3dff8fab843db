"""Exact, cheap gradients through an inner optimisation problem in PyTorch: implicit MAML and beyond."""

from implicit_optim._flat import Layout
from implicit_optim._implicit import ImplicitMetaGradient, attach
from implicit_optim._linear_solve import linear_solve
from implicit_optim._linear_solver import CG, LinearSolver
from implicit_optim._meta_gradient import FirstOrder, Implicit, MetaGradient
from implicit_optim._meta_learner import MetaLearner
from implicit_optim._minimize import minimize
from implicit_optim._objective import InnerProblem, Objective
from implicit_optim._operator import Damped, Dense, GaussNewton, Hessian, Linearized, Operator
from implicit_optim._proximal import Proximal, inverse_proximal, proximal
from implicit_optim._search import Armijo, FixedStep, Search
from implicit_optim._solution import Solution, Status
from implicit_optim._solver import Evaluation, Solver, agd, from_torch, gd, newton_cg
from implicit_optim.optim import AGD, GD, NesterovAGD, NewtonCG

__version__ = "0.1.0"

__all__ = [
    "AGD",
    "Armijo",
    "CG",
    "Damped",
    "Dense",
    "Evaluation",
    "FirstOrder",
    "FixedStep",
    "GD",
    "GaussNewton",
    "Hessian",
    "Implicit",
    "ImplicitMetaGradient",
    "InnerProblem",
    "Layout",
    "LinearSolver",
    "Linearized",
    "MetaGradient",
    "MetaLearner",
    "NesterovAGD",
    "NewtonCG",
    "Objective",
    "Operator",
    "Proximal",
    "Search",
    "Solution",
    "Solver",
    "Status",
    "agd",
    "attach",
    "from_torch",
    "gd",
    "inverse_proximal",
    "linear_solve",
    "minimize",
    "newton_cg",
    "proximal",
]
