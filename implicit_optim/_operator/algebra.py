"""Operators made of others: `A + 0.5`, `2 * A`, `A + B`, `A @ B`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_optim._operator.base import SUGAR, Composed, Linearized, Operator, Vector


@dataclass(frozen=True, eq=False)
class _Pair(Composed):
    """What operators made of two others share."""

    _made_of: ClassVar = ("left", "right")

    left: Operator
    right: Operator

    def __post_init__(self) -> None:
        if any(leaf is None for leaf in self.tensors()[0]):  # a blank, to be filled by with_tensors
            return
        if self.left.shape != self.right.shape:
            raise ValueError(
                f"the operators take vectors of different shapes, {self.left.shape} and "
                f"{self.right.shape}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, n)``."""
        return self.left.shape

    def mv(self, x: Vector) -> Vector:
        """The product ``A x``."""
        return self._combined(self.left, self.right, x)

    def linearize(self) -> Linearized:
        """Linearise both."""
        left, right = self.left.linearize(), self.right.linearize()
        return Linearized(
            lambda x: self._combined(left, right, x), self.precondition, symmetric=self.symmetric
        )

    def fallback(self) -> Operator | None:
        """Made of what takes the places of its two."""
        left, right = self.left.fallback(), self.right.fallback()
        if left is None and right is None:
            return None
        return replace(self, left=left or self.left, right=right or self.right)

    @staticmethod
    def _combined(left: Operator | Linearized, right: Operator | Linearized, x: Tensor) -> Tensor:
        raise NotImplementedError


class Sum(_Pair):
    """``A + B`` of two operators; write it so.

    Args:
        left: A.
        right: B, for vectors ``[*batch, n]`` of the same shape.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> A = iopt.Dense(torch.eye(2)) + iopt.Dense(torch.ones(2, 2))
        >>> A.mv(torch.tensor([1.0, 2.0])).tolist()
        [4.0, 5.0]
    """

    @property
    def symmetric(self) -> bool:
        """Whether both are."""
        return self.left.symmetric and self.right.symmetric

    def transpose(self) -> Sum:
        """``A^T + B^T``."""
        return Sum(self.left.transpose(), self.right.transpose())

    @staticmethod
    def _combined(left: Operator | Linearized, right: Operator | Linearized, x: Tensor) -> Tensor:
        return left.mv(x) + right.mv(x)

    def precondition(self, r: Vector) -> Vector:
        """That of the one that has an easy part, if it is one of the two."""
        left, right = self.left.precondition(r), self.right.precondition(r)
        if left is not r and right is not r:  # the inverse of a sum is no sum of inverses
            return r
        return right if left is r else left


class Product(_Pair):
    """``A @ B``: first B, then A; write it so. It counts as not symmetric.

    Args:
        left: A.
        right: B, for vectors ``[*batch, n]`` of the same shape.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> A = iopt.Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), symmetric=False)
        >>> (A @ (2 * A.transpose())).as_matrix().tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """

    @property
    def symmetric(self) -> bool:
        """False: where A and B do not commute, it is not."""
        return False

    def transpose(self) -> Product:
        """``B^T A^T``."""
        return Product(self.right.transpose(), self.left.transpose())

    @staticmethod
    def _combined(left: Operator | Linearized, right: Operator | Linearized, x: Tensor) -> Tensor:
        return left.mv(right.mv(x))


@dataclass(frozen=True, eq=False)
class _Numbered(Composed):
    """What operators made of another and a number share; the number is their second field."""

    operator: Operator

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, n)``."""
        return self.operator.shape

    @property
    def symmetric(self) -> bool:
        """Whether A is."""
        return self.operator.symmetric

    def transpose(self) -> Operator:
        """The same with ``A^T``."""
        return replace(self, operator=self.operator.transpose())

    def fallback(self) -> Operator | None:
        """The same with what takes A's place."""
        other = self.operator.fallback()
        return None if other is None else replace(self, operator=other)

    def _number(self, x: Tensor) -> Tensor:
        number = getattr(self, self._made_of[0])
        return torch.as_tensor(number, dtype=x.dtype, device=x.device).unsqueeze(-1)

    def mv(self, x: Vector) -> Vector:
        """The product with x."""
        return self._combined(self.operator.mv(x), x)

    def linearize(self) -> Linearized:
        """Linearise A; the number costs nothing."""
        inner = self.operator.linearize()
        return replace(
            inner,
            mv=lambda x: self._combined(inner.mv(x), x),
            precondition=self.precondition,
            low_rank=None,  # it is that of A alone
            fallback=None,
        )

    def _combined(self, Ax: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _divided(self, r: Tensor) -> Tensor:
        """``r / c``, r where c <= 0: what preconditions must be positive definite."""
        number = self._number(r)
        return r / torch.where(number > 0, number, 1.0)

    def _own(self, field: Any) -> Any:
        """The number, expanded over the batch."""
        if field is None:
            return None
        like = self.operator.like()
        number = torch.as_tensor(field, dtype=like.dtype, device=like.device)
        return number.expand(self.shape[:-1])


@dataclass(frozen=True, eq=False)
class Damped(_Numbered):
    """``A + c I``, with ``r / c`` as the first-order direction; ``A + c`` is short for it.

    Args:
        operator: A.
        damping: c, a number or tensor, a scalar ``[]`` or one per task ``[*batch]``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.Damped(iopt.Dense(torch.eye(2)), 0.5).mv(torch.ones(2)).tolist()
        [1.5, 1.5]
    """

    _made_of: ClassVar = ("damping", "operator")

    damping: Any

    def _combined(self, Ax: Tensor, x: Tensor) -> Tensor:
        return Ax + self._number(x) * x

    def precondition(self, r: Vector) -> Vector:
        """``r / c`` for a bare matrix (r where c <= 0), else what A does."""
        inner = self.operator.precondition(r)
        return self._divided(r) if inner is r else inner


@dataclass(frozen=True, eq=False)
class Scaled(_Numbered):
    """``c A``; ``c * A`` is short for it.

    Args:
        operator: A.
        factor: c, a number or tensor, a scalar ``[]`` or one per task ``[*batch]``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> (3 * iopt.Dense(torch.eye(2))).mv(torch.ones(2)).tolist()
        [3.0, 3.0]
    """

    _made_of: ClassVar = ("factor", "operator")

    factor: Any

    def _combined(self, Ax: Tensor, x: Tensor) -> Tensor:
        return self._number(x) * Ax

    def precondition(self, r: Vector) -> Vector:
        """A's over c (A's where c <= 0)."""
        inner = self.operator.precondition(r)
        return r if inner is r else self._divided(inner)


SUGAR.update(
    add=lambda A, B: Sum(A, B) if isinstance(B, Operator) else Damped(A, B),
    mul=Scaled,
    matmul=Product,
)
