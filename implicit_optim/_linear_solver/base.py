"""What every linear solver is."""

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
from implicit_optim._vectors import none_running, none_running_if_free, norm, power_of_two, where


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

    _must: ClassVar = dict(
        max_steps="be >= 0", rtol="lie in [0, 1)", atol="be finite and >= 0", check_every="be >= 1"
    )

    max_steps: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    check_every: int = 1


class KrylovState:
    """How an iterative solve goes, task by task; in the end, its solution.

    A solver only reads it. All is in units of ``scale``, a power of two: squares of a tiny or huge b
    would leave the range of its dtype.
    """

    def __init__(self, solver: Iterative, operator: Linearized, b: Tensor) -> None:
        self.eps = torch.finfo(b.dtype).eps
        rtol, steps = solver.rtol, solver.max_steps
        if rtol is None:
            rtol = max(1e-6, 100 * self.eps) if steps is None else 0.0
        self.max_steps = min(10 * b.shape[-1], 1000) if steps is None else steps
        self.fixed = rtol == 0 and solver.atol == 0  # just these steps are asked for
        self.check_every = solver.check_every

        self.operator, self.scale = operator, power_of_two(b)
        self.b = b / self.scale.unsqueeze(-1)
        self.first_order = operator.precondition(self.b)
        self.rhs_norm = self.residual_norm = norm(self.b)
        # A residual below the rounding of ||b|| is noise: no solve can be asked for less.
        self.target = torch.maximum(max(rtol, self.eps) * self.rhs_norm, solver.atol / self.scale)
        finite = torch.isfinite(self.rhs_norm)
        self.status = status_of((~finite, Status.NONFINITE))
        self.running = finite & (self.rhs_norm > self.target)
        self.taken = [torch.zeros_like(finite)]  # for each step, the tasks in which it counts
        self.largest = torch.zeros_like(self.rhs_norm)  # ||A v|| of a unit vector v seen so far

    def finished(self, step: int) -> bool:
        """Whether a look before this step, if one is due, finds no task running."""
        return not self.fixed and step % self.check_every == 0 and none_running(self.running)

    def stop(self, mask: Tensor, why: Status) -> None:
        """End the running tasks in the mask."""
        stopped = self.running & mask
        self.mark(stopped, why)
        self.running = self.running ^ stopped

    def advance(self, running: Tensor, residual_norm: Tensor, counts_for: Tensor) -> None:
        """A step is done: who may take another, unless its residual is small enough."""
        self.taken.append(counts_for)
        self.residual_norm = residual_norm
        self.running = running & (residual_norm > self.target)

    def mark(self, mask: Tensor, why: Status) -> None:
        """Set the status of the tasks in the mask."""
        self.status = torch.where(mask, why.value, self.status)

    def restart(self, residual_norm: Tensor) -> None:
        """Go on with the tasks that have not failed and, by their true residual, are not done."""
        self.running = (self.status == Status.SUCCESS.value) & (residual_norm > self.target)

    def take_back(self, mask: Tensor, residual_norm: Tensor) -> None:
        """Tasks whose steps were in vain since A is singular, and the residual that they had before."""
        # An infinite ||A v|| says nothing of A.
        mask = mask & (self.status != Status.NONFINITE.value)
        self.mark(mask, Status.SINGULAR)
        self.residual_norm = torch.where(mask, residual_norm, self.residual_norm)

    def rounding(self, Av_norm: Tensor) -> Tensor:
        """What of A is rounding, given ``||A v||`` of unit vectors v of the running tasks."""
        self.largest = torch.maximum(self.largest, torch.where(self.running, Av_norm, 0.0))
        return 50 * self.eps * self.largest

    def is_lost(self, x: Tensor) -> Tensor:
        """The tasks where ``A x`` loses two digits of b to rounding: A is singular."""
        return self.eps * self.largest * norm(x) > 0.01 * self.rhs_norm

    def solution(self, x: Tensor, *, monotone: bool = True) -> Solution:
        """The solution; a task that took no step gets the first-order direction ``M^-1 b``.

        Where the solver lowers the residual in every step, a task that has raised it is singular.
        """
        steps = torch.stack(self.taken, -1).sum(-1, dtype=torch.int32)
        if not self.fixed:  # recurrences drift away from b - A x: one more product, for honesty
            true_norm = norm(self.b - self.operator.mv(x))
            kept = (self.status == Status.NONFINITE.value) | (steps == 0)
            self.residual_norm = torch.where(kept, self.residual_norm, true_norm)
            if monotone:
                worse = self.residual_norm > 1.01 * self.rhs_norm
                self.take_back(worse, self.rhs_norm)
                steps = steps * ~worse
            self.mark(self.status == Status.SUCCESS.value, Status.MAX_STEPS)
        missed = self.residual_norm > 1.01 * self.target
        nonfinite = ~torch.isfinite(self.residual_norm) | (self.status == Status.NONFINITE.value)
        unsolved = (steps == 0) & (self.rhs_norm > self.target)
        x = where(unsolved, self.first_order, x) * self.scale.unsqueeze(-1)
        x = where(nonfinite, math.nan, x)
        solved = ~missed & (self.status != Status.NEGATIVE_CURVATURE.value)  # which is told always
        self.mark(solved, Status.SUCCESS)
        self.mark(nonfinite, Status.NONFINITE)
        norms = self.scale * self.residual_norm, self.scale * self.rhs_norm
        stats = dict(zip(Iterative.stats_names, (steps, *norms), strict=True))
        return Solution(x, self.status, stats)


def safeguarded(
    solution: Solution,
    again: Callable[[], Solution],
    none: Callable[[Tensor], bool] = none_running_if_free,
) -> Solution:
    """A solution with the tasks of negative curvature from another solve, marked ``fallback``.

    The other solve is not made where ``none`` can tell that there are no such tasks.
    """
    indefinite = solution.status == Status.NEGATIVE_CURVATURE.value
    value, status, stats = solution
    if not none(indefinite):
        other = again()
        value = torch.where(indefinite.unsqueeze(-1), other.value, value)
        status = torch.where(indefinite, other.status, status)
        stats = {
            # What is no number per task, such as CG's coefficients, stays that of the first matrix.
            name: torch.where(indefinite, other.stats[name], old)
            if old.ndim == status.ndim
            else old
            for name, old in stats.items()
        }
    return Solution(value, status, stats | {"fallback": indefinite})
