"""Explicit matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from implicit_optim._operator._base import Leaves, Operator, Vector


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
