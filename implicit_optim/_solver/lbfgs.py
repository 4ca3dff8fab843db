"""Limited-memory BFGS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._problem import InnerProblem
from implicit_optim._search import Scalars, Search, StrongWolfe, Vectors
from implicit_optim._solver.base import Evaluation, Searching, Step, move
from implicit_optim._solver.nonlinear_cg import shortened
from implicit_optim._vectors import dot, selector


class History(NamedTuple):
    """The last m pairs of each task, newest last.

    Attributes:
        s: moves, ``[*batch, m, n]``.
        y: changes of the gradient, ``[*batch, m, n]``.
        rho: ``1 / s.y``, ``[*batch, m]``; 0 where there is no pair.
        gamma: ``s.y / y.y`` of the newest pair, ``[*batch]``; 0 where there is none.
    """

    s: Float[Tensor, "*batch m n"]
    y: Float[Tensor, "*batch m n"]
    rho: Float[Tensor, "*batch m"]
    gamma: Scalars

    @classmethod
    def empty(cls, phi: Vectors, memory: int) -> History:
        """No pairs."""
        pairs = torch.zeros_like(phi).unsqueeze(-2).expand(*phi.shape[:-1], memory, phi.shape[-1])
        return cls(pairs, pairs, pairs.sum(-1), pairs.sum((-2, -1)))

    def add(self, s: Vectors, y: Vectors) -> History:
        """With one more pair, for the tasks whose ``s.y`` is positive beyond rounding."""
        sy, yy, ss = (dot(*pair) for pair in ((s, y), (y, y), (s, s)))
        eps = torch.finfo(s.dtype).eps
        good = (sy > eps * (ss * yy).sqrt()) & (yy > 0) & yy.isfinite()
        newer = _push(self.s, s, -2), _push(self.y, y, -2), _push(self.rho, 1 / sy, -1), sy / yy
        return History(*map(selector(good), newer, self))

    def direction(self, grad: Vectors, pairs: int) -> Vectors:
        """``-H grad`` by the two-loop recursion over the newest ``pairs`` pairs.

        The initial H is gamma, or ``min(1, 1 / ||grad||)`` for a task without a pair.
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


def _push(old: Tensor, new: Tensor, dim: int) -> Tensor:
    """All but the oldest along a dimension, followed by the new one."""
    return torch.cat((old.narrow(dim, 1, old.shape[dim] - 1), new.unsqueeze(dim)), dim)


class LbfgsState(NamedTuple):
    """What a step remembers.

    Attributes:
        last: iterate and gradient ``[*batch, n]`` where the step began; ``None`` before the first.
        history: the pairs of the steps before it.
        steps: how many steps there were, for all tasks together.
        evaluation: at the iterate it led to, if the search has made it.
    """

    last: tuple[Vectors, Vectors] | None
    history: History
    steps: int = 0
    evaluation: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class lbfgs(Searching):
    """Limited-memory BFGS.

    ``phi <- phi - t H grad F`` with t from the search. H is the BFGS approximation of the inverse
    Hessian: ``(s.y / y.y) I``, updated with the last m moves s and changes y of the gradient.

    Each task has its own history. It skips pairs whose ``s.y`` is not positive beyond rounding. A task
    whose direction is no descent direction discards its history and takes the gradient.

    Args:
        memory: m, how many pairs to keep, >= 1; they are 2 m vectors like phi.
        line_search: chooses t. Default: strong Wolfe from 1, the only search here that makes ``s.y``
            positive.
        max_steps: most steps; each costs a gradient per trial, mostly one.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done (one host
            synchronisation each).

    Raises:
        TypeError: line_search is no line search.
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

    _must: ClassVar = dict(Searching._must, memory="be >= 1")

    memory: int = 10
    line_search: Search = field(default_factory=StrongWolfe)

    def init(self, problem: InnerProblem, phi: Tensor) -> LbfgsState:
        """No iterate to compare with, and an empty history."""
        return LbfgsState(None, History.empty(phi, self.memory))

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: LbfgsState) -> Step:
        """One quasi-Newton direction and one search along it."""
        history = state.history
        if state.last is not None:
            last_phi, last_grad = state.last
            history = history.add(phi - last_phi, at.grad - last_grad)
        direction = history.direction(at.grad, min(state.steps, self.memory))
        restart = selector(~(dot(at.grad, direction) < 0))  # also where that is NaN
        direction = restart(-shortened(at.grad).unsqueeze(-1) * at.grad, direction)
        rho, gamma = restart(0.0, history.rho), restart(0.0, history.gamma)
        history = history._replace(rho=rho, gamma=gamma)
        slope = dot(at.grad, direction)
        moved = move(problem, phi, at, direction, slope, self.line_search)
        state = LbfgsState((phi, at.grad), history, state.steps + 1, moved.evaluation)
        return moved.end, state, moved.found
