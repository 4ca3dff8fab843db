"""The Jacobian of an inner problem that is a system of equations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from implicit_optim._evaluation import vjp
from implicit_optim._operator.base import Linearized
from implicit_optim._operator.curvature import Curvature


@dataclass(frozen=True, eq=False)
class Jacobian(Curvature):
    """Jacobian ``dR/dphi`` of an inner problem that is a system of equations ``R(phi, theta) = 0``.

    Args:
        problem: the inner problem; its objective is a [`Root`][implicit_optim.Root] or a
            [`FixedPoint`][implicit_optim.FixedPoint].
        phi: the point, flat ``[*batch, n]``.
        transposed: whether it stands for its transpose.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> phi = torch.tensor([1.0, 2.0])
        >>> swirl = iopt.Root(lambda phi, theta: torch.stack([phi[0] * phi[1], 3 * phi[0]]))
        >>> A = iopt.Jacobian(iopt.InnerProblem.bind(swirl, phi, ()), phi)
        >>> A.as_matrix().tolist(), A.transpose().as_matrix().tolist()
        ([[2.0, 1.0], [3.0, 0.0]], [[2.0, 3.0], [1.0, 0.0]])

    Source: Blondel et al. 2022, section 2.
    """

    transposed: bool = False

    @property
    def symmetric(self) -> bool:
        """False: it need not be."""
        return False

    def transpose(self) -> Jacobian:
        """``A^T``."""
        return replace(self, transposed=not self.transposed)

    def linearize(self) -> Linearized:
        """Keep the graph of the residual; a product is one pass through it, or through its transpose."""
        residual, pull = vjp(self.problem.stationarity, self.phi, ends=self.problem.ends)
        mv = pull
        if not self.transposed:
            _, mv = vjp(pull, torch.zeros_like(residual), transpose=True)
        return Linearized(mv, self.precondition, residual, symmetric=False)
