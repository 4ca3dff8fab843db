"""A trust region around the parameters as a ``torch.optim`` class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._outcome import Status
from implicit_optim._solver import check_trust_region, trust_region_update
from implicit_optim.optim._joint import Move, Trials
from implicit_optim.optim._second_order import SecondOrder


class TrustRegion(SecondOrder):
    """Newton's method in a trust region, for losses whose Hessian is indefinite.

    ``params <- params + p``, where p lowers the model ``grad . p + p.(A + damping I)p / 2`` in the
    ball ``||p|| <= radius``: by conjugate gradients, which follow a direction of negative curvature
    to the boundary. The step is taken if the loss falls by at least ``eta`` of what the model says;
    the radius follows how well the model predicts.

    The closure is that of [`NewtonCG`][implicit_optim.NewtonCG]: it returns the loss, of the same
    data each time, and does **not** call ``backward()``. It runs once with a graph and once without.
    ``.grad`` is neither read nor changed. There is no ``lr``, hence no learning-rate scheduler. What
    happened is in ``state`` of the first parameter:

    - ``"n_iter"``: calls of ``step`` so far.
    - ``"grad_norm"``: norm of the gradient at the start of the step.
    - ``"step_length"``: norm of p; 0 where it was rejected and the parameters stayed as they were.
    - ``"radius"``: for the next step.
    - ``"status"``: a [`Status`][implicit_optim.Status] code, also as the property ``status``. A
      rejected step is a ``SUCCESS``; ``LINE_SEARCH`` says that the radius is below rounding.

    Args:
        params: parameters or named parameters, in a single group, of one dtype and device. Frozen
            ones are left out; those that the loss does not use stay where they are.
        radius: at the start, > 0, in units of the parameters.
        max_radius: the radius never exceeds it.
        eta: least share of the predicted decrease, in [0, 1/4).
        cg_steps: most CG steps a step, one product each. Default: ``min(10 n, 1000)``. They end
            before at a residual of ``min(1/2, sqrt ||grad||) ||grad||``.
        curvature: [`Hessian`][implicit_optim.Hessian], or
            [`GaussNewton`][implicit_optim.GaussNewton]: then the closure returns ``(loss, output)``.
        damping: added to A's diagonal, >= 0, in units of the curvature.
        maximize: ascend instead: minimise minus the loss.

    Raises:
        TypeError: a parameter is complex, or a setting is of the wrong kind.
        ValueError: a setting is out of range, or there is more than one group.

    Examples:
        >>> import torch
        >>> x = torch.tensor([0.1], requires_grad=True)
        >>> opt = TrustRegion([x])
        >>> for _ in range(6):
        ...     loss = opt.step(lambda: (x**4 / 4 - x**2 / 2).sum())  # at 0.1 it curves down
        >>> round(x.item(), 4), opt.status.name, opt.state[x]["n_iter"]
        (1.0, 'SUCCESS', 6)

    Source: Nocedal & Wright 2006, algorithms 4.1 and 7.2; Steihaug 1983.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        radius: float = 1.0,
        max_radius: float = 1000.0,
        eta: float = 0.15,
        cg_steps: int | None = None,
        curvature: type[Hessian] | type[GaussNewton] = Hessian,
        damping: float = 0.0,
        maximize: bool = False,
    ) -> None:
        check_trust_region(radius, max_radius, eta, cg_steps)
        defaults: dict[str, Any] = {"radius": radius, "max_radius": max_radius, "eta": eta}
        defaults |= {"cg_steps": cg_steps, "damping": damping, "maximize": maximize}
        super().__init__(params, defaults, curvature)

    def _propose(self, start: Tensor, at: Linearized, trials: Trials) -> Move:
        """The rule of [`trust_region`][implicit_optim.trust_region]."""
        group = self.param_groups[0]
        radius = start.new_tensor(self._told().get("radius", group["radius"]))
        settings = {name: group[name] for name in ("max_radius", "eta", "cg_steps")}
        end, after, found = trust_region_update(start, radius, at, trials.values, **settings)
        if not end.isfinite().all():  # the curvature is not finite, and the radius means nothing
            return Move(None, 0.0, Status.NONFINITE, {"radius": float(radius)})
        status = Status.SUCCESS if found else Status.LINE_SEARCH
        length = float(torch.linalg.vector_norm(end - start))
        return Move(end, length, status, {"radius": float(after)})
