"""The strength lam of the proximal term as a module, fixed or learned."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from implicit_optim._problem.proximal import proximal

Lam = Tensor | dict[str, Tensor] | tuple[Tensor, Tensor]


class Proximal(nn.Module):
    r"""Strength of the proximal term as a module: fixed, or learned with the meta-parameters.

    A learned lam is positive definite by construction: numbers are stored as ``log lam``, a matrix as
    its Cholesky factor with a logarithmic diagonal, and ``factor factor^T`` is never negative. It is
    found by ``parameters()`` like any other; the implicit gradient with respect to it is exact.

    Args:
        lam: strength, > 0: a number, a scalar tensor, a vector ``[n]`` over all task parameters, a
            symmetric positive definite matrix ``[n, n]``, or a dict by parameter name of numbers or of
            tensors that broadcast to the parameter.
        factor: ``[n, r]``, makes it ``diag(lam) + factor factor^T``: a matrix for large n. To be learned
            it must not be zero, where its gradient vanishes.
        learned: whether lam receives gradients.
        dtype: of what is given as numbers. Default: torch's default dtype.

    Raises:
        ValueError: an entry of lam is not a finite number > 0; a matrix is not symmetric positive
            definite; factor does not fit.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> prox = iopt.Proximal(2.0, learned=True)
        >>> round(prox().item(), 6), len(list(prox.parameters()))
        (2.0, 1)
        >>> iopt.Proximal(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), learned=True)().tolist()
        [[4.0, 2.0], [2.0, 2.0]]
        >>> diagonal, factor = iopt.Proximal(1.0, factor=torch.ones(3, 1))()

    Source: Rajeswaran et al. 2019, section 5 (learned regularisation; vectors and matrices).
    """

    def __init__(
        self,
        lam: float | Tensor | Mapping[str, Any],
        *,
        factor: Tensor | None = None,
        learned: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.learned = learned
        self._names: tuple[str, ...] | None = tuple(lam) if isinstance(lam, Mapping) else None
        values = list(lam.values()) if isinstance(lam, Mapping) else [lam]
        self._matrix = isinstance(lam, Tensor) and lam.ndim == 2
        for name, value in zip(self._names or ("lam",), values, strict=True):
            if self._matrix:
                tensor = _log_cholesky(value) if learned else _definite(value)[0]
            else:
                tensor = _positive(name, value, dtype)
                tensor = tensor.log() if learned else tensor
            self._store(self._slot(name), tensor)
        if factor is not None:
            if self._matrix or self._names is not None or factor.ndim != 2:
                raise ValueError("factor must be [n, r], beside a scalar or vector lam")
            self._store("factor", factor.detach().clone())
        self._low_rank = factor is not None

    def _store(self, slot: str, tensor: Tensor) -> None:
        if self.learned:
            self.register_parameter(slot, nn.Parameter(tensor))
        else:
            self.register_buffer(slot, tensor)

    @staticmethod
    def _slot(name: str) -> str:
        return name.replace(".", "/")

    def _value(self, name: str) -> Tensor:
        stored: Tensor = getattr(self, self._slot(name))
        if not self.learned:
            return stored
        if not self._matrix:
            return stored.exp()
        L = stored.tril(-1) + torch.diag_embed(stored.diagonal().exp())
        return L @ L.mT

    def forward(self) -> Lam:
        """Lam in the form that [`proximal`][implicit_optim.proximal] takes."""
        if self._names is not None:
            return {name: self._value(name) for name in self._names}
        if self._low_rank:
            factor: Any = self.factor
            return self._value("lam"), factor
        return self._value("lam")

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
    if tensor.device.type != "meta" and not bool(((tensor > 0) & (tensor < math.inf)).all()):
        raise ValueError(f"Invalid {name}: {value}: the proximal strength must be finite and > 0")
    return tensor


def _definite(matrix: Any) -> tuple[Tensor, Tensor]:
    """A matrix and its Cholesky factor."""
    matrix = matrix.detach().clone()
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"Invalid lam: a matrix must be [n, n], got {tuple(matrix.shape)}")
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if matrix.device.type != "meta" and (
        bool(failed) or not torch.allclose(matrix, matrix.mT) or not bool(factor.isfinite().all())
    ):
        raise ValueError("Invalid lam: a matrix must be finite, symmetric and positive definite")
    return matrix, factor


def _log_cholesky(matrix: Any) -> Tensor:
    _, factor = _definite(matrix)
    return factor.tril(-1) + torch.diag_embed(factor.diagonal().log())
