"""A trust region around each iterate: Newton's method where the Hessian is indefinite."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit_optim._problem import InnerProblem
from implicit_optim._search import Minimised, Scalars, rounding_of
from implicit_optim._solver.base import Descent, Evaluation, NewtonMethod, Step
from implicit_optim._solver.steihaug import steihaug
from implicit_optim._vectors import norm


@dataclass(frozen=True, kw_only=True)
class trust_region(NewtonMethod):
    """Newton's method in a trust region, for objectives whose Hessian is indefinite.

    Each step lowers the model ``grad F . p + p.Ap / 2`` in the ball ``||p|| <= radius`` by Steihaug's
    conjugate gradients, which follow a direction of negative curvature to the boundary. It is accepted
    if F falls by at least ``eta`` of what the model predicts; a rejected step is no failure. If F falls
    by less than 1/4 of the prediction, the radius becomes a quarter of the step; by more than 3/4, with
    the step on the boundary, it doubles. There is no line search, and each task has its own radius.

    A task ends with ``NO_DESCENT`` only if its radius has shrunk below the rounding of phi or of F.
    Exactly at a saddle point, where the gradient is zero, there is no step to take.

    Args:
        radius: at the start, > 0, in units of phi.
        max_radius: the radius never exceeds it.
        eta: least fraction of the predicted decrease, in [0, 1/4).
        cg_steps: most CG steps per step, one product each. A task stops earlier at a residual of
            ``min(1/2, sqrt ||grad F||) ||grad F||``. Default: ``min(10 n, 1000)``, with a host
            synchronisation each to see whether all tasks are done; with a number there is none.
        curvature: the matrix A, [`Hessian`][implicit_optim.Hessian] or
            [`GaussNewton`][implicit_optim.GaussNewton].
        max_steps: most steps, rejected ones included; each costs a gradient, its CG steps and a value.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done (one host
            synchronisation each).

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: (phi**4 / 4 - phi**2 / 2).sum()  # at 0.1 it curves down
        >>> solution = iopt.minimize(
        ...     F, torch.tensor([0.1, -0.1]), (), solver=iopt.trust_region(tol=1e-5)
        ... )
        >>> [round(v, 4) for v in solution.value.tolist()], solution.status.item()
        ([1.0, -1.0], 0)

    Source: Nocedal & Wright 2006, algorithms 4.1 and 7.2; Steihaug 1983; the rounding of F after Conn,
    Gould & Toint 2000, section 17.4.2.
    """

    _must: ClassVar = dict(
        Descent._must, max_radius="be finite and > 0", eta="lie in [0, 1/4)", cg_steps="be >= 1"
    )

    radius: float = 1.0
    max_radius: float = 1000.0
    eta: float = 0.15
    cg_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.radius <= self.max_radius:
            raise ValueError(
                f"Invalid radius: {self.radius}: it must lie in (0, max_radius = {self.max_radius}]"
            )

    def init(self, problem: InnerProblem, phi: Tensor) -> Scalars:
        """The radius of each task ``[*batch]``."""
        return phi.new_full(phi.shape[:-1], self.radius)

    def step(self, problem: Minimised, phi: Tensor, at: Evaluation, state: Scalars) -> Step:
        """The next iterate, the next radius, and whether that is still above rounding.

        The rounding of F is added to both decreases, the actual one and the model's, so that near the
        minimiser their quotient tends to 1 rather than to noise. A radius is below rounding if steps of
        its length do not change phi, or keep the model's decrease below the rounding of F.
        """
        assert at.operator is not None and at.value is not None
        forcing = norm(at.grad).sqrt().clamp(max=0.5)
        solution = steihaug(at.operator, -at.grad, state, rtol=forcing, max_steps=self.cg_steps)
        proposal, stats, rounding = phi + solution.value, solution.stats, rounding_of(at.value)
        length, predicted = stats["norm"], stats["decrease"] + rounding
        actual = at.value - problem.values(proposal) + rounding
        # Products instead of quotients: no division by zero, and every comparison is False for NaN.
        accept, fair = actual >= self.eta * predicted, actual >= predicted / 4
        grow = (actual > 0.75 * predicted) & stats["on_boundary"]
        # A quarter of the step, not of the radius, which could allow the same interior step again.
        radius = torch.where(fair, state, length / 4)
        radius = torch.where(grow, (2 * radius).clamp(max=self.max_radius), radius)
        lost = stats["on_boundary"] & (stats["decrease"] <= rounding)
        found = (radius > torch.finfo(phi.dtype).eps * norm(phi)) & ~lost
        broken = ~torch.isfinite(length)  # a Hessian that is not finite: let the loop see it
        moves = ((accept & found) | broken).unsqueeze(-1)
        return torch.where(moves, proposal, phi), radius, found | broken
