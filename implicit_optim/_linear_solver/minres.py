"""MINRES: for symmetric matrices that need not be definite, batched."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import Iterative, KrylovState
from implicit_optim._operator import Linearized
from implicit_optim._outcome import Solution, Status
from implicit_optim._vectors import dot, norm, unit, where


@dataclass(frozen=True)
class MINRES(Iterative):
    r"""Minimal residuals, for symmetric ``A x = b``, definite or not.

    Step k minimises ``||b - A x||`` over the k-th Krylov space of A: where CG breaks down at negative
    curvature, this solves the stationarity equations all the same. Whether their solution is of use is
    another matter: at a saddle point phi is no minimiser, and the gradient is that of the saddle.
    There is no preconditioner. It stops, task by task, when ``||b - A x|| <= max(rtol ||b||, atol)``.

    - A matrix that is singular on the Krylov space has status ``SINGULAR``, and the best iterate.
    - NaN or inf in b or in a product give NaN for that task alone, with status ``NONFINITE``.
    - A zero right-hand side gives exactly zero; ``max_steps=0`` the first-order direction.

    Args:
        max_steps: steps, one product each. Default: ``min(10 n, 1000)``.
        rtol: tolerance relative to ``||b||``. Default: 0 if ``max_steps`` is given, which asks for
            just these steps and never synchronises with the host; else ``max(1e-6, 100 eps)``.
        atol: absolute tolerance on the residual norm.
        check_every: with a tolerance, steps between two looks whether all tasks are done (one host
            synchronisation each).

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> saddle = iopt.Dense(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        >>> x = iopt.linear_solve(saddle, torch.tensor([1.0, 1.0]), iopt.MINRES()).value
        >>> [round(v, 5) for v in x.tolist()]
        [1.0, -0.5]

    Source: Paige & Saunders 1975; Choi, Paige & Saunders 2011, table 1.
    """

    needs_symmetry: ClassVar = True

    @torch.no_grad()
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """See [`LinearSolver.solve`][implicit_optim.LinearSolver.solve].

        Returns:
            ``stats``: ``steps`` (int32), ``residual_norm = ||b - A x||`` and ``rhs_norm``, in b's
            units; with a tolerance the true residual, which costs a product, else the recurrence's.
        """
        state = KrylovState(self, operator, b)
        zero = torch.zeros_like(state.rhs_norm)
        x = before = d = d_before = torch.zeros_like(b)
        beta = rest = state.rhs_norm
        v = unit(state.b, beta)
        c, s, delta, far = zero - 1, zero, zero, zero  # a rotation, and entries of the next column
        beta_before = zero
        for k in range(state.max_steps):
            if state.finished(k):
                break
            active, Av = state.running, operator.mv(v)
            alpha, rounding = dot(v, Av), state.rounding(norm(Av))
            w = Av - alpha.unsqueeze(-1) * v - beta_before.unsqueeze(-1) * before
            beta = norm(w)
            beta = torch.where(beta <= rounding, 0.0, beta)
            # The last rotation, then a new one: a column of the triangular factor.
            near, diagonal = c * delta + s * alpha, s * delta - c * alpha
            further, far, delta = far, s * beta, -c * beta
            pivot = torch.hypot(diagonal, beta)
            state.stop(~torch.isfinite(alpha), Status.NONFINITE)
            # Errors of the basis add up from step to step.
            state.stop(pivot <= (k + 1) * rounding, Status.SINGULAR)
            safe = torch.where(state.running, pivot, 1.0)
            c, s = diagonal / safe, beta / safe
            new = v - further.unsqueeze(-1) * d_before - near.unsqueeze(-1) * d
            d, d_before = new / safe.unsqueeze(-1), d
            proposal = torch.addcmul(x, (c * rest).unsqueeze(-1), d)
            state.stop(state.is_lost(proposal), Status.SINGULAR)
            used = state.running
            x = where(used, proposal, x)
            rest = torch.where(used, s * rest, rest)
            state.advance(used & (beta > 0), rest.abs(), active)
            before, v, beta_before = v, unit(w, beta), beta
        return state.solution(x)
