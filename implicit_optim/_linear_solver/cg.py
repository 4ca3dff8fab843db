"""Conjugate gradients, batched, preconditioned, and honest about negative curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import Iterative, scaled
from implicit_optim._operator import Linearized
from implicit_optim._outcome import Solution, Status, status_of
from implicit_optim._vectors import dot, none_running, norm, selector, where


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

    _must: ClassVar = {**Iterative._must, "min_curvature": "lie in [0, 1)"}

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
        eps = torch.finfo(b.dtype).eps
        max_steps, rtol, fixed = self.limits(b)
        b, scale, rhs_norm, target = scaled(b, rtol, self.atol)
        residual_norm = rhs_norm

        first_order = operator.precondition(b)
        least_share = (0.1 if fixed else 0.0) if self.min_curvature is None else self.min_curvature
        floor = 0.0 if first_order is b else least_share
        x, r, p, rz = torch.zeros_like(b), b, first_order, dot(b, first_order)
        p_in_M = rz  # p.Mp, by the recurrence of Steihaug 1983
        norm_of_A = torch.zeros_like(rhs_norm)  # a lower bound, for what rounding makes of zero
        nonfinite = ~torch.isfinite(rhs_norm)
        running = ~nonfinite & (residual_norm > target)
        strength = torch.where(rz > 0, rhs_norm.square() / rz, 1.0)  # M, if a multiple of I
        seen = _Seen([running], [], [rz], [], [])

        for k in range(max_steps):
            if not fixed and k % self.check_every == 0 and none_running(running):
                break
            Ap = operator.mv(p)
            curvature, p_norm = dot(p, Ap), norm(p)
            norm_of_A = torch.maximum(norm_of_A, norm(Ap) / p_norm)
            least = eps * norm_of_A * p_norm.square()
            if floor > 0:
                least = torch.maximum(floor * p_in_M, least)
            moving = running & ~(curvature <= least) & (curvature < math.inf)
            keep, alpha = selector(moving), (rz / curvature).unsqueeze(-1)
            x = keep(torch.addcmul(x, alpha, p), x)
            r = keep(torch.addcmul(r, alpha, Ap, value=-1), r)
            residual_norm = norm(r)
            running = moving & (residual_norm > target)
            z = operator.precondition(r)
            rz, rz_before = dot(r, z), rz
            beta = rz / rz_before
            p = keep(torch.addcmul(z, beta.unsqueeze(-1), p), p)
            if floor > 0:
                p_in_M = rz + beta.square() * p_in_M
            seen.add(running, moving, rz, curvature, least)

        steps, indefinite, broken = seen.counts()
        nonfinite = nonfinite | broken | ~torch.isfinite(residual_norm)
        stopped_at_once = (steps == 0) & (residual_norm > target)
        if not fixed:  # the recurrence drifts away from b - A x: one more product, for honesty
            true_norm = norm(b - operator.mv(x))
            residual_norm = torch.where(nonfinite | stopped_at_once, residual_norm, true_norm)
        x = where(stopped_at_once, first_order, x) * scale.unsqueeze(-1)
        x = where(nonfinite, math.nan, x)
        out_of_steps = [] if fixed else [(residual_norm > 1.01 * target, Status.MAX_STEPS)]
        status = status_of(
            *out_of_steps, (indefinite, Status.NEGATIVE_CURVATURE), (nonfinite, Status.NONFINITE)
        )
        lanczos = seen.tridiagonal() * strength[..., None, None]
        return self._solution(x, status, steps, scale * residual_norm, scale * rhs_norm, lanczos)


class _Seen(NamedTuple):
    """What the iterations leave behind, a number a task and iteration; read when they are over.

    Attributes:
        running: whether a task was going on before the first iteration, and after each.
        moving: whether the iteration moved it.
        rz: ``r.z`` before the first iteration, and after each.
        curvature: ``p.Ap``.
        least: what it had to exceed.
    """

    running: list[Tensor]
    moving: list[Tensor]
    rz: list[Tensor]
    curvature: list[Tensor]
    least: list[Tensor]

    def add(self, *numbers: Tensor) -> None:
        """One more iteration."""
        for so_far, number in zip(self, numbers, strict=True):
            so_far.append(number)

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """How many iterations moved each task; whether one was indefinite, or not finite."""
        if not self.moving:
            none = torch.zeros_like(self.running[0])
            return none.to(torch.int32), none, none
        asked, curvature = torch.stack(self.running[:-1], -1), torch.stack(self.curvature, -1)
        indefinite = asked & (curvature <= torch.stack(self.least, -1))
        broken = asked & ~torch.isfinite(curvature)
        steps = torch.stack(self.moving, -1).sum(-1, dtype=torch.int32)
        return steps, indefinite.any(-1), broken.any(-1)

    def tridiagonal(self) -> Tensor:
        """Diagonal and off-diagonal of the matrix that CG builds, ``[*batch, steps, 2]``.

        The entries of an iteration that a task did not ask for are NaN, and zero beside the diagonal.
        """
        rz = torch.stack(self.rz, -1)
        if not self.moving:
            return rz.new_zeros((*rz.shape[:-1], 0, 2))
        running, inverse = torch.stack(self.running, -1), torch.stack(self.curvature, -1)
        asked, going_on = running[..., :-1], running[..., 1:]
        inverse = inverse / rz[..., :-1]  # 1 / alpha
        beta = torch.where(going_on, rz[..., 1:] / rz[..., :-1], 0.0)
        carried = torch.where(going_on, beta * inverse, 0.0)
        carried = torch.nn.functional.pad(carried[..., :-1], (1, 0))
        diagonal = torch.where(asked, inverse + carried, math.nan)
        beside = torch.where(going_on, beta.sqrt() * inverse, 0.0)
        return torch.stack([diagonal, beside], -1)
