"""The proximal term that ties task parameters to meta-parameters, as a function and on flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._vectors import Layout, dot


class Theta(NamedTuple):
    """What a learner's inner problems depend on.

    Attributes:
        anchor: where the proximal term pulls to, a pytree like phi.
        lam: its strength, see `proximal`.
    """

    anchor: Any
    lam: Any


def proximal(phi: Any, theta: tuple[Any, Any]) -> Float[Tensor, ""]:
    r"""Quadratic proximal term of one task.

    ``1/2 (phi - anchor)^T diag(lam) (phi - anchor)``, with ``theta = (anchor, lam)``.

    Args:
        phi: task parameters, a tensor or pytree with ``n`` scalars in all.
        theta: the anchor, a pytree like ``phi``, and lam: a scalar ``[]``, a vector ``[n]``, a
            symmetric positive definite matrix ``[n, n]``, a pair ``(diagonal, factor [n, r])`` for
            ``diag(diagonal) + factor factor^T``, or a dict by parameter name, where phi is one, of
            tensors that broadcast to the parameter.

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
        factor: ``[*batch, n, r]``: lam is the diagonal part of ``lam + factor factor^T``.
    """

    anchor: Tensor
    lam: Tensor
    matrix: bool
    factor: Tensor | None = None

    @classmethod
    def of(cls, theta: tuple[Any, Any], layout: Layout, shared: tuple[bool, ...] = ()) -> Quadratic:
        """The term of ``(anchor, lam)``, whose tensors lead with the batch dimensions not shared."""
        anchor, lam, factor = layout.ravel(theta[0]), theta[1], None
        if isinstance(lam, tuple):
            lam, factor = lam
        lam, core = _flat_lam(lam, layout, anchor.dtype, shared.count(False))
        if factor is not None:
            _check_factor(factor, core, layout.n, shared.count(False))
        for dim, is_shared in enumerate(shared if False in shared else ()):
            if is_shared:
                anchor, lam = anchor.unsqueeze(dim), lam.unsqueeze(dim)
                factor = None if factor is None else factor.unsqueeze(dim)
        return cls(anchor, (lam + lam.mT) / 2 if core == 2 else lam, core == 2, factor)

    def mv(self, x: Tensor) -> Tensor:
        """``lam x``."""
        if self.matrix:
            return (self.lam @ x.unsqueeze(-1)).squeeze(-1)
        if self.factor is None:
            return self.lam * x
        return self.lam * x + (self.factor @ (self.factor.mT @ x.unsqueeze(-1))).squeeze(-1)

    def inverse(self, r: Tensor) -> Tensor:
        """``lam^-1 r``; of a low-rank part by the formula of Sherman, Morrison and Woodbury."""
        if self.matrix:
            return _solve_definite(self.lam, r.unsqueeze(-1)).squeeze(-1)
        if self.factor is None:
            return r / self.lam
        spread = self.lam.unsqueeze(-1) if self.lam.ndim else self.lam
        U, scaled = self.factor, self.factor / spread
        small = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device) + U.mT @ scaled
        inner = _solve_definite(small, scaled.mT @ r.unsqueeze(-1))
        return r / self.lam - (scaled @ inner).squeeze(-1)

    def add_slope(self, g: Tensor, phi: Tensor) -> Tensor:
        """``g + lam (phi - anchor)``."""
        offset = phi - self.anchor
        if self.matrix or self.factor is not None:
            return g + self.mv(offset)
        return torch.addcmul(g, self.lam, offset)

    def values(self, phi: Tensor) -> Tensor:
        """``1/2 (phi - anchor) . lam (phi - anchor)``, ``[*batch]``."""
        return self.at(phi)[2]

    def at(self, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
        """Gradient, Hessian product and values."""
        offset = phi - self.anchor
        slope = self.mv(offset)
        return slope, self.mv, dot(slope, offset) / 2


def _solve_definite(matrix: Tensor, b: Tensor) -> Tensor:
    """By Cholesky; NaN, without a look from the host, where the matrix is not definite.

    Not by ``torch.linalg.solve``: with several threads the LU of a batch of matrices of n >= 200 was
    seen to fail inside MKL.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    factor = torch.where((failed != 0)[..., None, None], torch.nan, factor)
    return torch.cholesky_solve(b, factor)


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
                f"lam has dtype {lam.dtype} but the anchor has {dtype}: bring them to one dtype"
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


def _check_factor(factor: Any, core: int, n: int, lead: int) -> None:
    shape = tuple(factor.shape[lead:]) if isinstance(factor, Tensor) else type(factor).__name__
    if core == 2 or not isinstance(factor, Tensor) or len(shape) != 2 or shape[0] != n:
        raise ValueError(
            f"lam as a pair must be (scalar or vector [{n}], factor [{n}, rank]), got a factor {shape} "
            f"beside {'a matrix' if core == 2 else 'that'}"
        )
