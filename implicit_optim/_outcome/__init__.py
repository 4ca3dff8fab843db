"""What a solve leaves: solution, status, report, error bound.

It uses `_vectors`.
"""

from implicit_optim._outcome.error_bound import error_bound
from implicit_optim._outcome.report import (
    Ignore, Raise, Report, SolveError, SolveWarning, Warn, remembered,
)  # fmt: skip
from implicit_optim._outcome.solution import (
    OnSolve, Solution, Status, add_task_dim, concatenate, status_of,
)  # fmt: skip
