"""The proximal term that ties task parameters to meta-parameters, and its strength lam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_optim._flat import Layout


def proximal(phi: Any, theta: tuple[Any, Any]) -> Float[Tensor, ""]:
    r"""Quadratic proximal term of one task.

    ``1/2 (phi - anchor)^T diag(lam) (phi - anchor)``, with ``theta = (anchor, lam)``.

    Args:
        phi: task parameters, a tensor or pytree with ``n`` scalars in all.
        theta: the anchor, a pytree like ``phi``, and lam: a scalar ``[]``, a vector ``[n]``, a
            symmetric positive definite matrix ``[n, n]``, or a dict by parameter name, where phi is
            one, of tensors that broadcast to the parameter.

    Returns:
        The term, a scalar.

    Raises:
        ValueError: lam has none of these shapes, or the anchor is not like phi.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> phi, anchor = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> iopt.proximal(phi, (anchor, torch.tensor(2.0))).item()
        5.0
        >>> iopt.proximal(phi, (anchor, torch.tensor([2.0, 4.0]))).item()
        9.0

    Source: Rajeswaran et al. 2019, Eq. 4; lam as vector or matrix: section 5.
    """
    anchor, lam = theta
    layout = Layout.of(phi)
    flat = layout.ravel(phi)
    offset, lam = flat - layout.ravel(anchor), _flat_lam(lam, layout, flat.dtype)
    scaled = lam @ offset if lam.ndim == 2 else lam * offset
    return (scaled * offset).sum() / 2


def inverse_proximal(r: Any, theta: tuple[Any, Any]) -> Any:
    """Solve with the Hessian of [`proximal`][implicit_optim.proximal]: ``r / lam``.

    It is the first-order direction of implicit MAML, and the natural preconditioner of
    ``H + lam I``: conjugate gradients with it work on the paper's ``I + H / lam``.

    Args:
        r: right-hand side, a tensor or pytree like ``phi``.
        theta: ``(anchor, lam)`` as in [`proximal`][implicit_optim.proximal].

    Returns:
        A pytree like ``r``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.inverse_proximal(
        ...     torch.tensor([2.0, 3.0]), (torch.zeros(2), torch.tensor(2.0))
        ... ).tolist()
        [1.0, 1.5]

    Source: Rajeswaran et al. 2019, Lemma 1.
    """
    layout = Layout.of(r, name="r")
    flat = layout.ravel(r)
    lam = _flat_lam(theta[1], layout, flat.dtype)
    if lam.ndim == 2:
        return layout.unravel(torch.linalg.solve(lam, flat))
    return layout.unravel(flat / lam)


def _flat_lam(lam: Any, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Lam as a scalar [], a vector [n] or a matrix [n, n]."""
    if isinstance(lam, Mapping):
        leaves = layout.unravel(torch.zeros(layout.n, device="meta"))
        if set(lam) != set(leaves):
            raise ValueError(_name_mismatch(set(lam), set(leaves)))
        lam = layout.ravel({name: lam[name].expand(leaf.shape) for name, leaf in leaves.items()})
    if isinstance(lam, Tensor) and lam.ndim > 0 and lam.dtype != dtype:
        raise ValueError(f"lam has dtype {lam.dtype} but phi has {dtype}: bring them to one dtype")
    if isinstance(lam, Tensor) and lam.shape in ((), (layout.n,), (layout.n, layout.n)):
        return lam
    what = tuple(lam.shape) if isinstance(lam, Tensor) else type(lam).__name__
    raise ValueError(
        f"lam must be a scalar tensor, a vector [{layout.n}], a matrix [{layout.n}, {layout.n}] or a "
        f"dict by parameter name, got {what}"
    )


def _name_mismatch(given: set[str], expected: set[str]) -> str:
    missing, unknown = sorted(expected - given), sorted(given - expected)
    return f"lam must name every trainable parameter: missing {missing}, unknown {unknown}"


class Proximal(nn.Module):
    """Strength of the proximal term as a module: fixed, or learned with the meta-parameters.

    A learned lam is stored as ``log lam``, positive by construction, and is found by
    ``parameters()`` like any other; the implicit gradient with respect to it is exact.

    Args:
        lam: strength, > 0: a number, a scalar tensor, a vector ``[n]`` over all task parameters, or a
            dict by parameter name of numbers or of tensors that broadcast to the parameter.
        learned: whether lam receives gradients.

    Raises:
        ValueError: an entry of lam is not a finite number > 0.

    Examples:
        >>> import implicit_optim as iopt
        >>> prox = iopt.Proximal(2.0, learned=True)
        >>> round(prox().item(), 6), len(list(prox.parameters()))
        (2.0, 1)

    Source: Rajeswaran et al. 2019, section 5 (learned regularisation).
    """

    def __init__(self, lam: float | Tensor | Mapping[str, Any], *, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        self._names: tuple[str, ...] | None = tuple(lam) if isinstance(lam, Mapping) else None
        values = list(lam.values()) if isinstance(lam, Mapping) else [lam]
        for name, value in zip(self._names or ("lam",), values, strict=True):
            tensor = _positive(name, value)
            if learned:
                self.register_parameter(self._slot(name), nn.Parameter(tensor.log()))
            else:
                self.register_buffer(self._slot(name), tensor)

    @staticmethod
    def _slot(name: str) -> str:
        return name.replace(".", "/")

    def _value(self, name: str) -> Tensor:
        stored: Tensor = getattr(self, self._slot(name))
        return stored.exp() if self.learned else stored

    def forward(self) -> Tensor | dict[str, Tensor]:
        """Lam in the form that [`proximal`][implicit_optim.proximal] takes."""
        if self._names is None:
            return self._value("lam")
        return {name: self._value(name) for name in self._names}

    def check(self, anchor: Mapping[str, Tensor]) -> None:
        """Raise ``ValueError`` if this lam does not fit the parameters ``anchor``."""
        lam = {name: t.detach() for name, t in anchor.items()}
        with torch.no_grad():
            proximal(lam, (lam, self()))

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"learned={self.learned}"


def _positive(name: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    tensor = (
        tensor.detach().clone()
        if tensor.is_floating_point()
        else tensor.to(torch.get_default_dtype())
    )
    if tensor.ndim == 2 and name == "lam":
        raise ValueError(
            "a matrix lam cannot be positive entry by entry: give a scalar, vector or dict"
        )
    if tensor.device.type != "meta" and not bool(((tensor > 0) & (tensor < math.inf)).all()):
        raise ValueError(f"Invalid {name}: {value}: the proximal strength must be finite and > 0")
    return tensor
