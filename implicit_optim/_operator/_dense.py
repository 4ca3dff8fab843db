"""Explicit matrices, and damping of any operator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit_optim._operator._base import Leaves, Linearized, Operator, Vector


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """An explicit matrix per task.

    Args:
        matrix: ``[*batch, n, n]``.
        symmetric: whether it is; CG and MINRES ask for that, and it is not checked.

    Raises:
        ValueError: the matrix is not square.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).mv(torch.tensor([1.0, 0.0])).tolist()
        [2.0, 1.0]
    """

    matrix: Any
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.matrix is None:  # a blank, to be filled by with_tensors
            return
        if self.matrix.ndim < 2 or self.matrix.shape[-1] != self.matrix.shape[-2]:
            raise ValueError(f"matrix must be [*batch, n, n], got {tuple(self.matrix.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, n)``."""
        return tuple(self.matrix.shape[:-1])

    def mv(self, x: Vector) -> Vector:
        """``A x``."""
        return (self.matrix @ x.unsqueeze(-1)).squeeze(-1)

    def transpose(self) -> Dense:
        """``A^T``."""
        return self if self.symmetric else replace(self, matrix=self.matrix.mT)

    def tensors(self) -> tuple[Leaves, Leaves]:
        """The matrix; nothing is shared."""
        return [self.matrix], []

    def with_tensors(self, own: Leaves, common: Leaves) -> Dense:
        """The same form over another matrix."""
        return replace(self, matrix=own[0])

    def add_batch(self, own: Leaves, common: Leaves, *, shared: bool) -> Dense:
        """One more batch dimension in front."""
        return replace(self, matrix=own[0])


@dataclass(frozen=True, eq=False)
class Damped(Operator):
    """``A + damping I``, with ``r / damping`` as the first-order direction.

    Args:
        operator: A.
        damping: a number or tensor, a scalar ``[]`` or one per task ``[*batch]``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.Damped(iopt.Dense(torch.eye(2)), 0.5).mv(torch.ones(2)).tolist()
        [1.5, 1.5]
    """

    operator: Operator
    damping: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, n)``."""
        return self.operator.shape

    @property
    def symmetric(self) -> bool:
        """Whether A is."""
        return self.operator.symmetric

    def transpose(self) -> Damped:
        """``A^T + damping I``."""
        return replace(self, operator=self.operator.transpose())

    def _damping(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.damping, dtype=x.dtype, device=x.device).unsqueeze(-1)

    def mv(self, x: Vector) -> Vector:
        """``A x + damping x``."""
        return self.operator.mv(x) + self._damping(x) * x

    def linearize(self) -> Linearized:
        """Linearise A; the damping costs nothing."""
        inner = self.operator.linearize()
        return replace(
            inner,
            mv=lambda x: inner.mv(x) + self._damping(x) * x,
            precondition=self.precondition,
            low_rank=None,  # precondition is the inverse of M without the damping
        )

    def precondition(self, r: Vector) -> Vector:
        """``r / damping`` for a bare matrix (r where the damping is 0), else what A does."""
        inner = self.operator.precondition(r)
        if inner is not r:
            return inner
        damping = self._damping(r)
        return r / torch.where(damping == 0, 1.0, damping)

    def tensors(self) -> tuple[Leaves, Leaves]:
        """A's tensors and the damping, expanded over the batch."""
        own, common = self.operator.tensors()
        like = self.operator.like()
        damping = torch.as_tensor(self.damping, dtype=like.dtype, device=like.device)
        return [damping.expand(self.shape[:-1]), *own], common

    def with_tensors(self, own: Leaves, common: Leaves) -> Damped:
        """The same form over other tensors."""
        return Damped(self.operator.with_tensors(own[1:], common), own[0])

    def add_batch(self, own: Leaves, common: Leaves, *, shared: bool) -> Damped:
        """One more batch dimension in front."""
        return Damped(self.operator.add_batch(own[1:], common, shared=shared), own[0])
