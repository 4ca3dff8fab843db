"""Proximal gradient descent for an l1 norm as a ``torch.optim`` class."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._solver import proximal_update
from implicit_optim.optim._gd import PerParameter, descend_all


class ProximalGradient(PerParameter):
    """Gradient descent with soft thresholds, for the loss plus ``l1`` times the parameters' l1 norm.

    ``param <- soft_threshold(param - lr grad, lr l1)``

    Leave the l1 norm out of the loss: ``.grad`` belongs to the loss alone. Zeros are exact, and with
    ``lr <= 1/L`` the sum of loss and norm falls in every step. With ``l1 = 0`` this is
    [`GD`][implicit_optim.GD].

    Args:
        params: parameters, named parameters or parameter groups; a group may have an ``l1`` of its own,
            such as 0 for biases.
        lr: learning rate, > 0; a float or a 0-d tensor. A scheduler may change it, also to 0.
        l1: strength of the norm, >= 0, in units of the loss per unit of the parameters.
        maximize: ascend the loss instead, minus ``l1`` times the norm.
        foreach: update all tensors in a few kernels. Default: where torch's own optimizers do.

    Raises:
        TypeError: a parameter is complex.
        ValueError: lr or l1 is out of range.

    Examples:
        >>> import torch
        >>> x = torch.tensor([3.0, 0.5, -2.0], requires_grad=True)
        >>> opt = ProximalGradient([x], lr=0.5, l1=1.0)
        >>> x.grad = torch.zeros(3)
        >>> opt.step()
        >>> x.tolist()
        [2.5, 0.0, -1.5]

    Source: Beck & Teboulle 2009, section 2 (ISTA).
    """

    _must = dict(PerParameter._must, l1="be finite and >= 0")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        l1: float,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, l1=l1, maximize=maximize, foreach=foreach))

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        param.copy_(proximal_update(param, grad, group["lr"], group["l1"]))

    def _update_all(self, group: dict[str, Any], params: Any, grads: Any) -> None:
        descend_all(params, grads, group["lr"])
        threshold = group["lr"] * group["l1"]
        if isinstance(threshold, Tensor):
            threshold = threshold.to(params[0])
            torch._foreach_sub_(params, [p.clamp(-threshold, threshold) for p in params])
        else:
            clipped = torch._foreach_clamp_min(params, -threshold)
            torch._foreach_sub_(params, torch._foreach_clamp_max(clipped, threshold))
