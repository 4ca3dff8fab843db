"""Gradient descent as a ``torch.optim`` class, and what it shares with the accelerated one."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from implicit_optim._solver import check_lr, gd_update
from implicit_optim._torch import by_device_and_dtype, foreach_by_default


class FirstOrder(Optimizer, abc.ABC):
    """A rule that moves each parameter by its own ``.grad``: one at a time or all at once."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them.

        Args:
            param_group: ``{"params": ..., option: value, ...}``.

        Raises:
            TypeError: a parameter is complex.
            ValueError: an option is out of range.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
            check_real(self, self.param_groups[-1]["params"])
        except Exception:
            del self.param_groups[-1]
            raise

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
            pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
            params, grads = [p for p, _ in pairs], [g for _, g in pairs]
            if any(g.is_sparse for g in grads):
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients: build the embedding "
                    "with sparse=False, or give its parameters to torch.optim.SparseAdam"
                )
            foreach = group["foreach"]
            if foreach is None:
                foreach = foreach_by_default(params)
            if foreach and params:
                for some, its_grads in by_device_and_dtype(params, grads):
                    slopes = torch._foreach_neg(its_grads) if group["maximize"] else its_grads
                    self._update_all(group, some, slopes)
            else:
                for p, g in pairs:
                    self._update(group, p, -g if group["maximize"] else g)
        return loss

    @abc.abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise ``ValueError`` if an option of the group is out of range."""

    @abc.abstractmethod
    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        """Write the rule's next iterate into one parameter."""

    @abc.abstractmethod
    def _update_all(self, group: dict[str, Any], params: Any, grads: Any) -> None:
        """The same for lists of tensors of one device and dtype, in a few kernels."""


def check_real(optimizer: Optimizer, params: list[Tensor]) -> None:
    """Raise ``TypeError`` if a parameter is complex."""
    if any(p.is_complex() for p in params):
        raise TypeError(
            f"{type(optimizer).__name__} does not take complex parameters: make "
            "torch.view_as_real(p) the parameter and use torch.view_as_complex in the model"
        )


def check_tensor_lr(lr: float | Tensor) -> None:
    """Raise ``ValueError`` if lr is not finite and > 0, or a tensor that is not 0-d."""
    if isinstance(lr, Tensor) and lr.ndim != 0:
        raise ValueError(f"Invalid lr of shape {tuple(lr.shape)}: a tensor lr must be 0-d")
    check_lr(lr)


def descend_all(params: Any, grads: Any, lr: float | Tensor) -> None:
    """``param -= lr grad`` for lists; a tensor lr stays on its device."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(grads, lr.to(grads[0].device)))
    else:
        torch._foreach_add_(params, grads, alpha=-lr)


class GD(FirstOrder):
    """Gradient descent.

    ``param <- param - lr grad``

    On a mu-strongly convex, L-smooth loss ``lr = 1/L`` contracts the distance to the minimiser by
    ``1 - mu/L`` a step. The same steps as ``torch.optim.SGD`` without momentum.

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
        check_tensor_lr(lr)
        super().__init__(params, {"lr": lr, "maximize": maximize, "foreach": foreach})

    def _check(self, group: dict[str, Any]) -> None:
        check_tensor_lr(group["lr"])

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        param.copy_(gd_update(param, grad, group["lr"]))

    def _update_all(self, group: dict[str, Any], params: Any, grads: Any) -> None:
        descend_all(params, grads, group["lr"])
