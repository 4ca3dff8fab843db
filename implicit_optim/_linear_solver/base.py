"""What every linear solver is."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._checks import Settings
from implicit_optim._operator import Linearized
from implicit_optim._outcome import Solution, Status, status_of
from implicit_optim._vectors import none_running_if_free, norm, power_of_two, where


class LinearSolver(Settings, abc.ABC):
    """Solves ``A x = b`` for every task of a batch at once.

    A subclass is a frozen dataclass of settings. Its ``solve`` is batch-native: masks per task, no
    ``.item()`` where none is needed, so that it runs under ``vmap`` and on any device.

    Attributes:
        stats_names: what the solutions' ``stats`` hold, in order.
        needs_symmetry: whether A must be symmetric.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class FirstOrderDirection(iopt.LinearSolver):
        ...     stats_names = ()
        ...
        ...     def solve(self, operator, b):
        ...         solved = torch.zeros(b.shape[:-1], dtype=torch.int8)
        ...         return iopt.Solution(operator.precondition(b), solved, {})
        >>> A = iopt.Damped(iopt.Dense(torch.eye(2)), 4.0)
        >>> iopt.linear_solve(A, torch.ones(2), FirstOrderDirection()).value.tolist()  # b / damping
        [0.25, 0.25]
    """

    stats_names: ClassVar[tuple[str, ...]]
    needs_symmetry: ClassVar[bool] = False

    @abc.abstractmethod
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """Solve at a fixed linearisation.

        Args:
            operator: A, already linearised.
            b: right-hand side ``[*batch, n]``.

        Returns:
            A [`Solution`][implicit_optim.Solution] with value ``[*batch, n]``, without a graph.
        """

    def _solution(self, value: Tensor, status: Tensor, *numbers: Tensor) -> Solution:
        """The solution, the numbers under their names."""
        return Solution(value, status, dict(zip(self.stats_names, numbers, strict=True)))


@dataclass(frozen=True)
class Iterative(LinearSolver):
    """Settings that iterative solvers share; each says what they mean for it."""

    stats_names: ClassVar[tuple[str, ...]] = ("steps", "residual_norm", "rhs_norm")

    _must: ClassVar = {
        "max_steps": "be >= 0",
        "rtol": "lie in [0, 1)",
        "atol": "be finite and >= 0",
        "check_every": "be >= 1",
    }

    max_steps: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    check_every: int = 1

    def limits(self, b: Tensor) -> tuple[int, float, bool]:
        """Most steps, relative tolerance, and whether just these steps are asked for."""
        default = 0.0
        if self.max_steps is None:
            default = max(1e-6, 100 * torch.finfo(b.dtype).eps)
        max_steps = min(10 * b.shape[-1], 1000) if self.max_steps is None else self.max_steps
        rtol = default if self.rtol is None else self.rtol
        return max_steps, rtol, rtol == 0 and self.atol == 0


def safeguarded(
    solution: Solution,
    again: Callable[[], Solution],
    none: Callable[[Tensor], bool] = none_running_if_free,
) -> Solution:
    """A solution with the tasks of negative curvature from another solve, marked ``fallback``.

    The other solve is not made where ``none`` can tell that there are no such tasks.
    """
    indefinite = solution.status == Status.NEGATIVE_CURVATURE.value
    value, status, stats = solution.value, solution.status, solution.stats
    if not none(indefinite):
        other = again()
        value = torch.where(indefinite.unsqueeze(-1), other.value, value)
        status = torch.where(indefinite, other.status, status)
        per_task = {k: v for k, v in stats.items() if v.shape == status.shape}
        # What is no number per task, such as CG's coefficients, stays that of the first matrix.
        merged = {k: torch.where(indefinite, other.stats[k], v) for k, v in per_task.items()}
        stats = stats | merged
    return Solution(value, status, stats | {"fallback": indefinite})


def scaled(b: Tensor, rtol: float, atol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divide b by a power of two: quotient, power, the quotient's norm, and the residual it may have.

    Squares of a tiny or huge b would leave the range of its dtype. Below the rounding of ``||b||`` a
    residual is noise: no solve can be asked for more.
    """
    scale = power_of_two(b)
    b = b / scale.unsqueeze(-1)
    rhs_norm = norm(b)
    least = max(rtol, torch.finfo(b.dtype).eps)
    return b, scale, rhs_norm, torch.maximum(least * rhs_norm, atol / scale)


class Outcome:
    """How a solve goes, task by task: what is left to do, and what to say of it in the end."""

    def __init__(self, b: Tensor, rtol: float, atol: float) -> None:
        self.b, self.scale, self.rhs_norm, self.target = scaled(b, rtol, atol)
        self.residual_norm = self.rhs_norm
        self.nonfinite = ~torch.isfinite(self.rhs_norm)
        self.running = ~self.nonfinite & (self.rhs_norm > self.target)
        self.singular = self.stuck = torch.zeros_like(self.running)
        self.steps = torch.zeros_like(self.running, dtype=torch.int32)
        self.largest = torch.zeros_like(self.rhs_norm)  # ||A v|| of a unit vector v seen so far

    def see(self, Av_norm: Tensor, active: Tensor) -> Tensor:
        """Remember ``||A v||`` of unit vectors v; what of A is below the result is rounding."""
        self.largest = torch.maximum(self.largest, torch.where(active, Av_norm, 0.0))
        return 50 * torch.finfo(self.b.dtype).eps * self.largest

    def lost(self, proposal: Tensor, who: Tensor) -> Tensor:
        """The tasks of ``who`` where ``A x`` would lose two digits of b to rounding: A is singular."""
        eps = torch.finfo(proposal.dtype).eps
        lost = who & (eps * self.largest * norm(proposal) > 0.01 * self.rhs_norm)
        self.singular = self.singular | lost
        return lost

    def solution(self, x: Tensor, operator: Linearized, fixed: bool) -> Solution:
        """The solution; a task that took no step gets the first-order direction ``M^-1 b``."""
        if not fixed:
            true_norm = norm(self.b - operator.mv(x))
            self.residual_norm = torch.where(self.nonfinite, self.residual_norm, true_norm)
            broken = self.residual_norm > 1.01 * self.rhs_norm  # worse than no step at all
            self.singular, self.steps = self.singular | broken, self.steps * ~broken
            self.residual_norm = torch.where(broken, self.rhs_norm, self.residual_norm)
        self.nonfinite = self.nonfinite | ~torch.isfinite(self.residual_norm)
        at_once = (self.steps == 0) & (self.rhs_norm > self.target)
        x = where(at_once, operator.precondition(self.b), x) * self.scale.unsqueeze(-1)
        x = where(self.nonfinite, math.nan, x)
        missed = self.residual_norm > 1.01 * self.target
        out_of_steps = [] if fixed else [(missed, Status.MAX_STEPS)]
        status = status_of(
            *out_of_steps,
            (self.stuck & missed, Status.LINE_SEARCH),
            (self.singular & missed, Status.SINGULAR),
            (self.nonfinite, Status.NONFINITE),
        )
        norms = self.scale * self.residual_norm, self.scale * self.rhs_norm
        stats = dict(zip(Iterative.stats_names, (self.steps, *norms), strict=True))
        return Solution(x, status, stats)
