"""One task's inner problem: a structured objective, or equations."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_optim._problem.proximal import inverse_proximal, proximal
from implicit_optim._torch import pytree


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


class Equations(abc.ABC):
    """An inner problem that is no minimum but a system of equations, one for each number in phi."""

    @abc.abstractmethod
    def residual(self, phi: Any, theta: Any, *data: Any) -> Any:
        """What is zero at the solution, a pytree like phi."""


@dataclass(frozen=True)
class Root(Equations):
    """One task's inner problem as equations, ``R(phi, theta, *data) = 0``.

    For [`attach`][implicit_optim.attach] only: find phi with any root finder. The Jacobian need not be
    symmetric. Stationarity of an objective is the case ``R = grad F``.

    Args:
        function: R, ``(phi, theta, *data) -> pytree like phi`` of one task.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> root = iopt.Root(lambda phi, theta: phi**2 - theta)
        >>> theta = torch.tensor([9.0], requires_grad=True)
        >>> iopt.attach(torch.tensor([3.0]), root, theta).sum().backward()
        >>> round(theta.grad.item(), 4)  # of sqrt(theta)
        0.1667

    Source: Blondel et al. 2022, "Efficient and modular implicit differentiation", section 2.1.
    """

    function: Callable[..., Any]

    def residual(self, phi: Any, theta: Any, *data: Any) -> Any:
        """``R(phi, theta, *data)``."""
        return self.function(phi, theta, *data)


@dataclass(frozen=True)
class FixedPoint(Equations):
    """One task's inner problem as a fixed point, ``phi = T(phi, theta, *data)``.

    Args:
        function: T, ``(phi, theta, *data) -> pytree like phi`` of one task.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> cosine = iopt.FixedPoint(lambda phi, theta: torch.cos(theta * phi))
        >>> theta = torch.tensor([1.0], requires_grad=True)
        >>> iopt.attach(torch.tensor([0.739085]), cosine, theta).sum().backward()
        >>> round(theta.grad.item(), 4)  # -phi sin(phi) / (1 + sin(phi))
        -0.2975

    Source: Blondel et al. 2022, section 2.1; Bai et al. 2019, "Deep equilibrium models".
    """

    function: Callable[..., Any]

    def residual(self, phi: Any, theta: Any, *data: Any) -> Any:
        """``phi - T(phi, theta, *data)``."""
        return pytree.tree_map(torch.sub, phi, self.function(phi, theta, *data))


InnerObjective = Objective | Equations | Callable[..., Tensor]
