"""Gradient descent as a ``torch.optim`` class, and what is common to all that use ``.grad`` alone."""

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._solver import gd_update
from implicit_optim._torch import by_device_and_dtype, foreach_by_default
from implicit_optim.optim._base import Checked


class PerParameter(Checked, abc.ABC):
    """A rule that moves each parameter along its own ``.grad``, one by one or all at once."""

    _later = dict(maximize=False, foreach=None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients in ``.grad``; parameters without one stay.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()``, returns it.

        Returns:
            What the closure returned, ``None`` without one.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if any(g.is_sparse for g in grads):
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients: build the embedding "
                    "with sparse=False, or give its parameters to torch.optim.SparseAdam"
                )
            foreach = foreach_by_default(params) if group["foreach"] is None else group["foreach"]
            if foreach and params:
                for some, its_grads in by_device_and_dtype(params, grads):
                    slopes = torch._foreach_neg(its_grads) if group["maximize"] else its_grads
                    self._update_all(group, some, slopes)
            else:
                for p, g in zip(params, grads, strict=True):
                    self._update(group, p, -g if group["maximize"] else g)
        return loss

    @abc.abstractmethod
    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        """Write the rule's next iterate into one parameter."""

    @abc.abstractmethod
    def _update_all(self, group: dict[str, Any], params: Any, grads: Any) -> None:
        """The same for lists of tensors of one device and dtype, in a few kernels."""


def descend_all(params: Any, grads: Any, lr: float | Tensor) -> None:
    """``param -= lr grad`` for lists, without reading the number of a tensor lr."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(grads, lr.to(grads[0].device)))
    else:
        torch._foreach_add_(params, grads, alpha=-lr)


class GD(PerParameter):
    """Gradient descent.

    ``param <- param - lr grad``

    On a mu-strongly convex, L-smooth loss ``lr = 1/L`` contracts the distance to the minimiser by
    ``1 - mu/L`` per step. These are the steps of ``torch.optim.SGD`` without momentum.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, > 0; a float or a 0-d tensor. A scheduler may change it, also to 0.
        maximize: ascend instead.
        foreach: update all tensors in a few kernels. Default: where torch's own optimizers do.

    Raises:
        TypeError: a parameter is complex.
        ValueError: lr is out of range.

    Examples:
        >>> import torch
        >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> opt = GD([x], lr=0.25)
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     (x**2).sum().backward()
        ...     opt.step()
        >>> x.tolist()  # (1 - 0.25 * 2)^2 of the start
        [0.25, -0.5]

    Source: Nesterov 2004, theorem 2.1.15; Rajeswaran et al. 2019, section 4 (iMAML, GD).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, maximize=maximize, foreach=foreach))

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        param.copy_(gd_update(param, grad, group["lr"]))

    def _update_all(self, group: dict[str, Any], params: Any, grads: Any) -> None:
        descend_all(params, grads, group["lr"])
