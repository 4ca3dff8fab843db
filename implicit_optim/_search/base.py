"""Step lengths along a search direction, one per task: the interface, and the simple ones."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit_optim._checks import Settings
from implicit_optim._vectors import dot, none_running

Scalars = Float[Tensor, "*batch"]
Vectors = Float[Tensor, "*batch n"]
Along = Callable[[Scalars], Scalars]  # the objective along a line
Found = tuple[Scalars, Bool[Tensor, "*batch"]]  # step lengths, and which tasks found one


class Minimised(Protocol):
    """What is minimised, as a function of ``phi [*batch, n]``: an inner problem, or a closure's loss."""

    def values(self, phi: Vectors, /) -> Scalars:
        """Its values, ``[*batch]``."""

    def grad_and_value(self, phi: Vectors, /) -> tuple[Vectors, Scalars]:
        """Gradients ``[*batch, n]`` and values."""


class Line:
    """The objective along one direction a task: ``t -> F(phi + t d)``, and its slope there.

    Args:
        direction: d, ``[*batch, n]``.
        values: ``t [*batch]`` to ``F(phi + t d) [*batch]``.
        grads_and_values: t to ``grad F [*batch, n]`` and ``F [*batch]`` there.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> phi = torch.tensor([1.0])
        >>> problem = iopt.InnerProblem.bind(lambda phi, theta: phi @ phi, phi, ())
        >>> line = iopt.Line.of(problem, phi, torch.tensor([-1.0]))
        >>> line(torch.tensor(0.5)).item()
        0.25
        >>> [x.item() for x in line.value_and_slope(torch.tensor(0.5))]
        [0.25, -1.0]
    """

    def __init__(
        self,
        direction: Vectors,
        values: Along,
        grads_and_values: Callable[[Scalars], tuple[Vectors, Scalars]],
    ) -> None:
        self.direction, self._values, self._grads_and_values = direction, values, grads_and_values
        self._last: tuple[Scalars, Scalars, Tensor] | None = None

    @classmethod
    def of(cls, problem: Minimised, phi: Vectors, direction: Vectors) -> Line:
        """The line from phi along the direction."""
        point = lambda t: phi + t.unsqueeze(-1) * direction  # noqa: E731
        values = lambda t: problem.values(point(t))  # noqa: E731
        return cls(direction, values, lambda t: problem.grad_and_value(point(t)))

    def __call__(self, t: Scalars) -> Scalars:
        """``F(phi + t d)``, ``[*batch]``."""
        return self._values(t)

    def value_and_slope(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """``F(phi + t d)`` and its slope ``grad F . d``, ``[*batch]`` each, for one gradient."""
        grad, value = self._grads_and_values(t)
        self._last = (t, value, grad)
        return value, dot(grad, self.direction)

    def known(self, t: Scalars) -> tuple[Scalars, Vectors] | None:
        """Value and gradient at ``t``, if the last slopes were asked for at this very tensor."""
        if self._last is None or self._last[0] is not t:
            return None
        return self._last[1:]


class Search(Settings, abc.ABC):
    """Chooses the step length t of ``phi + t d``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class Half(iopt.Search):
        ...     def search(self, along, value, slope):
        ...         return torch.full_like(value, 0.5), torch.ones_like(value, dtype=torch.bool)
        >>> solver = iopt.newton_cg(line_search=Half(), max_steps=1)
        >>> iopt.minimize(
        ...     lambda phi, theta: phi @ phi, torch.ones(1), (), solver=solver
        ... ).value.item()
        0.5
    """

    @abc.abstractmethod
    def search(self, along: Line, value: Scalars, slope: Scalars) -> Found:
        """Find a step per task.

        Args:
            along: ``t -> F(phi + t d)`` for every task, ``[*batch]`` to ``[*batch]``; its method
                ``value_and_slope`` returns the slope as well.
            value: ``F(phi)``, ``[*batch]``.
            slope: directional derivative ``grad F . d`` at phi, ``[*batch]``, negative.

        Returns:
            The step lengths ``[*batch]`` (0 where none was found) and whether one was found.
        """


@dataclass(frozen=True)
class FixedStep(Search):
    """Always the same step length.

    Args:
        lr: the step, > 0.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.FixedStep(0.5).search(lambda t: t, torch.zeros(2), -torch.ones(2))[0].tolist()
        [0.5, 0.5]
    """

    _must: ClassVar = {"lr": "be finite and > 0"}

    lr: float = 1.0

    def search(self, along: Along, value: Scalars, slope: Scalars) -> Found:
        """See [`Search.search`][implicit_optim.Search.search]; evaluates nothing."""
        return torch.full_like(value, self.lr), torch.ones_like(value, dtype=torch.bool)


@dataclass(frozen=True)
class Armijo(Search):
    """Backtracking until the objective falls by enough.

    The first t of ``lr, lr shrink, lr shrink^2, ...`` with ``F(phi + t d) <= F(phi) + c1 t slope``, up
    to the rounding of F, so that a Newton step at the minimiser is not refused for its last digit.

    Args:
        lr: first step tried, > 0; 1 is Newton's.
        c1: share of the predicted decrease that is demanded, in (0, 1).
        shrink: factor between two trials, in (0, 1).
        max_trials: evaluations of the objective before the task gives up.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> along = lambda t: (1 - 4 * t) ** 2  # F = phi^2 at phi = 1, d = -4
        >>> iopt.Armijo().search(along, torch.tensor([1.0]), torch.tensor([-8.0]))[0].tolist()
        [0.25]

    Source: Armijo 1966; Nocedal & Wright 2006, algorithm 3.1.
    """

    _must: ClassVar = {
        "lr": "be finite and > 0",
        "c1": "lie in (0, 1)",
        "shrink": "lie in (0, 1)",
        "max_trials": "be >= 1",
    }

    lr: float = 1.0
    c1: float = 1e-4
    shrink: float = 0.5
    max_trials: int = 10

    def search(self, along: Along, value: Scalars, slope: Scalars) -> Found:
        """See [`Search.search`][implicit_optim.Search.search]; one evaluation a trial."""
        t = torch.full_like(value, self.lr)
        found = torch.zeros_like(value, dtype=torch.bool)
        rounding = 10 * torch.finfo(value.dtype).eps * value.abs()
        for trial in range(self.max_trials):
            if trial > 0 and none_running(~found):
                break
            enough = along(t) <= value + self.c1 * t * slope + rounding
            t = torch.where(found | enough, t, t * self.shrink)
            found = found | enough
        return torch.where(found, t, 0.0), found
