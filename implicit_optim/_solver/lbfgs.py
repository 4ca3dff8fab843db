"""Limited-memory BFGS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._problem import InnerProblem
from implicit_optim._search import Search, StrongWolfe
from implicit_optim._solver.base import Evaluation, Searching, State, Step, move
from implicit_optim._solver.nonlinear_cg import shortened
from implicit_optim._vectors import dot, where


class History(NamedTuple):
    """The last m pairs of each task, the newest one last.

    Attributes:
        s: moves, ``[*batch, m, n]``.
        y: changes of the gradient, ``[*batch, m, n]``.
        rho: ``1 / s.y``, ``[*batch, m]``; 0 where there is no pair.
        gamma: ``s.y / y.y`` of the newest pair, ``[*batch]``; 0 where there is none.
    """

    s: Float[Tensor, "*batch m n"]
    y: Float[Tensor, "*batch m n"]
    rho: Float[Tensor, "*batch m"]
    gamma: Float[Tensor, "*batch"]

    @classmethod
    def empty(cls, phi: Float[Tensor, "*batch n"], memory: int) -> History:
        """No pairs."""
        pairs = torch.zeros_like(phi).unsqueeze(-2).expand(*phi.shape[:-1], memory, phi.shape[-1])
        return cls(pairs, pairs, pairs.sum(-1), pairs.sum((-2, -1)))

    def add(self, s: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch n"]) -> History:
        """With one more pair for the tasks in which ``s.y`` is positive beyond rounding."""
        sy, yy, ss = (dot(*pair) for pair in ((s, y), (y, y), (s, s)))
        eps = torch.finfo(s.dtype).eps
        good = (sy > eps * (ss * yy).sqrt()) & (yy > 0) & yy.isfinite()
        newer = (s.unsqueeze(-2), y.unsqueeze(-2), (1 / sy).unsqueeze(-1))
        older = (self.s[..., 1:, :], self.y[..., 1:, :], self.rho[..., 1:])
        dims = (-2, -2, -1)
        rolled = [torch.cat(pair, d) for *pair, d in zip(older, newer, dims, strict=True)]
        kept = zip((*rolled, sy / yy), self, strict=True)
        return History(*(where(good, new, old) for new, old in kept))

    def direction(self, grad: Float[Tensor, "*batch n"], pairs: int) -> Tensor:
        """``-H grad`` by the two-loop recursion over the newest ``pairs`` pairs.

        H starts from gamma, without a pair from ``min(1, 1 / ||grad||)``.
        """
        q, alphas = grad, []
        for i in range(-1, -pairs - 1, -1):
            s, y = self.s[..., i, :], self.y[..., i, :]
            alphas.append((self.rho[..., i] * dot(s, q)).unsqueeze(-1))
            q = q - alphas[-1] * y
        q = torch.where(self.gamma > 0, self.gamma, shortened(grad)).unsqueeze(-1) * q
        for i in range(-pairs, 0):
            s, y = self.s[..., i, :], self.y[..., i, :]
            beta = (self.rho[..., i] * dot(y, q)).unsqueeze(-1)
            q = q + (alphas.pop() - beta) * s
        return -q


@dataclass(frozen=True, kw_only=True)
class lbfgs(Searching):
    """Limited-memory BFGS.

    ``phi <- phi - t H grad F`` with t from the search; H is the BFGS approximation of the inverse
    Hessian from the last m moves s and changes y of the gradient, on ``(s.y / y.y) I``.

    Each task has its own history. A pair whose ``s.y`` is not positive beyond rounding is left out. A
    task whose direction does not descend forgets its history and takes the gradient.

    Args:
        memory: m, pairs kept, >= 1; 2 m vectors like phi.
        line_search: step lengths. Default: strong Wolfe from 1. Of the searches here it alone makes
            ``s.y`` positive.
        max_steps: most steps, each one gradient a trial, mostly one.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two looks whether all tasks are done (one host
            synchronisation each).

    Raises:
        TypeError: line_search is none.
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: (phi.cosh() - theta * phi).sum()
        >>> solution = iopt.minimize(
        ...     F, torch.zeros(2), torch.tensor([1.0, 2.0]), solver=iopt.lbfgs(tol=1e-5)
        ... )
        >>> [round(x, 4) for x in solution.value.tolist()]  # asinh of 1 and 2
        [0.8814, 1.4436]

    Source: Liu & Nocedal 1989; Nocedal & Wright 2006, algorithms 7.4 and 7.5, equation 7.20.
    """

    _must: ClassVar = {**Searching._must, "memory": "be >= 1"}

    memory: int = 10
    line_search: Search = field(default_factory=StrongWolfe)
    max_steps: int = 100
    tol: float = 0.0

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """Last iterate and gradient (none), the history, steps so far, and what is known."""
        return None, History.empty(phi, self.memory), 0, None

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One quasi-Newton direction and one search along it."""
        last, history, count, _ = state
        if last is not None:
            history = history.add(phi - last[0], at.grad - last[1])
        direction = history.direction(at.grad, min(count, self.memory))
        descends = dot(at.grad, direction) < 0
        steepest = -shortened(at.grad).unsqueeze(-1) * at.grad
        direction = where(descends, direction, steepest)
        history = history._replace(
            rho=where(descends, history.rho, torch.zeros_like(history.rho)),
            gamma=where(descends, history.gamma, torch.zeros_like(history.gamma)),
        )
        slope = dot(at.grad, direction)
        proposal, _, found, known = move(problem, phi, at, direction, slope, self.line_search)
        return proposal, ((phi, at.grad), history, count + 1, known), found
