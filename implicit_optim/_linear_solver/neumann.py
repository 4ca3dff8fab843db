"""The Neumann series, with a step that cannot diverge."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import Iterative, KrylovState
from implicit_optim._operator import Linearized
from implicit_optim._outcome import Solution, Status
from implicit_optim._vectors import dot, norm, selector, unit

_PROBES = 4  # products that estimate the largest eigenvalue


@dataclass(frozen=True)
class Neumann(Iterative):
    r"""Truncated Neumann series ``A^-1 b = s sum_k (I - s M^-1 A)^k M^-1 b``, step by step.

    ``x <- x + s M^-1 (b - A x)``: what back-propagation through so many steps of gradient descent at the
    solution computes. It converges like ``(1 - 1/kappa)^k``, where CG does like
    ``(1 - 2/sqrt kappa)^k``: CG is the better choice wherever A is symmetric and definite.

    The step is ``1 / L``, with L estimated by 4 products of the power method; where it would not lower
    the residual, the one that lowers it most takes its place from there on. So it cannot diverge. A task
    in which no step lowers it, since ``r.A M^-1 r <= 0`` (A is indefinite, or turns r by 90 degrees or
    more), stops with the status ``NO_DESCENT`` and the iterate it has, the first-order direction
    ``M^-1 b`` if there was none.

    Args:
        max_steps: steps, one product each. Default: ``min(10 n, 1000)``.
        rtol: tolerance relative to ``||b||``. Default: 0 if ``max_steps`` is given, which asks for
            just these steps and never synchronises with the host; else ``max(1e-6, 100 eps)``.
        atol: absolute tolerance on the residual norm.
        check_every: with a tolerance, steps between two looks whether all tasks are done (one host
            synchronisation each).
        step: s > 0. Default: found as above.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> half = iopt.Dense(0.5 * torch.eye(2))
        >>> solver = iopt.Neumann(max_steps=3, step=1.0)
        >>> iopt.linear_solve(
        ...     half, torch.ones(2), solver
        ... ).value.tolist()  # 1 + 1/2 + 1/4, not yet 2
        [1.75, 1.75]

    Source: Lorraine, Vicol & Duvenaud 2020, "Optimizing millions of hyperparameters by implicit
    differentiation", algorithm 3.
    """

    _must: ClassVar = dict(Iterative._must, step="be finite and > 0")

    step: float | None = None

    @torch.no_grad()
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """See [`LinearSolver.solve`][implicit_optim.LinearSolver.solve].

        Returns:
            ``stats``: ``steps`` (that moved the iterate, int32), ``residual_norm = ||b - A x||`` and
            ``rhs_norm``, in b's units; with a tolerance the true residual, which costs a product, else
            the recurrence's.
        """
        state = KrylovState(self, operator, b)
        x, r = torch.zeros_like(b), state.b
        step = self._first_step(operator, r)
        for k in range(state.max_steps):
            if state.finished(k):
                break
            d = operator.precondition(r)
            Ad = operator.mv(d)
            gain, square = dot(r, Ad), dot(Ad, Ad)
            state.stop(~torch.isfinite(square), Status.NONFINITE)
            state.stop(gain <= 0, Status.NO_DESCENT)
            # ||r - s Ad||^2 = ||r||^2 - 2 s gain + s^2 square
            too_long = state.running & (step * square >= 2 * gain)
            step = torch.where(too_long, gain / square, step)
            moving, s = state.running, step.unsqueeze(-1)
            choose = selector(moving)
            x = choose(torch.addcmul(x, s, d), x)
            r = choose(torch.addcmul(r, s, Ad, value=-1), r)
            state.advance(moving, norm(r), moving)
        return state.solution(x)

    def _first_step(self, operator: Linearized, b: Tensor) -> Tensor:
        if self.step is not None:
            return torch.full_like(b[..., 0], self.step)
        v, largest = b, torch.zeros_like(b[..., 0])
        for _ in range(_PROBES):
            v = operator.precondition(operator.mv(unit(v, norm(v))))
            largest = torch.maximum(largest, norm(v))
        usable = (largest > 0) & torch.isfinite(largest)
        return 1 / torch.where(usable, largest, 1.0)
