"""Explicit matrices: dense and diagonal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from implicit_optim._operator.algebra import Operator, Vector
from implicit_optim._operator.fields import OfFields


@dataclass(frozen=True, eq=False)
class Dense(OfFields, Operator):
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

    _made_of: ClassVar = ("matrix",)

    matrix: Any
    symmetric: bool = True

    def __post_init__(self) -> None:
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


@dataclass(frozen=True, eq=False)
class Diagonal(OfFields, Operator):
    """A diagonal matrix per task: ``A x = d * x``.

    Its inverse is known, so that it preconditions what it is added to: CG on
    ``Dense(A) + Diagonal(d)`` is preconditioned by ``1 / d``, where all of d is positive.

    Args:
        entries: d, ``[*batch, n]``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> A = iopt.Dense(torch.ones(2, 2)) + iopt.Diagonal(torch.tensor([1.0, 3.0]))
        >>> A.mv(torch.ones(2)).tolist(), A.precondition(torch.ones(2)).tolist()
        ([3.0, 5.0], [1.0, 0.3333333432674408])
    """

    _made_of: ClassVar = ("entries",)

    entries: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, n)``."""
        return tuple(self.entries.shape)

    def mv(self, x: Vector) -> Vector:
        """``d * x``."""
        return self.entries * x

    def precondition(self, r: Vector) -> Vector:
        """``r / d``; r for a task in which an entry is not positive."""
        positive = (self.entries > 0).all(-1, keepdim=True)
        return r / torch.where(positive, self.entries, 1.0)
