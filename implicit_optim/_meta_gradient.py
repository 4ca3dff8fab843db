"""Ways to make adapted parameters a function of the meta-parameters; swapping one is one argument."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from implicit_optim._ambient import full_precision, twice_differentiable
from implicit_optim._batch import where
from implicit_optim._implicit import Curvature, attach_flat
from implicit_optim._inner_problem import InnerProblem
from implicit_optim._linear_solver import CG, LinearSolver
from implicit_optim._minimize import run, solve
from implicit_optim._operator import Hessian
from implicit_optim._solution import OnSolve, Solution, Status
from implicit_optim._solver import Solver


class MetaGradient(abc.ABC):
    """Solves the inner problems of a batch of tasks and makes the solutions differentiable.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class NoAdaptation(iopt.MetaGradient):
        ...     def adapt(self, problem, start, solver, on_solve):
        ...         anchor, lam = problem.theta
        ...         return problem.layout.ravel(anchor).expand_as(start)
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
        problem: InnerProblem,
        start: Float[Tensor, "*batch n"],
        solver: Solver,
        on_solve: OnSolve,
    ) -> Float[Tensor, "*batch n"]:
        """Adapt to every task of a batch.

        Args:
            problem: the inner problems, with a proximal term; ``problem.theta`` is ``(anchor, lam)``.
            start: where the solver starts, ``[*batch, n]``, without a graph: the anchor.
            solver: the inner solver.
            on_solve: told of every solve, by name.

        Returns:
            phi ``[*batch, n]``, a function of theta and the data. A task in which NaN or inf appeared
            is NaN throughout, so that it cannot pass unseen.
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
        self, problem: InnerProblem, start: Tensor, solver: Solver, on_solve: OnSolve
    ) -> Tensor:
        """See [`MetaGradient.adapt`][implicit_optim.MetaGradient.adapt]."""
        return attach_flat(
            _solved(problem, start, solver, on_solve),
            problem,
            linear_solver=self.linear_solver,
            curvature=self.curvature,
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
        self, problem: InnerProblem, start: Tensor, solver: Solver, on_solve: OnSolve
    ) -> Tensor:
        """See [`MetaGradient.adapt`][implicit_optim.MetaGradient.adapt]."""
        phi = _solved(problem, start, solver, on_solve)
        anchor = problem.layout.ravel(problem.theta[0])
        return phi + (anchor - anchor.detach())


@dataclass(frozen=True)
class Unrolled(MetaGradient):
    """MAML: differentiate through every step of the inner solver.

    Memory grows with the number of steps. The gradient is that of the iterate, not of the minimiser,
    so it also reaches a learned ``lr``.

    Raises:
        TypeError: when it adapts, with a solver whose steps keep no graph: ``newton_cg``,
            ``from_torch``.

    Examples:
        >>> import implicit_optim as iopt
        >>> iopt.Unrolled()
        Unrolled()

    Source: Finn et al. 2017, Eq. 1; Rajeswaran et al. 2019, Eq. 3.
    """

    def adapt(
        self, problem: InnerProblem, start: Tensor, solver: Solver, on_solve: OnSolve
    ) -> Tensor:
        """See [`MetaGradient.adapt`][implicit_optim.MetaGradient.adapt]."""
        if not solver.differentiable:
            raise TypeError(
                "meta_gradient=Unrolled() needs a solver whose steps can be differentiated, gd or agd, "
                f"got {type(solver).__name__.strip('_')}: use Implicit(), which takes any solver"
            )
        anchor = problem.layout.ravel(problem.theta[0])
        with twice_differentiable(), full_precision(start.device):
            solution = run(problem, anchor.expand_as(start), solver)
        on_solve("minimize", solution)
        return _or_nan(solution)


def _solved(problem: InnerProblem, start: Tensor, solver: Solver, on_solve: OnSolve) -> Tensor:
    """The inner solutions, without a graph."""
    solution = solve(problem, start, solver)
    on_solve("minimize", solution)
    return _or_nan(solution)


def _or_nan(solution: Solution) -> Tensor:
    bad = solution.status == Status.NONFINITE.value
    return where(bad, math.nan, solution.value)
