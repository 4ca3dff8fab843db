"""Linear operators on flat vectors ``[*batch, n]``: matrices that are never formed. Their algebra."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._operator.base import Linearized, dense_matrix, estimated_diagonal
from implicit_optim._operator.fields import Leaves, OfFields

Vector = Float[Tensor, "*batch n"]
Map = Callable[[Tensor], Tensor]
_NUMBERS = (Tensor, int, float)


class Operator(abc.ABC):
    """A linear map per task, ``[*batch, n] -> [*batch, n]``; symmetric unless it says otherwise.

    A [`linear_solve`][implicit_optim.linear_solve] differentiates and batches through what ``tensors``
    and ``with_tensors`` of a subclass tell. ``A + 0.5``, ``2 * A``, ``A + B``, ``A - B`` and ``A @ B``
    are operators too.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class Weights(iopt.Operator):
        ...     __init__ = lambda self, d: setattr(self, "d", d)
        ...     shape = property(lambda self: tuple(self.d.shape))
        ...     mv = lambda self, x: self.d * x
        ...     tensors = lambda self: ([self.d], [])
        ...     with_tensors = lambda self, own, common: Weights(own[0])
        >>> d = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> iopt.linear_solve(Weights(d), torch.ones(2)).value.sum().backward()
        >>> d.grad.tolist()  # of 1 / d
        [-1.0, -0.0625]

    Source: the shape of the class follows lineax; the products are Pearlmutter's (1994).
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, n)`` of the vectors that it takes."""

    @property
    def symmetric(self) -> bool:
        """Whether ``A = A^T``; where not, ``transpose`` must be written too. Default: yes."""
        return True

    def transpose(self) -> Operator:
        """``A^T``. Default, for a symmetric A: itself."""
        return self

    @abc.abstractmethod
    def mv(self, x: Vector) -> Vector:
        """The product ``A x``, differentiable in the operator's tensors and in x."""

    @abc.abstractmethod
    def tensors(self) -> tuple[Leaves, Leaves]:
        """Tensors that carry the batch dimensions, and tensors that all tasks share."""

    @abc.abstractmethod
    def with_tensors(self, own: Leaves, common: Leaves) -> Operator:
        """The same operator over other tensors; over ``None``, a template for later tensors."""

    def add_batch(self, own: Leaves, common: Leaves, *, shared: bool) -> Operator:
        """With one more batch dimension in front of ``own`` and, unless ``shared``, of ``common``.

        Default: right where ``common`` is empty.
        """
        return self.with_tensors(own, common)

    def linearize(self) -> Linearized:
        """A cheap form for many products at one point; not differentiable in the tensors."""
        return Linearized(self.mv, self.precondition, symmetric=self.symmetric)

    def fallback(self) -> Operator | None:
        """What takes its place in tasks where it proves not positive definite. Default: nothing."""
        return None

    def parts(self, solve: Callable[[Operator, slice | int], Any]) -> list[Any]:
        """``solve(part, place)`` for parts of the tasks, see `InnerProblem.parts`. Default: for all."""
        return [solve(self, slice(None))]

    def precondition(self, r: Vector) -> Vector:
        """``M^-1 r`` for the easy part M of ``A = H + M``, its proximal or damping term.

        It preconditions CG and is the first-order direction. Default: r itself, no such part.
        """
        return r

    def as_matrix(self) -> Float[Tensor, "*batch n n"]:
        """The dense matrix ``[*batch, n, n]``, from n products: for small n, and for tests."""
        return dense_matrix(self.linearize().mv, self.like().new_zeros(self.shape))

    def diagonal(
        self, probes: int | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch n"]:
        """The diagonal ``[*batch, n]`` of A: exact by n products, or Hutchinson's estimate by a few.

        The estimate is ``1/k sum s * (A s)`` over k vectors s of random signs. It has no bias; its
        variance in entry i is ``1/k`` times the sum of squares of A's other entries in row i.

        Args:
            probes: k >= 1; default: all n unit vectors, exact.
            generator: of the signs, on the operator's device. Default: torch's own.

        Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix".
        """
        if probes is None:
            return self.as_matrix().diagonal(dim1=-2, dim2=-1)
        if probes < 1:
            raise ValueError(f"Invalid probes: {probes}: it must be >= 1, or None for all")
        zero = self.like().new_zeros(self.shape)
        return estimated_diagonal(self.linearize().mv, zero, probes, generator)

    def like(self) -> Tensor:
        """A tensor with the dtype and the device of the operator's vectors."""
        own, common = self.tensors()
        return next(t for t in [*own, *common] if isinstance(t, Tensor) and t.is_floating_point())

    def __add__(self, other: Any) -> Operator:
        if isinstance(other, Operator):
            return Sum(self, other)
        return Damped(self, other) if isinstance(other, _NUMBERS) else NotImplemented

    def __mul__(self, factor: Any) -> Operator:
        return Scaled(self, factor) if isinstance(factor, _NUMBERS) else NotImplemented

    def __matmul__(self, other: Any) -> Operator:
        return Product(self, other) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Any) -> Operator:
        return self + -1 * other

    __radd__, __rmul__ = __add__, __mul__


class _Combined(OfFields, Operator):
    """What operators made of others share; ``_product`` says how their products make its own."""

    @property
    def _operators(self) -> list[Operator]:
        return [field for field in self._fields() if isinstance(field, Operator)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, n)``."""
        return self._operators[0].shape

    @property
    def symmetric(self) -> bool:
        """Whether all of them are."""
        return all(A.symmetric for A in self._operators)

    def transpose(self) -> Operator:
        """The same of their transposes."""
        return self._of(A.transpose() for A in self._operators)

    def mv(self, x: Vector) -> Vector:
        """The product with x."""
        return self._product(*(A.mv for A in self._operators), x)

    def linearize(self) -> Linearized:
        """Linearise each; the gradient is that of the one that has one."""
        parts = [A.linearize() for A in self._operators]
        known = [(part.gradient, part.value) for part in parts if part.gradient is not None]
        gradient, value = known[0] if len(known) == 1 else (None, None)
        mv = partial(self._product, *(part.mv for part in parts))
        return Linearized(mv, self.precondition, gradient, value, self.symmetric)

    def fallback(self) -> Operator | None:
        """The same of what takes their places."""
        others = [A.fallback() for A in self._operators]
        pairs = zip(others, self._operators, strict=True)
        return self._of(other or A for other, A in pairs) if any(others) else None

    def _of(self, operators: Iterable[Operator]) -> Operator:
        names = self._made_of[: len(self._operators)]  # the operators come first
        return replace(cast(Any, self), **dict(zip(names, operators, strict=True)))

    def _product(self, *maps_and_x: Any) -> Tensor:
        """``A x`` of their products, and of x."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class _Pair(_Combined):
    _made_of: ClassVar = ("left", "right")

    left: Operator
    right: Operator

    def __post_init__(self) -> None:
        one, two = self.left.shape, self.right.shape
        if one != two:
            raise ValueError(f"the operators take vectors of different shapes, {one} and {two}")


class Sum(_Pair):
    """``A + B`` of two operators for vectors of one shape; a ``ValueError`` where it differs."""

    def _product(self, A: Map, B: Map, x: Tensor) -> Tensor:
        return A(x) + B(x)

    def precondition(self, r: Vector) -> Vector:
        """That of the one that has an easy part, if it is one of the two."""
        left, right = self.left.precondition(r), self.right.precondition(r)
        if left is not r and right is not r:  # the inverse of a sum is no sum of inverses
            return r
        return right if left is r else left


class Product(_Pair):
    """``A @ B``: first B, then A. It counts as not symmetric; a ``ValueError`` where shapes differ."""

    @property
    def symmetric(self) -> bool:
        """False: where A and B do not commute, it is not."""
        return False

    def transpose(self) -> Operator:
        """``B^T A^T``."""
        return Product(self.right.transpose(), self.left.transpose())

    def linearize(self) -> Linearized:
        """Linearise both; a product is the curvature of no objective."""
        return replace(super().linearize(), gradient=None, value=None)

    def _product(self, A: Map, B: Map, x: Tensor) -> Tensor:
        return A(B(x))


@dataclass(frozen=True, eq=False)
class Damped(_Combined):
    """``A + c I``, with ``r / c`` as the first-order direction; ``A + c`` is short for it.

    Args:
        operator: A.
        damping: c, a number or tensor, a scalar ``[]`` or one per task ``[*batch]``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.Damped(iopt.Dense(torch.eye(2)), 0.5).mv(torch.ones(2)).tolist()
        [1.5, 1.5]
    """

    _made_of: ClassVar = ("operator", "damping")

    operator: Operator
    damping: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", _per_task(self.damping, self.operator))

    def _product(self, A: Map, x: Tensor) -> Tensor:
        return A(x) + self.damping.unsqueeze(-1) * x

    def precondition(self, r: Vector) -> Vector:
        """``r / c`` for a bare matrix (r where c <= 0), else what A does."""
        inner = self.operator.precondition(r)
        return _divided(r, self.damping) if inner is r else inner


@dataclass(frozen=True, eq=False)
class Scaled(_Combined):
    """``c A``, c a number or tensor, a scalar ``[]`` or one per task ``[*batch]``."""

    _made_of: ClassVar = ("operator", "factor")

    operator: Operator
    factor: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", _per_task(self.factor, self.operator))

    def _product(self, A: Map, x: Tensor) -> Tensor:
        return self.factor.unsqueeze(-1) * A(x)

    def precondition(self, r: Vector) -> Vector:
        """A's over c (A's where c <= 0)."""
        inner = self.operator.precondition(r)
        return r if inner is r else _divided(inner, self.factor)


def _per_task(number: Any, operator: Operator) -> Tensor:
    like = operator.like()
    tensor = torch.as_tensor(number, dtype=like.dtype, device=like.device)
    return tensor.expand(operator.shape[:-1])


def _divided(r: Tensor, number: Tensor) -> Tensor:
    """``r / c``, r where c <= 0: what preconditions must be positive definite."""
    return r / torch.where(number > 0, number, 1.0).unsqueeze(-1)
