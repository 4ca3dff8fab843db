"""Gradient descent."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit_optim._problem import InnerProblem
from implicit_optim._solver.base import Descent, Evaluation, State, Step

Number = float | Tensor  # a setting that may be learned, or live on a device: 0-d


def gd_update(phi: Tensor, grad: Tensor, lr: Number) -> Tensor:
    """``phi - lr grad``."""
    if not isinstance(lr, Tensor):
        return torch.sub(phi, grad, alpha=lr)
    return (phi - lr * grad).to(phi.dtype)  # a 0-d phi would take the dtype of a wider lr


@dataclass(frozen=True, kw_only=True)
class gd(Descent):
    """Gradient descent, ``phi <- phi - lr grad F(phi)``.

    On a mu-strongly convex, L-smooth problem ``lr = 1/L`` contracts the distance to the minimiser by
    ``1 - mu/L`` per step.

    Args:
        lr: learning rate, > 0; a 0-d tensor can be learned with ``Unrolled``.
        max_steps: most steps, each one gradient.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done (one host
            synchronisation each).

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: ((phi - theta) ** 2).sum() / 2
        >>> iopt.minimize(
        ...     F, torch.zeros(1), torch.ones(1), solver=iopt.gd(lr=0.5, max_steps=2)
        ... ).value.item()
        0.75

    Source: Rajeswaran et al. 2019, section 4 (iMAML, GD); Nesterov 2004, theorem 2.1.15.
    """

    uses_value = False
    carries_nonfinite = True
    _must: ClassVar = dict(Descent._must, lr="be finite and > 0")

    lr: float | Tensor

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One gradient step."""
        return gd_update(phi, at.grad, self.lr), state, None
