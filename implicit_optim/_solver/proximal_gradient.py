"""Proximal gradient descent: gradient steps on the smooth part, soft thresholds for the l1 norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit_optim._problem import InnerProblem, smooth, soft_threshold, strengths
from implicit_optim._solver.agd import look_ahead
from implicit_optim._solver.base import Evaluation, Solver, State, Step, check_lr
from implicit_optim._solver.gd import gd_update
from implicit_optim._vectors import dot


def proximal_update(
    phi: Tensor, grad: Tensor, lr: float | Tensor, strength: float | Tensor
) -> Tensor:
    """``soft_threshold(phi - lr grad, lr strength)``."""
    return soft_threshold(gd_update(phi, grad, lr), lr * strength)


@dataclass(frozen=True, kw_only=True)
class proximal_gradient(Solver):
    r"""Proximal gradient descent for an [`L1`][implicit_optim.L1] objective ``F + s |phi|_1``.

    ``phi <- soft_threshold(phi - lr grad F(phi), lr s)``: ISTA. The zeros that it finds are exact. With
    ``lr <= 1/L`` the objective falls in every step, ``F + s |phi|_1 - min = O(1/k)``; accelerated,
    FISTA, ``O(1/k^2)``, restarted where the momentum points uphill.

    What ``tol`` is compared with, and what ``grad_norm`` says, is the norm of the gradient mapping
    ``(phi - soft_threshold(phi - lr grad F(phi), lr s)) / lr``. It is zero at the minimiser alone, and
    without the l1 norm it is grad F. The value is ``soft_threshold(...)`` of the last gradient taken,
    with ``tol > 0`` one step further than ``steps`` says: its zeros are exact, and for ``lr <= 1/L``
    and a convex F its own gradient mapping is no larger.

    Args:
        lr: learning rate, > 0; at most ``1/L`` for an F with an L-Lipschitz gradient. A 0-d tensor can
            be learned with ``Unrolled``.
        accelerated: whether to look ahead, as [`agd`][implicit_optim.agd] does: FISTA.
        max_steps: most steps, each one gradient of F.
        tol: stop a task where the norm of the gradient mapping is at most this; 0 takes exactly
            ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two looks whether all tasks are done (one host
            synchronisation each).

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> fit = lambda phi, _, y: ((phi - y) ** 2).sum()  # L = 2
        >>> lasso, y = iopt.L1(fit, strength=2.0), torch.tensor([3.0, 0.5, -2.0])
        >>> solver = iopt.proximal_gradient(lr=0.5, tol=1e-6)
        >>> iopt.minimize(lasso, torch.zeros(3), (), y, solver=solver).value.tolist()
        [2.0, 0.0, -1.0]

    Source: Beck & Teboulle 2009, "A fast iterative shrinkage-thresholding algorithm", sections 2 and 4;
    O'Donoghue & Candes 2015, section 3.2 (restart by the gradient).
    """

    uses_value: ClassVar[bool] = False
    proximal: ClassVar[bool] = True

    lr: float | Tensor
    accelerated: bool = False
    max_steps: int = 100
    tol: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lr(self.lr)

    def evaluate(self, problem: InnerProblem, phi: Tensor) -> Evaluation:
        """The gradient mapping, and the proximal point."""
        slope, s = smooth(problem).grad(phi), strengths(problem, phi)
        point = proximal_update(phi, slope, self.lr, s)
        return Evaluation(None, (phi - point) / self.lr, point=point)

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """Accelerated: the last proximal point, and Nesterov's t of each task."""
        return (phi, phi.new_ones(phi.shape[:-1])) if self.accelerated else ()

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """To the proximal point; accelerated, beyond it."""
        point = at.point
        assert point is not None
        if not self.accelerated:
            return point, state, None
        last, t = state
        uphill = dot(phi - point, point - last) > 0
        t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
        momentum = torch.where(uphill, 0.0, (t - 1) / t_next)
        ahead = look_ahead(last, point, momentum.unsqueeze(-1))
        return ahead, (point, torch.where(uphill, 1.0, t_next)), None
