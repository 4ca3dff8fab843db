"""Nonlinear conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_optim._problem import InnerProblem
from implicit_optim._search import Scalars, Search, StrongWolfe, Vectors
from implicit_optim._solver.base import Evaluation, Searching, Step, move
from implicit_optim._vectors import dot, norm


class NonlinearCgState(NamedTuple):
    """What a step remembers; all zero before the first.

    Attributes:
        grad: gradient ``[*batch, n]`` where the step began.
        direction: d, ``[*batch, n]``.
        decrease: step length times slope, ``[*batch]``.
        evaluation: at the iterate it led to, if the search has made it.
    """

    grad: Vectors
    direction: Vectors
    decrease: Scalars
    evaluation: Evaluation | None = None

    @classmethod
    def zero(cls, phi: Vectors) -> NonlinearCgState:
        """The state before the first step."""
        zero = torch.zeros_like(phi)
        return cls(zero, zero, phi.new_zeros(phi.shape[:-1]))


def conjugate_step(grad: Vectors, last: NonlinearCgState) -> tuple[Vectors, Scalars, Scalars]:
    """``d = -g + beta d_last`` with ``beta = max(0, g.(g - g_last) / g_last.g_last)``.

    A task restarts from ``-g`` where d is no descent direction, and where ``g_last`` is zero.

    Returns:
        The direction d; ``g.d``; and the step length to try first, which to first order lowers F by as
        much as the last step did. The first of all steps moves by 1 at most.
    """
    beta = dot(grad, grad - last.grad) / last.grad.square().sum(-1)
    beta = torch.where((beta > 0) & beta.isfinite(), beta, 0.0)
    direction = beta.unsqueeze(-1) * last.direction - grad
    descends = (dot(grad, direction) < 0).unsqueeze(-1)
    direction = torch.where(descends, direction, -grad)
    slope = dot(grad, direction)
    length = last.decrease / slope
    length = torch.where((length > 0) & length.isfinite(), length, shortened(grad))
    return direction, slope, length


def shortened(grad: Vectors) -> Scalars:
    """``min(1, 1 / ||grad||)``."""
    return 1 / norm(grad).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class nonlinear_cg(Searching):
    """Nonlinear conjugate gradients of Polak and Ribiere, with restarts (PR+).

    ``d = -grad F + beta d_last``, ``phi <- phi + t d`` with t from the search,
    ``beta = max(0, grad F . (grad F - last grad F) / ||last grad F||^2)``

    A task restarts from ``-grad F`` where d is no descent direction. On a quadratic with an exact search
    these are the steps of linear conjugate gradients, of which n reach the minimiser.

    Args:
        line_search: chooses t, as a multiple of the step that to first order lowers F as much as the
            last one did; the first moves by 1 at most. Default: strong Wolfe with ``c2 = 0.1``.
        max_steps: most steps; each costs a gradient per trial, often two.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done (one host
            synchronisation each).

    Raises:
        TypeError: line_search is no line search.
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

    def init(self, problem: InnerProblem, phi: Tensor) -> NonlinearCgState:
        """No step to remember."""
        return NonlinearCgState.zero(phi)

    def step(
        self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: NonlinearCgState
    ) -> Step:
        """One conjugate direction and one search along it."""
        direction, slope, scale = conjugate_step(at.grad, state)
        scaled = scale.unsqueeze(-1) * direction
        end, t, found, evaluation = move(problem, phi, at, scaled, scale * slope, self.line_search)
        return end, NonlinearCgState(at.grad, direction, t * scale * slope, evaluation), found
