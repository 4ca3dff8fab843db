"""Conjugate gradients, batched, preconditioned, and honest about negative curvature."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import Iterative, KrylovState
from implicit_optim._operator import Linearized
from implicit_optim._outcome import Solution, Status
from implicit_optim._vectors import dot, norm, selector


@dataclass(frozen=True)
class CG(Iterative):
    r"""Preconditioned conjugate gradients for symmetric positive definite ``A x = b``.

    Starting from ``x = 0``, step k minimises ``||x - A^-1 b||_A`` over the k-th Krylov space of
    ``M^-1 A``. It stops, task by task, when ``||b - A x|| <= max(rtol ||b||, atol)``.

    - A task that meets ``p.Ap <= 0`` (A is not positive definite there) keeps the iterate it has, the
      best one over the directions of positive curvature seen, with status ``NEGATIVE_CURVATURE``; the
      others go on. Stopped at its first iteration, or with ``max_steps=0``, it gets the first-order
      direction ``M^-1 b`` (``b / lam`` for a proximal problem), never zero.
    - SUCCESS under a tolerance means that the true residual meets it, in the dtype of b.
    - NaN or inf in b or in a product give NaN for that task alone, with status ``NONFINITE``.
    - A zero right-hand side gives exactly zero.

    Args:
        max_steps: iterations, one product each. Default: ``min(10 n, 1000)``.
        rtol: tolerance relative to ``||b||``. Default: 0 if ``max_steps`` is given, which asks for
            just these steps and never synchronises with the host; else ``max(1e-6, 100 eps)``.
        atol: absolute tolerance on the residual norm.
        check_every: with a tolerance, how many iterations between two looks whether all tasks are
            done; each look is one host synchronisation.
        min_curvature: for an operator that knows its proximal or damping term M, count
            ``p.Ap <= min_curvature p.Mp`` as negative curvature too; otherwise only ``p.Ap <= 0``.
            Where the data term is convex any value below 1 changes nothing. Where its negative
            curvature nearly cancels M, a few steps would come out up to ``1 / min_curvature`` times too
            long along p, with nothing else to show for it. Default: 0.1 for a fixed number of steps;
            0 with a tolerance, which asks for the solution whatever it is.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> A = iopt.Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64))
        >>> solution = iopt.linear_solve(
        ...     A, torch.tensor([1.0, 2.0], dtype=torch.float64), iopt.CG(rtol=1e-10)
        ... )
        >>> [round(v, 6) for v in solution.value.tolist()], solution.stats["steps"].item()
        ([0.090909, 0.636364], 2)

    Source: Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithms 5.3 and 7.1; Rajeswaran et al.
    2019, algorithm 2.
    """

    stats_names: ClassVar = ("steps", "residual_norm", "rhs_norm", "lanczos")
    needs_symmetry: ClassVar = True

    _must: ClassVar = dict(Iterative._must, min_curvature="lie in [0, 1)")

    min_curvature: float | None = None

    @torch.no_grad()
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """See [`LinearSolver.solve`][implicit_optim.LinearSolver.solve].

        Returns:
            ``stats``: ``steps`` (products that moved the iterate, int32), ``rhs_norm = ||b||`` and
            ``residual_norm``, in b's units: ``||b - A x||`` if there is a tolerance, which costs one
            more product; else that of the recurrence. For a task that was given the first-order
            direction it is that of ``x = 0``. ``lanczos [*batch, steps, 2]`` is what
            [`Solution.ritz_values`][implicit_optim.Solution] reads.
        """
        state = KrylovState(self, operator, b)
        least_share = self.min_curvature
        if least_share is None:
            least_share = 0.1 if state.fixed else 0.0
        if state.first_order is state.b:  # nothing is known of M
            least_share = 0.0
        x, r, p = torch.zeros_like(b), state.b, state.first_order
        rz = p_in_M = dot(r, p)  # p.Mp, by the recurrence of Steihaug 1983
        strength = torch.where(rz > 0, state.rhs_norm.square() / rz, 1.0)  # M, if a multiple of I
        norm_of_A = torch.zeros_like(rz)  # a lower bound, for what rounding makes of zero
        seen: list[tuple[Tensor, ...]] = []  # a number a task and step, read when all is over

        for k in range(state.max_steps):
            if state.finished(k):
                break
            asked, Ap = state.running, operator.mv(p)
            curvature, p_norm = dot(p, Ap), norm(p)
            norm_of_A = torch.maximum(norm_of_A, norm(Ap) / p_norm)
            least = state.eps * norm_of_A * p_norm.square()
            if least_share > 0:
                least = torch.maximum(least_share * p_in_M, least)
            moving = asked & ~(curvature <= least) & (curvature < math.inf)
            keep, alpha = selector(moving), (rz / curvature).unsqueeze(-1)
            x = keep(torch.addcmul(x, alpha, p), x)
            r = keep(torch.addcmul(r, alpha, Ap, value=-1), r)
            state.advance(moving, norm(r), moving)
            z = operator.precondition(r)
            rz, rz_before = dot(r, z), rz
            beta = rz / rz_before
            p = keep(torch.addcmul(z, beta.unsqueeze(-1), p), p)
            if least_share > 0:
                p_in_M = rz + beta.square() * p_in_M
            seen.append((asked, state.running, rz_before, beta, curvature, least))

        lanczos = b.new_zeros((*b.shape[:-1], 0, 2))
        if seen:
            columns = (torch.stack(column, -1) for column in zip(*seen, strict=True))
            asked, running, rz, beta, curvature, least = columns
            indefinite, broken = asked & (curvature <= least), asked & ~torch.isfinite(curvature)
            state.mark(indefinite.any(-1), Status.NEGATIVE_CURVATURE)
            state.mark(broken.any(-1), Status.NONFINITE)
            lanczos = _tridiagonal(asked, running, curvature / rz, beta)
            lanczos = lanczos * strength[..., None, None]
        solution = state.solution(x, monotone=False)
        return solution._replace(stats=solution.stats | {"lanczos": lanczos})


def _tridiagonal(asked: Tensor, running: Tensor, inverse: Tensor, beta: Tensor) -> Tensor:
    """Diagonal and off-diagonal of the matrix that CG builds, ``[*batch, steps, 2]``.

    The entries of an iteration that a task did not ask for are NaN, and zero beside the diagonal.

    Args:
        asked: whether a task was running before each iteration, ``[*batch, steps]``.
        running: whether after it.
        inverse: ``1 / alpha = p.Ap / r.z``.
        beta: ``r.z`` after the iteration over that before.
    """
    beta = torch.where(running, beta, 0.0)
    carried = torch.where(running, beta * inverse, 0.0)
    carried = torch.nn.functional.pad(carried[..., :-1], (1, 0))
    diagonal = torch.where(asked, inverse + carried, math.nan)
    beside = torch.where(running, beta.sqrt() * inverse, 0.0)
    return torch.stack([diagonal, beside], -1)
