"""Step lengths along a search direction, one per task: the interface."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit_optim._checks import Settings
from implicit_optim._vectors import dot

Scalars = Float[Tensor, "*batch"]
Vectors = Float[Tensor, "*batch n"]
Along = Callable[[Scalars], Scalars]  # the objective along a line
Slopes = Callable[[Scalars], tuple[Vectors, Scalars]]  # its gradient and value there
Found = tuple[Scalars, Bool[Tensor, "*batch"]]  # step lengths, and which tasks found one


def rounding_of(value: Scalars) -> Scalars:
    """Largest difference between values of this size that may be rounding alone: ``10 eps |F|``."""
    return 10 * torch.finfo(value.dtype).eps * value.abs()


class Minimised(Protocol):
    """A function of ``phi [*batch, n]`` to minimise: an inner problem, or the loss of a closure."""

    def values(self, phi: Vectors, /) -> Scalars:
        """Value per task, ``[*batch]``."""

    def grad_and_value(self, phi: Vectors, /) -> tuple[Vectors, Scalars]:
        """Gradient ``[*batch, n]`` and value ``[*batch]`` per task."""


class Line:
    """The objective along one direction per task, ``t -> F(phi + t d)``, and its slope there.

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

    def __init__(self, direction: Vectors, values: Along, grads_and_values: Slopes) -> None:
        self.direction, self._values, self._grads_and_values = direction, values, grads_and_values
        self._last: tuple[Scalars, Scalars, Tensor] | None = None

    @classmethod
    def of(cls, problem: Minimised, phi: Vectors, direction: Vectors) -> Line:
        """The line from phi along the direction."""

        def along(function: Callable[[Vectors], Any]) -> Callable[[Scalars], Any]:
            return lambda t: function(phi + t.unsqueeze(-1) * direction)

        return cls(direction, along(problem.values), along(problem.grad_and_value))

    def __call__(self, t: Scalars) -> Scalars:
        """``F(phi + t d)``, ``[*batch]``."""
        return self._values(t)

    def value_and_slope(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """``F(phi + t d)`` and its slope ``grad F . d``, ``[*batch]`` each, for one gradient."""
        grad, value = self._grads_and_values(t)
        self._last = (t, value, grad)
        return value, dot(grad, self.direction)

    def known(self, t: Scalars) -> tuple[Scalars, Vectors] | None:
        """Value and gradient at ``t``, if the last call of `value_and_slope` was for this tensor object.

        Identity, because comparing numbers would need a host synchronisation. A search whose answer is
        another tensor costs one more gradient, never a wrong one.
        """
        return self._last[1:] if self._last is not None and self._last[0] is t else None


class Search(Settings, abc.ABC):
    """A way to choose the step length t of ``phi + t d``.

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
        """Find a step length for each task.

        Args:
            along: ``t -> F(phi + t d)`` of every task, ``[*batch]`` to ``[*batch]``; its method
                ``value_and_slope`` also returns the slope.
            value: ``F(phi)``, ``[*batch]``.
            slope: directional derivative ``grad F . d`` at phi, ``[*batch]``, negative.

        Returns:
            The step lengths ``[*batch]`` (0 where none was found) and whether one was found.
        """
