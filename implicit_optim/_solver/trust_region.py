"""A trust region around each iterate: Newton's method where the Hessian is indefinite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit_optim._checks import check
from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._problem import InnerProblem
from implicit_optim._solver.base import Evaluation, SecondOrder, State, Step
from implicit_optim._solver.steihaug import steihaug
from implicit_optim._vectors import norm


def trust_region_update(
    phi: Float[Tensor, "*batch n"],
    radius: Float[Tensor, "*batch"],
    operator: Linearized,
    values: Callable[[Tensor], Tensor],
    *,
    max_radius: float,
    eta: float,
    cg_steps: int | None,
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """The next iterate, the next radius, and whether that is still above rounding.

    Both decreases, the actual one and the model's, are enlarged by the rounding of F: near the
    minimiser their quotient goes to 1 rather than to noise. A radius is below rounding if no step of its
    length changes phi, or if it keeps the model's decrease below the rounding of F.

    Args:
        phi: iterate ``[*batch, n]``.
        radius: of the region, ``[*batch]``.
        operator: curvature, gradient and value at phi.
        values: the objective, ``[*batch, n]`` to ``[*batch]``.
        max_radius: the radius never exceeds it.
        eta: least quotient of actual and predicted decrease of a step that is taken.
        cg_steps: most products, see [`steihaug`][implicit_optim._linear_solver.steihaug].
    """
    grad, value = operator.gradient, operator.value
    assert grad is not None and value is not None
    eps = torch.finfo(phi.dtype).eps
    forcing = norm(grad).sqrt().clamp(max=0.5)
    move, _, stats = steihaug(operator, -grad, radius, rtol=forcing, max_steps=cg_steps)
    length, proposal = stats["norm"], phi + move
    rounding = 10 * eps * value.abs()
    predicted = stats["decrease"] + rounding
    actual = value - values(proposal) + rounding
    # Products instead of quotients, so that nothing is divided by zero; all are False for NaN.
    accept, fair = actual >= eta * predicted, actual >= predicted / 4
    grow = (actual > 0.75 * predicted) & stats["on_boundary"]
    # A quarter of the step, not of the radius: a step inside the region would only be tried again.
    radius = torch.where(fair, radius, length / 4)
    radius = torch.where(grow, (2 * radius).clamp(max=max_radius), radius)
    lost = stats["on_boundary"] & (stats["decrease"] <= rounding)
    found = (radius > eps * norm(phi)) & ~lost
    broken = ~torch.isfinite(length)  # no rejected step, but a Hessian that is not finite
    moves = ((accept & found) | broken).unsqueeze(-1)
    return torch.where(moves, proposal, phi), radius, found | broken


def check_trust_region(
    radius: float, max_radius: float, eta: float, cg_steps: int | None = None
) -> None:
    """Raise if a setting of a trust region is out of range."""
    check("max_radius", max_radius, "be finite and > 0")
    if not 0 < radius <= max_radius:
        raise ValueError(f"Invalid radius: {radius}: it must lie in (0, max_radius = {max_radius}]")
    check("eta", eta, "lie in [0, 1/4)")
    if cg_steps is not None:
        check("cg_steps", cg_steps, "be >= 1")


@dataclass(frozen=True, kw_only=True)
class trust_region(SecondOrder):
    """Newton's method in a trust region, for objectives whose Hessian is indefinite.

    Each step lowers the model ``grad F . p + p.Ap / 2`` in the ball ``||p|| <= radius`` by Steihaug's
    conjugate gradients, which follow a direction of negative curvature to the boundary. It is taken if
    F falls by at least ``eta`` of what the model predicts. Else the iterate stays, which is no failure:
    the radius becomes a quarter of the step, as it does below 1/4 of the prediction. Above 3/4 of it, on
    the boundary, the radius doubles. There is no line search, and each task has its own radius.

    A task ends with ``LINE_SEARCH`` only where its radius has shrunk below the rounding of phi or of F.
    At a saddle point itself, where the gradient is zero, there is no step to take.

    Args:
        radius: at the start, > 0, in units of phi.
        max_radius: the radius never exceeds it.
        eta: least share of the predicted decrease, in [0, 1/4).
        cg_steps: most CG steps a step, one product each. They end before, in each task, at a residual
            of ``min(1/2, sqrt ||grad F||) ||grad F||``. Default: ``min(10 n, 1000)``, with a host
            synchronisation each to see whether all tasks are done; with a number there is none.
        curvature: the matrix A, [`Hessian`][implicit_optim.Hessian] or
            [`GaussNewton`][implicit_optim.GaussNewton].
        max_steps: most steps, rejected ones included; each costs a gradient, its CG steps and a value.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two looks whether all tasks are done (one host
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

    radius: float = 1.0
    max_radius: float = 1000.0
    eta: float = 0.15
    cg_steps: int | None = None
    curvature: type[Hessian] | type[GaussNewton] = Hessian
    max_steps: int = 100
    tol: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trust_region(self.radius, self.max_radius, self.eta, self.cg_steps)

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """The radius of each task ``[*batch]``."""
        return (phi.new_full(phi.shape[:-1], self.radius),)

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One step, taken or not."""
        assert at.operator is not None
        proposal, radius, found = trust_region_update(
            phi,
            state[0],
            at.operator,
            problem.values,
            max_radius=self.max_radius,
            eta=self.eta,
            cg_steps=self.cg_steps,
        )
        return proposal, (radius,), found
