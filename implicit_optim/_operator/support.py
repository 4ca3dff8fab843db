"""A curvature on the numbers that are not zero: what an l1 norm leaves to differentiate."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from implicit_optim._operator.algebra import Operator, Vector
from implicit_optim._operator.base import Linearized
from implicit_optim._operator.curvature import Curvature, CurvatureChoice
from implicit_optim._problem import InnerProblem, smooth, strengths, subgradient


@dataclass(frozen=True, eq=False)
class OnSupport(Curvature):
    """``P A P + (I - P)``: A the curvature of the smooth part, P the projection on ``phi != 0``.

    The problem's objective is an [`L1`][implicit_optim.L1]. It is as definite as A is on the support,
    and of a right-hand side in the range of P the solution is ``A_SS^-1 b_S``, zero elsewhere.

    Source: Bertrand et al. 2020, proposition 2.
    """

    matrix: CurvatureChoice
    transposed: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether A is."""
        return self._whole().symmetric

    def transpose(self) -> Operator:
        """``P A^T P + (I - P)``."""
        return replace(self, transposed=not self.transposed)

    def mv(self, x: Vector) -> Vector:
        """``P A P x + (I - P) x``."""
        return self._restrict(self._whole().mv, x)

    def precondition(self, r: Vector) -> Vector:
        """A's, on the support."""
        return self._inside(self._whole().precondition, r)

    def linearize(self) -> Linearized:
        """Linearise A; the gradient becomes the smallest subgradient."""
        whole = self._whole().linearize()
        gradient = whole.gradient
        if gradient is not None:
            gradient = subgradient(self.phi, gradient, strengths(self.problem, self.phi))
        mv, solve = partial(self._restrict, whole.mv), partial(self._inside, whole.precondition)
        return Linearized(mv, solve, gradient, symmetric=whole.symmetric)

    def fallback(self) -> Operator | None:
        """That of A, on the support."""
        if self._whole().fallback() is None:
            return None
        return replace(self, matrix=partial(_fallback_of, self.matrix))

    def _whole(self) -> Operator:
        whole = self.matrix(smooth(self.problem), self.phi)
        if not isinstance(whole, Operator):
            raise TypeError(f"curvature must return an Operator, got {whole!r}")
        return whole.transpose() if self.transposed else whole

    def _restrict(self, mv: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        zero = self.phi == 0
        return torch.where(zero, x, mv(torch.where(zero, 0.0, x)))

    def _inside(self, solve: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
        solved = solve(r)
        return r if solved is r else torch.where(self.phi == 0, r, solved)  # r itself: no such part


def _fallback_of(matrix: CurvatureChoice, problem: InnerProblem, phi: Tensor) -> Operator:
    return cast(Operator, matrix(problem, phi).fallback())
