"""Woodbury's formula: Gauss-Newton matrices of few outputs, solved exactly in the space of outputs."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._linear_solver.base import LinearSolver
from implicit_optim._operator import Linearized
from implicit_optim._outcome import Solution, Status, status_of
from implicit_optim._vectors import norm, where


@dataclass(frozen=True)
class Woodbury(LinearSolver):
    r"""Exact solve with a Gauss-Newton matrix ``A = J^T H J + M`` of m outputs, whatever n is.

    ``A^-1 = M^-1 - M^-1 J^T S (I + S^T J M^-1 J^T S)^-1 S^T J M^-1`` with ``H = S S^T``, the Hessian of
    the loss in the outputs. A few-shot task has m = examples x classes, 25 for 5-way 1-shot. It costs m
    passes back and forth and m^2 numbers a task; CG needs at most m + 1 products for the same, so this
    pays where m is small and the solve must be exact.

    A task whose loss is not convex in the outputs has no such S: it is solved with the positive part of
    H, and has the status ``NEGATIVE_CURVATURE``. One whose inner matrix cannot be factored in its dtype
    gets NaN and the status ``SINGULAR``.

    Args:
        max_m: largest m that is accepted.

    Raises:
        TypeError: the operator is no Gauss-Newton matrix of an objective that knows its proximal term.
        ValueError: max_m is not positive, or m is larger.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> fit = iopt.Objective(
        ...     lambda phi, x: x @ phi, torch.nn.functional.mse_loss, iopt.proximal
        ... )
        >>> phi, theta = torch.zeros(3), (torch.zeros(3), torch.tensor(1.0))
        >>> x, y = torch.eye(3)[:2], torch.ones(2)
        >>> A = iopt.GaussNewton(iopt.InnerProblem.bind(fit, phi, theta, x, y), phi)
        >>> iopt.linear_solve(A, torch.ones(3), iopt.Woodbury()).value.tolist()
        [0.5, 0.5, 1.0]

    Source: Woodbury 1950; Nocedal & Wright 2006, appendix A.1.
    """

    stats_names: ClassVar = ("residual_norm", "rhs_norm")
    needs_symmetry: ClassVar = True

    _must: ClassVar = dict(max_m="be >= 1")

    max_m: int = 2048

    @torch.no_grad()
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """See [`LinearSolver.solve`][implicit_optim.LinearSolver.solve].

        Returns:
            ``stats``: ``residual_norm = ||b - A x||``, which costs a product, and ``rhs_norm``.
        """
        easy = operator.precondition(b)
        if operator.low_rank is None or easy is b:
            raise TypeError(
                "Woodbury needs curvature=GaussNewton and an objective that knows its proximal term, "
                "Objective(predict, loss, proximal): use CG()"
            )
        parts = operator.low_rank()
        m = parts.size
        if m > self.max_m:
            raise ValueError(f"m = {m} outputs a task: use CG(), or raise max_m = {self.max_m}")
        eye = torch.eye(m, dtype=b.dtype, device=b.device)
        units = [e.expand(*b.shape[:-1], m).contiguous() for e in eye]
        H = torch.stack([parts.hessian(e) for e in units], -1)
        K = torch.stack([parts.push(operator.precondition(parts.pull(e))) for e in units], -1)
        finite = torch.isfinite(H.sum((-2, -1)) + K.sum((-2, -1))) & torch.isfinite(norm(b))
        mask = finite[..., None, None]
        H, K = torch.where(mask, (H + H.mT) / 2, 0.0), torch.where(mask, (K + K.mT) / 2, 0.0)
        values, vectors = torch.linalg.eigh(H)
        concave = values.amin(-1) < -1e3 * torch.finfo(b.dtype).eps * values.abs().amax(-1)
        S = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        factor, info = torch.linalg.cholesky_ex(eye + S.mT @ K @ S)
        failed = info != 0
        seen = S.mT @ parts.push(easy).unsqueeze(-1)
        along = (S @ torch.cholesky_solve(seen, factor)).squeeze(-1)
        x = easy - operator.precondition(parts.pull(along))
        nonfinite = ~finite | (~failed & ~torch.isfinite(norm(x)))
        x = where(failed | nonfinite, math.nan, x)
        indefinite = (concave, Status.NEGATIVE_CURVATURE)
        status = status_of(indefinite, (failed, Status.SINGULAR), (nonfinite, Status.NONFINITE))
        return self._solution(x, status, norm(b - operator.mv(x)), norm(b))
