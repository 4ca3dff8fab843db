"""Step lengths from values of the objective alone: a fixed one, and Armijo's backtracking."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from implicit_optim._search.base import Along, Found, Scalars, Search, rounding_of
from implicit_optim._vectors import none_running


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

    _must: ClassVar = dict(lr="be finite and > 0")

    lr: float = 1.0

    def search(self, along: Along, value: Scalars, slope: Scalars) -> Found:
        """See [`Search.search`][implicit_optim.Search.search]; evaluates nothing."""
        return torch.full_like(value, self.lr), torch.ones_like(value, dtype=torch.bool)


@dataclass(frozen=True)
class Armijo(Search):
    """Backtracking until the objective falls by enough.

    Takes the first t of ``lr, lr shrink, lr shrink^2, ...`` with ``F(phi + t d) <= F(phi) + c1 t slope``
    up to the rounding of F, without which the last digit would decide on Newton steps at the minimiser.

    Args:
        lr: first step to try, > 0; 1 is the full Newton step.
        c1: fraction of the predicted decrease to require, in (0, 1).
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

    _must: ClassVar = dict(
        lr="be finite and > 0", c1="lie in (0, 1)", shrink="lie in (0, 1)", max_trials="be >= 1"
    )

    lr: float = 1.0
    c1: float = 1e-4
    shrink: float = 0.5
    max_trials: int = 10

    def search(self, along: Along, value: Scalars, slope: Scalars) -> Found:
        """See [`Search.search`][implicit_optim.Search.search]; one evaluation per trial."""
        t = torch.full_like(value, self.lr)
        found, rounding = torch.zeros_like(value, dtype=torch.bool), rounding_of(value)
        for trial in range(self.max_trials):
            if trial > 0 and none_running(~found):
                break
            enough = along(t) <= value + self.c1 * t * slope + rounding
            t = torch.where(found | enough, t, t * self.shrink)
            found = found | enough
        return torch.where(found, t, 0.0), found
