"""Linear operators on flat vectors ``[*batch, n]``: matrices that are never formed.

An operator that depends on tensors is *linearised once a solve*: ``linearize()`` keeps the graph of
one gradient and pulls every product back through it, about 2 gradients a product instead of 4.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, "*batch n"]
Leaves = list[Any]
# What `A + B`, `A * c` and `A @ B` make: filled by _algebra, which imports this file.
SUGAR: dict[str, Callable[[Operator, Any], Operator]] = {}


class Operator(abc.ABC):
    """A linear map per task, ``[*batch, n] -> [*batch, n]``; symmetric unless it says otherwise.

    Subclasses that are built from tensors implement [`tensors`][implicit_optim.Operator.tensors] and
    the two ways back, so that [`linear_solve`][implicit_optim.linear_solve] can differentiate and
    batch through them. ``A + 0.5``, ``2 * A``, ``A + B``, ``A - B`` and ``A @ B`` are operators too.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class Weights(iopt.Operator):
        ...     def __init__(self, d):
        ...         self.d = d
        ...
        ...     shape = property(lambda self: tuple(self.d.shape))
        ...     mv = lambda self, x: self.d * x
        ...     tensors = lambda self: ([self.d], [])
        ...     with_tensors = lambda self, own, common: Weights(own[0])
        ...     add_batch = lambda self, own, common, *, shared: Weights(own[0])
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
        """The same operator over other tensors."""

    @abc.abstractmethod
    def add_batch(self, own: Leaves, common: Leaves, *, shared: bool) -> Operator:
        """The same operator with one more batch dimension in front; ``shared``: not in ``common``."""

    def linearize(self) -> Linearized:
        """A cheap form for many products at one point; not differentiable in the tensors."""
        return Linearized(self.mv, self.precondition, symmetric=self.symmetric)

    def fallback(self) -> Operator | None:
        """What takes its place in tasks where it proves not positive definite. Default: nothing."""
        return None

    def parts(self, solve: Callable[[Operator, slice | int], Any]) -> list[Any]:
        """``solve`` some tasks after the other, or all at once; each with its part of the operator.

        A part is where a slice says, or an index: of a single task, without the batch dimension.
        """
        return [solve(self, slice(None))]

    def precondition(self, r: Vector) -> Vector:
        """``M^-1 r`` for the easy part M of ``A = H + M``, its proximal or damping term.

        It preconditions CG and is the first-order direction. Default: r itself, no such part.
        """
        return r

    def as_matrix(self) -> Float[Tensor, "*batch n n"]:
        """The dense matrix, from n products: for small n, and for tests.

        Returns:
            ``[*batch, n, n]``.
        """
        return dense_matrix(self.linearize().mv, self.shape, self.like())

    def diagonal(
        self, probes: int | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch n"]:
        """The diagonal of A: exact by n products, or Hutchinson's estimate by a few.

        The estimate is ``1/k sum s * (A s)`` over k vectors s of random signs. It has no bias; its
        variance in entry i is ``1/k`` times the sum of squares of A's other entries in row i.

        Args:
            probes: k >= 1; default: all n unit vectors, exact.
            generator: of the signs, on the operator's device. Default: torch's own.

        Returns:
            ``[*batch, n]``.

        Raises:
            ValueError: ``probes < 1``.

        Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix".
        """
        if probes is None:
            return self.as_matrix().diagonal(dim1=-2, dim2=-1)
        if probes < 1:
            raise ValueError(f"Invalid probes: {probes}: it must be >= 1, or None for all")
        like, linearized = self.like(), self.linearize()
        total = like.new_zeros(self.shape)
        for _ in range(probes):
            coins = torch.randint(2, self.shape, generator=generator, device=like.device)
            signs = 2 * coins.to(like.dtype) - 1
            total = total + signs * linearized.mv(signs)
        return total / probes

    def __add__(self, other: Any) -> Operator:
        if isinstance(other, (Operator, Tensor, int, float)):
            return SUGAR["add"](self, other)
        return NotImplemented

    def __mul__(self, factor: Any) -> Operator:
        if isinstance(factor, (Tensor, int, float)):
            return SUGAR["mul"](self, factor)
        return NotImplemented

    def __matmul__(self, other: Any) -> Operator:
        return SUGAR["matmul"](self, other) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Any) -> Operator:
        return self + -1 * other

    __radd__, __rmul__ = __add__, __mul__

    def like(self) -> Tensor:
        """A tensor with the dtype and the device of the operator's vectors."""
        own, common = self.tensors()
        return next(t for t in [*own, *common] if isinstance(t, Tensor) and t.is_floating_point())


def dense_matrix(
    mv: Callable[[Tensor], Tensor], shape: tuple[int, ...], like: Tensor
) -> Float[Tensor, "*batch n n"]:
    """The matrices of a product of vectors ``(*batch, n)``, from its n columns."""
    basis = torch.eye(shape[-1], dtype=like.dtype, device=like.device)
    columns = [mv(e.expand(shape).contiguous()) for e in basis]
    return torch.stack(columns, -1) if columns else like.new_zeros((*shape, 0))


class Composed(Operator):
    """An operator that is a dataclass of tensors ``[*batch, ...]`` and of other operators."""

    _made_of: ClassVar[tuple[str, ...]]  # the fields that are one or the other

    def tensors(self) -> tuple[Leaves, Leaves]:
        """Those of every field, in order; a tensor is the operator's own."""
        own: Leaves = []
        common: Leaves = []
        for name in self._made_of:
            field = getattr(self, name)
            more = field.tensors() if isinstance(field, Operator) else ([self._own(field)], [])
            own, common = own + more[0], common + more[1]
        return own, common

    def _own(self, field: Any) -> Any:
        """The tensor that a field stands for; ``None`` in a blank, to be filled by with_tensors."""
        return field

    def with_tensors(self, own: Leaves, common: Leaves) -> Operator:
        """The same form over other tensors."""
        return self._filled(own, common, lambda operator, *leaves: operator.with_tensors(*leaves))

    def add_batch(self, own: Leaves, common: Leaves, *, shared: bool) -> Operator:
        """One more batch dimension in front."""
        return self._filled(own, common, lambda o, *leaves: o.add_batch(*leaves, shared=shared))

    def _filled(self, own: Leaves, common: Leaves, fill: Callable[..., Operator]) -> Operator:
        """The same form; ``fill`` gives each operator that it is made of its share of the tensors."""
        fields: dict[str, Any] = {}
        for name in self._made_of:
            field, is_last = getattr(self, name), name == self._made_of[-1]
            if isinstance(field, Operator):
                m, n = (len(own), len(common)) if is_last else map(len, field.tensors())
                fields[name] = fill(field, own[:m], common[:n])
                own, common = own[m:], common[n:]
            else:
                fields[name], *own = own
        return replace(cast(Any, self), **fields)


@dataclass(frozen=True, eq=False)
class Linearized:
    """An operator at one point with everything that its products share already computed.

    Attributes:
        mv: the product, ``[*batch, n]`` to ``[*batch, n]``.
        precondition: ``M^-1 r``, see [`Operator`][implicit_optim.Operator].
        gradient: gradient of the objective at the point ``[*batch, n]``, where the operator has one.
        value: value of the objective at the point ``[*batch]``, where the operator has one.
        symmetric: whether ``A = A^T``.
        low_rank: makes A's parts ``J^T H J + M``, where the operator has this form.
        fallback: makes what takes its place in tasks where it proves not positive definite.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> twice = iopt.Linearized(mv=lambda x: 2 * x, precondition=lambda r: r)
        >>> iopt.CG(max_steps=1).solve(twice, torch.ones(3)).value.tolist()
        [0.5, 0.5, 0.5]
    """

    mv: Callable[[Tensor], Tensor]
    precondition: Callable[[Tensor], Tensor]
    gradient: Tensor | None = None
    value: Tensor | None = None
    symmetric: bool = True
    low_rank: Callable[[], LowRank] | None = None
    fallback: Callable[[], Linearized] | None = None


@dataclass(frozen=True, eq=False)
class LowRank:
    """What a Gauss-Newton matrix ``A = J^T H J + M`` is made of, for tasks with m outputs.

    Attributes:
        pull: ``J^T u``, from ``[*batch, m]`` to ``[*batch, n]``.
        push: ``J x``, from ``[*batch, n]`` to ``[*batch, m]``.
        hessian: ``H u`` of the loss in the outputs, ``[*batch, m]``.
        size: m.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> fit = iopt.Objective(
        ...     lambda phi, x: x @ phi, torch.nn.functional.mse_loss, iopt.proximal
        ... )
        >>> phi, x = torch.zeros(3), torch.ones(2, 3)
        >>> theta = (torch.zeros(3), torch.tensor(1.0))
        >>> problem = iopt.InnerProblem.bind(fit, phi, theta, x, torch.ones(2))
        >>> iopt.GaussNewton(problem, phi).linearize().low_rank().size
        2
    """

    pull: Callable[[Tensor], Tensor]
    push: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]
    size: int
