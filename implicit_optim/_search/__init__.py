"""Step lengths along a search direction, one per task.

It uses `_vectors`; what it searches along is a function that it is given.
"""

from implicit_optim._search.base import Armijo, FixedStep, Line, Scalars, Search, Vectors
from implicit_optim._search.strong_wolfe import StrongWolfe
