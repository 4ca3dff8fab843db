"""Step lengths along a search direction, one per task.

It uses `_vectors`; the objective along the direction is passed in as a function.
"""

from implicit_optim._search.armijo import Armijo, FixedStep
from implicit_optim._search.base import Line, Minimised, Scalars, Search, Vectors, rounding_of
from implicit_optim._search.strong_wolfe import StrongWolfe
