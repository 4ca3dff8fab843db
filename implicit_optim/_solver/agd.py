"""Nesterov's accelerated gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit_optim._checks import check
from implicit_optim._problem import InnerProblem
from implicit_optim._solver.base import Evaluation, Solver, State, Step, check_lr
from implicit_optim._solver.gd import gd_update


def look_ahead(x: Tensor, x_next: Tensor, momentum: float | Tensor) -> Tensor:
    """``x' + momentum (x' - x)``."""
    return torch.lerp(x, x_next, 1 + momentum)


def agd_update(
    y: Tensor, x: Tensor, grad: Tensor, lr: float | Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """``x' = y - lr grad(y)``, ``y' = x' + momentum (x' - x)``: the next (y, x)."""
    x_next = gd_update(y, grad, lr)
    return look_ahead(x, x_next, momentum), x_next


def agd_constants(strong_convexity: float, smoothness: float) -> tuple[float, float]:
    """Learning rate ``1/L`` and momentum ``(sqrt L - sqrt mu) / (sqrt L + sqrt mu)``.

    Raises:
        ValueError: not ``0 < mu <= L < inf``.
    """
    if not 0 < strong_convexity <= smoothness < math.inf:
        raise ValueError(
            f"Invalid strong_convexity, smoothness: {strong_convexity}, {smoothness}: "
            "they must satisfy 0 < strong_convexity <= smoothness"
        )
    root_mu, root_l = math.sqrt(strong_convexity), math.sqrt(smoothness)
    return 1 / smoothness, (root_l - root_mu) / (root_l + root_mu)


def resolve_agd(
    lr: float | None,
    momentum: float | None,
    strong_convexity: float | None,
    smoothness: float | None,
) -> tuple[float, float]:
    """Learning rate and momentum from either pair of settings.

    Raises:
        ValueError: both pairs, half a pair or values out of range are given.
    """
    if strong_convexity is not None or smoothness is not None:
        if lr is not None or momentum is not None:
            raise ValueError(
                "give either lr (and momentum) or strong_convexity and smoothness, not both: the pair "
                "determines lr = 1/L and the momentum"
            )
        if strong_convexity is None or smoothness is None:
            raise ValueError("strong_convexity and smoothness belong together: give both")
        return agd_constants(strong_convexity, smoothness)
    if lr is None:
        raise ValueError("give lr (and momentum), or strong_convexity and smoothness")
    check_lr(lr)
    momentum = 0.9 if momentum is None else momentum
    check("momentum", momentum, "lie in [0, 1)")
    return lr, momentum


@dataclass(frozen=True, kw_only=True)
class agd(Solver):
    """Nesterov's accelerated gradient descent.

    ``x_{k+1} = y_k - lr grad F(y_k)``, ``y_{k+1} = x_{k+1} + momentum (x_{k+1} - x_k)``

    The iterate is the look-ahead point y, as in ``torch.optim.SGD(nesterov=True)``: the gradient is
    taken there, and so is the test for ``tol``. With mu and L known the error falls like
    ``(1 - sqrt(mu/L))^k``, against ``(1 - mu/L)^k`` for gradient descent.

    Args:
        lr: learning rate, > 0.
        momentum: in [0, 1). Default: 0.9.
        strong_convexity: mu > 0, with ``smoothness``, instead of lr and momentum.
        smoothness: L >= mu; then ``lr = 1/L``, ``momentum = (sqrt L - sqrt mu)/(sqrt L + sqrt mu)``.
        max_steps: most steps, each one gradient.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two looks whether all tasks are done (one host
            synchronisation each).

    Raises:
        ValueError: a setting is out of range, or both pairs are given.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: ((phi - theta) ** 2).sum() / 2
        >>> solver = iopt.agd(lr=0.5, momentum=0.5, max_steps=2)
        >>> iopt.minimize(F, torch.zeros(1), torch.ones(1), solver=solver).value.item()
        1.0625

    Source: Nesterov 2004, scheme 2.2.11 (constant step); Rajeswaran et al. 2019, section 4.
    """

    uses_value: ClassVar[bool] = False
    carries_nonfinite: ClassVar[bool] = True

    lr: float | None = None
    momentum: float | None = None
    strong_convexity: float | None = None
    smoothness: float | None = None
    max_steps: int = 100
    tol: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.constants  # noqa: B018  raises if the settings do not fit together

    @property
    def constants(self) -> tuple[float, float]:
        """The learning rate and the momentum in force."""
        return resolve_agd(self.lr, self.momentum, self.strong_convexity, self.smoothness)

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """The last x; at the start x = y."""
        return (phi,)

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One accelerated step."""
        lr, momentum = self.constants
        y, x = agd_update(phi, state[0], at.grad, lr, momentum)
        return y, (x,), None
