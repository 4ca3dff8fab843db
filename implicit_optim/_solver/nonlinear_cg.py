"""Nonlinear conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from implicit_optim._problem import InnerProblem
from implicit_optim._search import Scalars, Search, StrongWolfe, Vectors
from implicit_optim._solver.base import Evaluation, Searching, State, Step, move
from implicit_optim._vectors import dot, norm


def conjugate_direction(
    grad: Vectors, last_grad: Vectors, last_direction: Vectors
) -> tuple[Vectors, Scalars]:
    """``d = -g + beta d_last``, ``beta = max(0, g.(g - g_last) / g_last.g_last)``, and ``g.d``.

    Where that does not descend, the task starts again from ``-g``; so it does where the last are zero.
    """
    beta = dot(grad, grad - last_grad) / last_grad.square().sum(-1)
    beta = torch.where((beta > 0) & beta.isfinite(), beta, 0.0)
    direction = beta.unsqueeze(-1) * last_direction - grad
    descends = (dot(grad, direction) < 0).unsqueeze(-1)
    direction = torch.where(descends, direction, -grad)
    return direction, dot(grad, direction)


def first_length(grad: Vectors, slope: Scalars, decrease: Scalars) -> Scalars:
    """The step that a search tries first: it would lower F by as much as the last step promised.

    Args:
        grad: gradient ``[*batch, n]``.
        slope: ``grad . d``.
        decrease: step length times slope of the last step, 0 where there was none: then the first trial
            is of length 1 at most.
    """
    length = decrease / slope
    return torch.where((length > 0) & length.isfinite(), length, shortened(grad))


def shortened(grad: Vectors) -> Scalars:
    """``min(1, 1 / ||grad||)``."""
    return 1 / norm(grad).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class nonlinear_cg(Searching):
    """Nonlinear conjugate gradients of Polak and Ribiere, with restarts (PR+).

    ``d = -grad F + beta d_last``, ``phi <- phi + t d`` with t from the search,
    ``beta = max(0, grad F . (grad F - last grad F) / ||last grad F||^2)``

    A task starts again from ``-grad F`` where d does not descend. On a quadratic with an exact search
    these are the steps of linear conjugate gradients: n of them reach the minimiser.

    Args:
        line_search: step lengths, in units of the step that promises what the last one did; the first
            one is of length 1 at most. Default: strong Wolfe with a slope of 0.1 left over.
        max_steps: most steps, each one gradient a trial, often two.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two looks whether all tasks are done (one host
            synchronisation each).

    Raises:
        TypeError: line_search is none.
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: (theta * phi**2).sum() / 2
        >>> solver = iopt.nonlinear_cg(line_search=iopt.StrongWolfe(c2=1e-3), tol=1e-5)
        >>> solution = iopt.minimize(F, torch.ones(2), torch.tensor([1.0, 9.0]), solver=solver)
        >>> solution.stats["steps"].item(), bool(solution.value.abs().max() < 1e-5)
        (2, True)

    Source: Polak & Ribiere 1969; Nocedal & Wright 2006, algorithm 5.4, equations 5.45 and 3.60.
    """

    line_search: Search = field(default_factory=lambda: StrongWolfe(c2=0.1))
    max_steps: int = 100
    tol: float = 0.0

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """Last gradient, last direction, the decrease that it promised, and what is known."""
        return torch.zeros_like(phi), torch.zeros_like(phi), phi.new_zeros(phi.shape[:-1]), None

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One conjugate direction and one search along it."""
        last_grad, last_direction, decrease, _ = state
        direction, slope = conjugate_direction(at.grad, last_grad, last_direction)
        scale = first_length(at.grad, slope, decrease)
        scaled = scale.unsqueeze(-1) * direction
        proposal, t, found, known = move(problem, phi, at, scaled, scale * slope, self.line_search)
        return proposal, (at.grad, direction, t * scale * slope, known), found
