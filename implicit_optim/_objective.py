"""One task's inner objective in the structured form that Gauss-Newton needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from implicit_optim._quadratic import inverse_proximal, proximal


@dataclass(frozen=True)
class Objective:
    """One task's inner problem in the structured form that Gauss-Newton needs.

    ``F(phi, theta, *inputs, target) = loss(predict(phi, *inputs), target) + proximal(phi, theta)``

    Args:
        predict: ``(phi, *inputs) -> output`` of one task.
        loss: ``(output, target) -> scalar``; convex in the output for Gauss-Newton.
        proximal: ``(phi, theta) -> scalar``, convex and quadratic in phi, or ``None``.
        inverse_proximal: ``(r, theta) -> proximal's Hessian^-1 r``: preconditions the linear solves and
            gives the first-order direction. Filled in for [`proximal`][implicit_optim.proximal].

    Examples:
        >>> import torch, implicit_optim as iopt, torch.nn.functional as F
        >>> ridge = iopt.Objective(lambda phi, x: x @ phi, F.mse_loss, iopt.proximal)
        >>> phi, theta = torch.ones(2), (torch.zeros(2), torch.tensor(1.0))
        >>> ridge(phi, theta, torch.eye(2), torch.zeros(2)).item()
        2.0

    Source: Rajeswaran et al. 2019, Eq. 4.
    """

    predict: Callable[..., Any]
    loss: Callable[[Any, Any], Tensor]
    proximal: Callable[[Any, Any], Tensor] | None = None
    inverse_proximal: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.proximal is proximal and self.inverse_proximal is None:
            object.__setattr__(self, "inverse_proximal", inverse_proximal)

    def fit(self, phi: Any, *data: Any) -> Tensor:
        """The data term of one task, ``loss(predict(phi, *inputs), target)``."""
        *inputs, target = data
        return self.loss(self.predict(phi, *inputs), target)

    def __call__(self, phi: Any, theta: Any, *data: Any) -> Tensor:
        """One task's objective, a scalar."""
        value = self.fit(phi, *data)
        return value if self.proximal is None else value + self.proximal(phi, theta)


InnerObjective = Objective | Callable[..., Tensor]
