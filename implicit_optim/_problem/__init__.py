"""What is minimised: an objective bound to its data, the proximal term, an l1 norm.

It uses `_evaluation` for every value and derivative, and `_vectors`.
"""

from implicit_optim._problem.inner_problem import InnerProblem
from implicit_optim._problem.l1 import L1, smooth, soft_threshold, strengths, subgradient
from implicit_optim._problem.objective import Equations, FixedPoint, InnerObjective, Objective, Root
from implicit_optim._problem.proximal import Theta, inverse_proximal, proximal
from implicit_optim._problem.strength import Proximal
