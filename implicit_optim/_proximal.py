"""The proximal term that ties task parameters to meta-parameters, and its strength lam."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    layout = Layout.of(phi)
    flat = layout.ravel(phi)
    return Quadratic.of(theta, layout).values(flat)


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
    return layout.unravel(Quadratic.of((r, theta[1]), layout).inverse(flat))


@dataclass(frozen=True, eq=False)
class Quadratic:
    """[`proximal`][implicit_optim.proximal] on flat vectors, with its derivatives written out.

    Attributes:
        anchor: ``[*batch, n]``, with 1 where all tasks share it.
        lam: a scalar, ``[*batch, 1]``, ``[*batch, n]``, or matrices ``[*batch, n, n]``.
        matrix: whether lam is one.
    """

    anchor: Tensor
    lam: Tensor
    matrix: bool

    @classmethod
    def of(cls, theta: tuple[Any, Any], layout: Layout, shared: tuple[bool, ...] = ()) -> Quadratic:
        """The term of ``(anchor, lam)``, whose tensors lead with the batch dimensions not shared."""
        anchor = layout.ravel(theta[0])
        lam, core = _flat_lam(theta[1], layout, anchor.dtype, shared.count(False))
        for dim, is_shared in enumerate(shared if False in shared else ()):
            if is_shared:
                anchor, lam = anchor.unsqueeze(dim), lam.unsqueeze(dim)
        return cls(anchor, (lam + lam.mT) / 2 if core == 2 else lam, core == 2)

    def mv(self, x: Tensor) -> Tensor:
        """``lam x``."""
        return (self.lam @ x.unsqueeze(-1)).squeeze(-1) if self.matrix else self.lam * x

    def inverse(self, r: Tensor) -> Tensor:
        """``lam^-1 r``."""
        if self.matrix:
            return torch.linalg.solve(self.lam, r.unsqueeze(-1)).squeeze(-1)
        return r / self.lam

    def slope(self, phi: Tensor) -> Tensor:
        """``lam (phi - anchor)``."""
        return self.mv(phi - self.anchor)

    def values(self, phi: Tensor) -> Tensor:
        """``1/2 (phi - anchor) . lam (phi - anchor)``, ``[*batch]``."""
        return self.at(phi)[2]

    def at(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
        """Gradient, Hessian product and values."""
        offset = phi - self.anchor
        slope = self.mv(offset)
        return slope, self.mv, torch.linalg.vecdot(slope, offset) / 2


def _flat_lam(lam: Any, layout: Layout, dtype: torch.dtype, lead: int) -> tuple[Tensor, int]:
    """Lam over flat vectors, and how many of its dimensions it has for one task."""
    if isinstance(lam, Mapping):
        leaves = layout.unravel(torch.zeros(layout.n, device="meta"))
        if set(lam) != set(leaves):
            raise ValueError(_name_mismatch(set(lam), set(leaves)))
        lam = layout.ravel({name: _spread(lam[name], leaf, lead) for name, leaf in leaves.items()})
    if isinstance(lam, Tensor):
        core = lam.shape[lead:]
        if core == () and lead:
            lam = lam.to(dtype).unsqueeze(-1)
        elif core != () and lam.dtype != dtype:
            raise ValueError(
                f"lam has dtype {lam.dtype} but phi has {dtype}: bring them to one dtype"
            )
        if core in ((), (layout.n,), (layout.n, layout.n)):
            return lam, len(core)
    what = tuple(lam.shape[lead:]) if isinstance(lam, Tensor) else type(lam).__name__
    raise ValueError(
        f"lam must be a scalar tensor, a vector [{layout.n}], a matrix [{layout.n}, {layout.n}] or a "
        f"dict by parameter name, got {what}"
    )


def _spread(lam: Tensor, leaf: Tensor, lead: int) -> Tensor:
    """An entry of a dict, broadcast to the parameter that it is named for."""
    tasks, core = lam.shape[:lead], lam.shape[lead:]
    lam = lam.reshape((*tasks, *(1,) * (leaf.ndim - len(core)), *core))
    return lam.expand((*tasks, *leaf.shape))


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
        dtype: of what is given as numbers. Default: torch's default dtype.

    Raises:
        ValueError: an entry of lam is not a finite number > 0.

    Examples:
        >>> import implicit_optim as iopt
        >>> prox = iopt.Proximal(2.0, learned=True)
        >>> round(prox().item(), 6), len(list(prox.parameters()))
        (2.0, 1)

    Source: Rajeswaran et al. 2019, section 5 (learned regularisation).
    """

    def __init__(
        self,
        lam: float | Tensor | Mapping[str, Any],
        *,
        learned: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.learned = learned
        self._names: tuple[str, ...] | None = tuple(lam) if isinstance(lam, Mapping) else None
        values = list(lam.values()) if isinstance(lam, Mapping) else [lam]
        for name, value in zip(self._names or ("lam",), values, strict=True):
            tensor = _positive(name, value, dtype)
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


def _positive(name: str, value: Any, dtype: torch.dtype | None) -> Tensor:
    if isinstance(value, Tensor) and value.is_floating_point():
        tensor = value.detach().clone()
    else:
        tensor = torch.as_tensor(value, dtype=dtype or torch.get_default_dtype())
    if tensor.ndim == 2 and name == "lam":
        raise ValueError(
            "a matrix lam cannot be positive entry by entry: give a scalar, vector or dict"
        )
    if tensor.device.type != "meta" and not bool(((tensor > 0) & (tensor < math.inf)).all()):
        raise ValueError(f"Invalid {name}: {value}: the proximal strength must be finite and > 0")
    return tensor
