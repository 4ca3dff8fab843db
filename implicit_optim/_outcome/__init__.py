"""What a solve leaves: solution, status, report, error bound.

It uses torch alone.
"""

from implicit_optim._outcome.error_bound import error_bound
from implicit_optim._outcome.report import (
    Ignore,
    Raise,
    Report,
    SolveError,
    SolveWarning,
    Warn,
    remembered,
)
from implicit_optim._outcome.solution import OnSolve, Solution, Status, joined, led, status_of
