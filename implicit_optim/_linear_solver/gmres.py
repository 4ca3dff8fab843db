"""GMRES: for matrices that are not symmetric, batched."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import Iterative, KrylovState
from implicit_optim._operator import Linearized
from implicit_optim._outcome import Solution, Status
from implicit_optim._vectors import directions, norm, products, unit, where


@dataclass(frozen=True)
class GMRES(Iterative):
    r"""Generalised minimal residuals, for any invertible ``A x = b``.

    Step k minimises ``||b - A x||`` over the k-th Krylov space of ``A M^-1``, M the part of A that is
    easy to invert (from the right, so that the residual is the true one). It keeps its basis, k vectors
    of the size of b a task, and begins anew from where it is after ``restart`` steps; a restarted solve
    can stall. It stops, task by task, when ``||b - A x|| <= max(rtol ||b||, atol)``.

    - A matrix that is singular on the Krylov space has status ``SINGULAR``, and the best iterate.
    - NaN or inf in b or in a product give NaN for that task alone, with status ``NONFINITE``.
    - A zero right-hand side gives exactly zero; ``max_steps=0`` the direction ``M^-1 b``.

    Args:
        max_steps: steps, one product each. Default: ``min(10 n, 1000)``.
        rtol: tolerance relative to ``||b||``. Default: 0 if ``max_steps`` is given, which asks for
            just these steps and never synchronises with the host; else ``max(1e-6, 100 eps)``.
        atol: absolute tolerance on the residual norm.
        check_every: with a tolerance, steps between two looks whether all tasks are done (one host
            synchronisation each).
        restart: most steps between two restarts.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> turn = iopt.Dense(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), symmetric=False)
        >>> x = iopt.linear_solve(turn, torch.tensor([1.0, 2.0]), iopt.GMRES()).value
        >>> [round(v, 5) for v in x.tolist()]
        [2.0, -1.0]

    Source: Saad & Schultz 1986; Saad 2003, sections 6.5 and 9.3.2.
    """

    _must: ClassVar = dict(Iterative._must, restart="be >= 1")

    restart: int = 50

    @torch.no_grad()
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """See [`LinearSolver.solve`][implicit_optim.LinearSolver.solve].

        Returns:
            ``stats``: ``steps`` (int32), ``residual_norm = ||b - A x||`` and ``rhs_norm``, in b's
            units; with a tolerance the true residual, which costs a product, else the recurrence's.
        """
        state = KrylovState(self, operator, b)
        x, r = torch.zeros_like(b), state.b
        longest = max(1, min(self.restart, b.shape[-1]))
        for taken in range(0, state.max_steps, longest):
            if taken > 0:
                r = state.b - operator.mv(x)
                state.restart(norm(r))
            if state.finished(0):
                break
            active = state.running  # a task that is done before the others keeps all of the cycle
            size = min(longest, state.max_steps - taken)
            change, shorter, residual = self._cycle(state, r, size)
            lost = active & state.is_lost(x + change)
            x = where(active, x + where(lost, shorter, change), x)
            state.take_back(lost, residual)
        return state.solution(x)

    def _cycle(self, state: KrylovState, r: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The change of x that minimises the residual over ``size`` more dimensions.

        Also that of one dimension less where a task came to its end, and the residual norm there.
        """
        operator, length = state.operator, norm(r)
        rest = residual = length
        basis = [unit(r, length)]
        right, shorter, columns = [], [], []  # of the least-squares problem
        rotations: list[tuple[Tensor, Tensor]] = []
        for j in range(size):
            if j > 0 and state.finished(j):
                break
            active, w = state.running, operator.mv(operator.precondition(basis[j]))
            known = torch.stack(basis, -2)
            size_before, h = norm(w), torch.zeros_like(known[..., 0])
            for _ in range(2):  # twice is enough (Giraud et al. 2005)
                part = products(known, w)
                w, h = w - directions(part, known), h + part
            rounding = state.rounding(size_before)
            length = norm(w)
            invariant = length <= rounding
            length = torch.where(invariant, 0.0, length)
            column = list(h.unbind(-1))
            for i, (c, s) in enumerate(rotations):
                above, below = column[i], column[i + 1]
                column[i], column[i + 1] = c * above + s * below, c * below - s * above
            diagonal = torch.hypot(column[j], length)
            state.stop(~torch.isfinite(size_before), Status.NONFINITE)
            state.stop(diagonal <= rounding, Status.SINGULAR)
            used = state.running
            safe = torch.where(used, diagonal, 1.0)
            c, s = torch.where(used, column[j] / safe, 1.0), torch.where(used, length / safe, 0.0)
            rotations.append((c, s))
            columns.append([*(torch.where(used, value, 0.0) for value in column[:j]), safe])
            right.append(torch.where(used, c * rest, 0.0))
            residual = torch.where(used, rest.abs(), residual)
            rest = torch.where(used, -s * rest, rest)
            state.advance(used & ~invariant, rest.abs(), active)
            shorter.append(torch.where(used & ~state.running, 0.0, right[j]))
            basis.append(unit(w, length))
        count, zero = len(columns), torch.zeros_like(rest)
        upper = [torch.stack(col + [zero] * (count - len(col)), -1) for col in columns]
        sides = torch.stack([torch.stack(right, -1), torch.stack(shorter, -1)], -1)
        y = torch.linalg.solve_triangular(torch.stack(upper, -1), sides, upper=True)
        known = torch.stack(basis[:count], -2)
        whole, less = (operator.precondition(directions(c, known)) for c in y.unbind(-1))
        return whole, less, residual
