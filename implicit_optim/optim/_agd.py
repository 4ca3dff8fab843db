"""Nesterov's accelerated gradient descent as a ``torch.optim`` class."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._solver import agd, agd_update
from implicit_optim.optim._gd import PerParameter, descend_all

_PAIR = ("strong_convexity", "smoothness")


class NesterovAGD(PerParameter):
    """Nesterov's accelerated gradient descent.

    ``x' = param - lr grad``, ``param' = x' + momentum (x' - x)``

    The parameter is the look-ahead point y, where the gradient is taken; ``state[param]["x"]`` is
    the last point before looking ahead. With mu and L known the loss falls like
    ``(1 - sqrt(mu/L))^k``, compared with ``(1 - mu/L)^k`` for gradient descent. At a constant lr these
    are the steps of ``torch.optim.SGD(nesterov=True)``. When lr changes, this rule keeps to the
    formula, whereas SGD rescales the moves accumulated so far.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, > 0; a float or a 0-d tensor. A scheduler may change it, also to 0.
        momentum: in [0, 1). Default: 0.9.
        strong_convexity: mu > 0, with ``smoothness``, instead of lr and momentum. A group may name
            the pair too.
        smoothness: L >= mu; then ``lr = 1/L`` and the momentum is
            ``(sqrt L - sqrt mu) / (sqrt L + sqrt mu)``.
        maximize: ascend instead.
        foreach: update all tensors in a few kernels. Default: where torch's own optimizers do.

    Raises:
        TypeError: a parameter is complex.
        ValueError: a setting is out of range, or both pairs, half a pair or none are given.

    Examples:
        >>> import torch
        >>> x = torch.zeros(1, requires_grad=True)
        >>> opt = NesterovAGD([x], lr=0.5, momentum=0.5)
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     ((x - 1) ** 2).sum().div(2).backward()
        ...     opt.step()
        >>> x.item(), opt.state[x]["x"].item()
        (1.0625, 0.875)

    Source: Nesterov 2004, scheme 2.2.11 (constant step); Rajeswaran et al. 2019, section 4.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        momentum: float | None = None,
        *,
        strong_convexity: float | None = None,
        smoothness: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        options = dict(lr=lr, momentum=momentum, maximize=maximize, foreach=foreach)
        pair = dict(strong_convexity=strong_convexity, smoothness=smoothness)
        super().__init__(params, _resolved({**options, **pair}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them.

        Args:
            param_group: ``{"params": ..., option: value, ...}``; the options may be ``lr`` and
                ``momentum`` or the pair ``strong_convexity``, ``smoothness``.

        Raises:
            TypeError: a parameter is complex.
            ValueError: an option is out of range, or the options do not fit together.
        """
        if isinstance(param_group, dict) and any(name in param_group for name in _PAIR):
            param_group = _resolved(param_group)
        super().add_param_group(param_group)

    def _check(self, options: dict[str, Any]) -> None:
        agd(lr=options["lr"], momentum=options["momentum"])

    def _last(self, param: Tensor) -> Tensor:
        """The last x; x = y before the first step."""
        state = self.state[param]
        if "x" not in state:
            state["x"] = param.clone(memory_format=torch.preserve_format)
        return state["x"]

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        x = self._last(param)
        y, x_next = agd_update(param, x, grad, group["lr"], group["momentum"])
        param.copy_(y)
        x.copy_(x_next)

    def _update_all(self, group: dict[str, Any], params: Any, grads: Any) -> None:
        xs = [self._last(p) for p in params]
        descend_all(params, grads, group["lr"])  # the parameters hold x' for a moment
        moved = torch._foreach_sub(params, xs)
        torch._foreach_copy_(xs, params)
        torch._foreach_add_(params, moved, alpha=group["momentum"])


def _resolved(options: dict[str, Any]) -> dict[str, Any]:
    """The options with lr and momentum in place of the pair that determines them."""
    rest = dict(options)
    given = {name: rest.pop(name, None) for name in ("lr", "momentum", *_PAIR)}
    lr, momentum = agd(**given).constants
    return dict(rest, lr=lr, momentum=momentum)
