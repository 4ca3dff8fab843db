"""Proximal gradient descent: gradient steps on the smooth part, soft thresholds for the l1 norm."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicit_optim._problem import InnerProblem, smooth, soft_threshold, strengths
from implicit_optim._search import Scalars, Vectors
from implicit_optim._solver.base import Descent, Evaluation, State, Step
from implicit_optim._solver.gd import Number, gd_update
from implicit_optim._vectors import dot


def proximal_update(phi: Tensor, grad: Tensor, lr: Number, strength: Number) -> Tensor:
    """``soft_threshold(phi - lr grad, lr strength)``."""
    return soft_threshold(gd_update(phi, grad, lr), lr * strength)


class FistaState(NamedTuple):
    """What the accelerated rule remembers: the last proximal point, and Nesterov's t of each task."""

    point: Vectors
    t: Scalars


@dataclass(frozen=True, kw_only=True)
class proximal_gradient(Descent):
    r"""Proximal gradient descent for an [`L1`][implicit_optim.L1] objective ``F + s |phi|_1``.

    ``phi <- soft_threshold(phi - lr grad F(phi), lr s)``: ISTA. Its zeros are exact. With ``lr <= 1/L``
    the objective falls in every step, ``F + s |phi|_1 - min = O(1/k)``. Accelerated it is FISTA,
    ``O(1/k^2)``, which restarts where the momentum points uphill.

    ``tol`` and ``grad_norm`` refer to the norm of the gradient mapping
    ``(phi - soft_threshold(phi - lr grad F(phi), lr s)) / lr``, which is zero at the minimiser only, and
    is grad F without the l1 norm. The value is ``soft_threshold(...)`` of the last gradient taken, so
    with ``tol > 0`` it is one step ahead of ``steps``: its zeros are exact, and for ``lr <= 1/L`` and a
    convex F its own gradient mapping is no larger.

    Args:
        lr: learning rate, > 0; at most ``1/L`` for an F with an L-Lipschitz gradient. A 0-d tensor can
            be learned with ``Unrolled``.
        accelerated: whether to look ahead, as [`agd`][implicit_optim.agd] does: FISTA.
        max_steps: most steps, each one gradient of F.
        tol: stop a task when the norm of the gradient mapping is at most this; 0 takes exactly
            ``max_steps`` steps.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done (one host
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

    uses_value = False
    proximal = True
    _must: ClassVar = dict(Descent._must, lr="be finite and > 0")

    lr: float | Tensor
    accelerated: bool = False

    def evaluate(self, problem: InnerProblem, phi: Tensor) -> Evaluation:
        """The gradient mapping, and the proximal point."""
        slope, s = smooth(problem).grad(phi), strengths(problem, phi)
        point = proximal_update(phi, slope, self.lr, s)
        return Evaluation(None, (phi - point) / self.lr, point=point)

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """Accelerated, it starts from phi with ``t = 1``; else there is nothing to remember."""
        return FistaState(phi, phi.new_ones(phi.shape[:-1])) if self.accelerated else ()

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
        ahead = torch.lerp(last, point, 1 + momentum.unsqueeze(-1))
        return ahead, FistaState(point, torch.where(uphill, 1.0, t_next)), None
