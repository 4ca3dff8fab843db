"""Nesterov's accelerated gradient descent."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_optim._checks import check
from implicit_optim._problem import InnerProblem
from implicit_optim._solver.base import Descent, Evaluation, State, Step
from implicit_optim._solver.gd import Number, gd_update


def agd_update(
    y: Tensor, x: Tensor, grad: Tensor, lr: Number, beta: float
) -> tuple[Tensor, Tensor]:
    """``x' = y - lr grad(y)``, ``y' = x' + beta (x' - x)``: the next (y, x); beta is the momentum."""
    x_next = gd_update(y, grad, lr)
    return torch.lerp(x, x_next, 1 + beta), x_next


@dataclass(frozen=True, kw_only=True)
class agd(Descent):
    """Nesterov's accelerated gradient descent.

    ``x_{k+1} = y_k - lr grad F(y_k)``, ``y_{k+1} = x_{k+1} + momentum (x_{k+1} - x_k)``

    The iterate is the look-ahead point y, as in ``torch.optim.SGD(nesterov=True)``: both the gradient
    and the test against ``tol`` are at y. With mu and L known the error falls like
    ``(1 - sqrt(mu/L))^k``, compared with ``(1 - mu/L)^k`` for gradient descent.

    Args:
        lr: learning rate, a number or 0-d tensor, > 0.
        momentum: in [0, 1). Default: 0.9.
        strong_convexity: mu > 0, with ``smoothness``, instead of lr and momentum.
        smoothness: L >= mu; then ``lr = 1/L``, ``momentum = (sqrt L - sqrt mu)/(sqrt L + sqrt mu)``.
        max_steps: most steps, each one gradient.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done (one host
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

    uses_value = False
    carries_nonfinite = True

    lr: float | Tensor | None = None
    momentum: float | None = None
    strong_convexity: float | None = None
    smoothness: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._resolve()

    @property
    def constants(self) -> tuple[Number, float]:
        """The learning rate and momentum in force."""
        return self._resolve()

    def _resolve(self) -> tuple[Number, float]:
        """Learning rate and momentum from whichever pair is given; raise if they do not fit together."""
        mu, L = self.strong_convexity, self.smoothness
        if mu is None and L is None:
            if self.lr is None:
                raise ValueError("give lr (and momentum), or strong_convexity and smoothness")
            momentum = 0.9 if self.momentum is None else self.momentum
            check("lr", self.lr, "be finite and > 0")
            check("momentum", momentum, "lie in [0, 1)")
            return self.lr, momentum
        if self.lr is not None or self.momentum is not None:
            raise ValueError(
                "give either lr (and momentum) or strong_convexity and smoothness, not both: the pair "
                "determines lr = 1/L and the momentum"
            )
        if mu is None or L is None:
            raise ValueError("strong_convexity and smoothness belong together: give both")
        if not 0 < mu <= L < math.inf:
            raise ValueError(
                f"Invalid strong_convexity, smoothness: {mu}, {L}: "
                "they must satisfy 0 < strong_convexity <= smoothness"
            )
        return 1 / L, (math.sqrt(L) - math.sqrt(mu)) / (math.sqrt(L) + math.sqrt(mu))

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """The last x ``[*batch, n]``; x = y before the first step."""
        return phi

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One accelerated step."""
        return *agd_update(phi, state, at.grad, *self.constants), None
