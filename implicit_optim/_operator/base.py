"""An operator at one point, with everything that its products share already computed.

A curvature keeps the graph of one gradient and pulls every product back through it, about 2 gradients
a product instead of 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


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


def dense_matrix(mv: Callable[[Tensor], Tensor], like: Tensor) -> Float[Tensor, "*batch n n"]:
    """The matrices of a product of vectors ``[*batch, n]``, from its n columns."""
    basis = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    columns = [mv(e.expand(like.shape).contiguous()) for e in basis]
    return torch.stack(columns, -1) if columns else like.new_zeros((*like.shape, 0))


def estimated_diagonal(
    mv: Callable[[Tensor], Tensor], like: Tensor, probes: int, generator: torch.Generator | None
) -> Float[Tensor, "*batch n"]:
    """Hutchinson's estimate of the diagonals, from products with so many vectors of random signs."""
    total = torch.zeros_like(like)
    for _ in range(probes):
        coins = torch.randint(2, like.shape, generator=generator, device=like.device)
        signs = 2 * coins.to(like.dtype) - 1
        total = total + signs * mv(signs)
    return total / probes
