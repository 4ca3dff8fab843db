"""Ways to make adapted parameters a function of the meta-parameters; swapping one is one argument."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicit_optim._batch import where
from implicit_optim._implicit import Curvature, OnSolve, attach
from implicit_optim._linear_solver import CG, LinearSolver
from implicit_optim._minimize import minimize
from implicit_optim._objective import Objective
from implicit_optim._operator import Hessian
from implicit_optim._solution import Status
from implicit_optim._solver import Solver


class MetaGradient(abc.ABC):
    """Solves the inner problems of a batch of tasks and makes the solutions differentiable.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class NoAdaptation(iopt.MetaGradient):
        ...     def adapt(self, objective, theta, data, solver, on_solve):
        ...         return {name: p.expand(len(data[0]), *p.shape) for name, p in theta[0].items()}
        >>> meta = iopt.MetaLearner(
        ...     torch.nn.Linear(1, 1),
        ...     torch.nn.functional.mse_loss,
        ...     solver=iopt.gd(lr=0.1),
        ...     meta_gradient=NoAdaptation(),
        ... )
        >>> batch = torch.ones(2, 3, 1), meta.model(torch.ones(2, 3, 1)).detach()
        >>> meta(batch, batch).tolist()
        [0.0, 0.0]
    """

    @abc.abstractmethod
    def adapt(
        self,
        objective: Objective,
        theta: tuple[Any, Any],
        data: tuple[Any, ...],
        solver: Solver,
        on_solve: OnSolve | None,
    ) -> Any:
        """Adapt to T tasks.

        Args:
            objective: one task's inner problem with the quadratic proximal term.
            theta: ``(anchor, lam)``; the anchor is also where the solver starts.
            data: pytrees of tensors ``[T, ...]``.
            solver: the inner solver.
            on_solve: told of every solve, by name.

        Returns:
            A pytree like the anchor with leaves ``[T, *shape]``, a function of theta and the data. A
            task in which NaN or inf appeared is NaN throughout, so that it cannot pass unseen.
        """


@dataclass(frozen=True)
class Implicit(MetaGradient):
    """Implicit MAML: the gradient of the exact minimiser, by one linear solve a task.

    ``d L/d theta = lam (H + lam I)^-1 grad L(phi)``

    Args:
        linear_solver: solves with the curvature. Default: 5 CG steps, as in the paper.
        curvature: [`Hessian`][implicit_optim.Hessian] (exact, indefinite on many networks) or
            [`GaussNewton`][implicit_optim.GaussNewton] (positive definite for every lam > 0, biased).

    Examples:
        >>> import implicit_optim as iopt
        >>> iopt.Implicit(iopt.CG(max_steps=5), curvature=iopt.GaussNewton).linear_solver.max_steps
        5

    Source: Rajeswaran et al. 2019, algorithm 2.
    """

    linear_solver: LinearSolver = field(default_factory=lambda: CG(max_steps=5))
    curvature: Curvature = Hessian

    def adapt(
        self,
        objective: Objective,
        theta: tuple[Any, Any],
        data: tuple[Any, ...],
        solver: Solver,
        on_solve: OnSolve | None,
    ) -> Any:
        """See [`MetaGradient.adapt`][implicit_optim.MetaGradient.adapt]."""
        return attach(
            _solve(objective, theta, data, solver, on_solve),
            objective,
            theta,
            *data,
            linear_solver=self.linear_solver,
            curvature=self.curvature,
            batch_ndim=1,
            on_solve=on_solve,
        )


@dataclass(frozen=True)
class FirstOrder(MetaGradient):
    """First-order MAML: ``d phi / d theta = I``, implicit MAML with zero CG steps.

    lam receives no gradient.

    Examples:
        >>> import implicit_optim as iopt
        >>> iopt.FirstOrder()
        FirstOrder()

    Source: Finn et al. 2017, section 5.2; Rajeswaran et al. 2019, appendix A.
    """

    def adapt(
        self,
        objective: Objective,
        theta: tuple[Any, Any],
        data: tuple[Any, ...],
        solver: Solver,
        on_solve: OnSolve | None,
    ) -> Any:
        """See [`MetaGradient.adapt`][implicit_optim.MetaGradient.adapt]."""
        phi = _solve(objective, theta, data, solver, on_solve)
        return pytree.tree_map(lambda p, anchor: p + (anchor - anchor.detach()), phi, theta[0])


def _solve(
    objective: Objective,
    theta: tuple[Any, Any],
    data: tuple[Any, ...],
    solver: Solver,
    on_solve: OnSolve | None,
) -> Any:
    """The inner solutions without a graph, NaN where a task met NaN or inf."""
    tasks = next(leaf for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)).shape[0]
    init = pytree.tree_map(lambda anchor: anchor.detach().expand(tasks, *anchor.shape), theta[0])
    solution = minimize(objective, init, theta, *data, solver=solver, batch_ndim=1)
    if on_solve is not None:
        on_solve("minimize", solution)
    bad = solution.status == Status.NONFINITE.value
    return pytree.tree_map(lambda p: where(bad, torch.full_like(p, math.nan), p), solution.value)
