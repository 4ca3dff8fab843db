"""Dense factorisations: for small matrices, and as a check on the others."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import LinearSolver
from implicit_optim._operator import Linearized, dense_matrix
from implicit_optim._outcome import Solution, Status, status_of
from implicit_optim._vectors import norm, where


@dataclass(frozen=True)
class _Direct(LinearSolver):
    """What the dense solvers share: n products, then a factorisation of ``[*batch, n, n]``."""

    stats_names: ClassVar = ("residual_norm", "rhs_norm")
    failure: ClassVar[Status]

    _must: ClassVar = dict(max_n="be >= 1")

    max_n: int = 2048

    @torch.no_grad()
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """See [`LinearSolver.solve`][implicit_optim.LinearSolver.solve].

        Returns:
            ``stats``: ``residual_norm = ||b - A x||`` and ``rhs_norm``.

        Raises:
            ValueError: n is larger than ``max_n``.
        """
        n = b.shape[-1]
        if n > self.max_n:
            raise ValueError(
                f"a dense matrix of n = {n} takes n products and n^2 numbers a task: use CG() or "
                f"GMRES(), or raise max_n = {self.max_n}"
            )
        return self.on_matrix(dense_matrix(operator.mv, b), b)

    def on_matrix(self, matrix: Tensor, b: Tensor) -> Solution:
        """The same, once the matrix ``[*batch, n, n]`` is formed."""
        x, failed = self._factored(matrix, b)
        nonfinite = ~torch.isfinite(matrix.sum((-2, -1))) | ~torch.isfinite(norm(b))
        x = where(failed | nonfinite, math.nan, x)
        status = status_of((failed, self.failure), (nonfinite, Status.NONFINITE))
        residual = b - (matrix @ x.unsqueeze(-1)).squeeze(-1)
        return self._solution(x, status, norm(residual), norm(b))

    def _factored(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The solution, and the tasks that have none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cholesky(_Direct):
    """Dense Cholesky factorisation, for symmetric positive definite matrices of small n.

    It forms A by n products. A task whose A is not positive definite gets NaN and the status
    ``NEGATIVE_CURVATURE``: use [`QR`][implicit_optim.QR] there.

    Args:
        max_n: largest n that is accepted.

    Raises:
        ValueError: max_n is not positive, or n is larger.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> A = iopt.Dense(torch.tensor([[4.0, 0.0], [0.0, 2.0]]))
        >>> iopt.linear_solve(A, torch.ones(2), iopt.Cholesky()).value.tolist()
        [0.25, 0.5]

    Source: Golub & Van Loan 2013, section 4.2.
    """

    needs_symmetry: ClassVar = True
    failure: ClassVar = Status.NEGATIVE_CURVATURE

    def _factored(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1), info != 0


@dataclass(frozen=True)
class QR(_Direct):
    """Dense QR factorisation, for any invertible matrix of small n.

    It forms A by n products. A task whose A is singular to working precision has the status
    ``SINGULAR``.

    Args:
        max_n: largest n that is accepted.

    Raises:
        ValueError: max_n is not positive, or n is larger.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> A = iopt.Dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), symmetric=False)
        >>> x = iopt.linear_solve(A, torch.tensor([2.0, 3.0]), iopt.QR()).value
        >>> [round(v, 5) for v in x.tolist()]
        [3.0, 1.0]

    Source: Golub & Van Loan 2013, section 5.2.
    """

    failure: ClassVar = Status.SINGULAR

    def _factored(self, matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        finite = torch.isfinite(matrix.sum((-2, -1)))
        Q, R = torch.linalg.qr(torch.where(finite[..., None, None], matrix, 0.0))
        n = b.shape[-1]
        if n == 0:
            return b, torch.zeros_like(finite)
        failed = ~(_smallest(R) > n * torch.finfo(b.dtype).eps)
        eye = torch.eye(n, dtype=b.dtype, device=b.device)
        R = torch.where(failed[..., None, None], eye, R)
        x = torch.linalg.solve_triangular(R, Q.mT @ b.unsqueeze(-1), upper=True)
        return x.squeeze(-1), failed


def _smallest(R: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """The smallest singular value of a triangle, in units of its longest column; 0 or NaN for none.

    By inverse iteration from a vector without a pattern. The smallest pivot of a singular R can lie far
    above rounding. Source: Golub & Van Loan 2013, section 3.5.4.
    """
    scaled = R / R.abs().amax((-2, -1), keepdim=True)
    start = torch.arange(1, R.shape[-1] + 1, dtype=R.dtype, device=R.device).square().cos()
    y = torch.linalg.solve_triangular(
        scaled.mT, start.expand(R.shape[:-1]).unsqueeze(-1), upper=False
    )
    y = y / norm(y.squeeze(-1))[..., None, None]
    inverse = norm(torch.linalg.solve_triangular(scaled, y, upper=True).squeeze(-1))
    return 1 / inverse / norm(scaled.mT).amax(-1)
