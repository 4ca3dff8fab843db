"""Ways to make adapted parameters a function of the meta-parameters; swapping one is one argument."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._evaluation import full_precision
from implicit_optim._implicit import attach_flat
from implicit_optim._linear_solver import CG, LinearSolver
from implicit_optim._minimize import run, solve
from implicit_optim._operator import CurvatureChoice, Hessian
from implicit_optim._outcome import OnSolve, Solution, Status
from implicit_optim._problem import InnerProblem
from implicit_optim._solver import Solver
from implicit_optim._vectors import where

Leaves = dict[str, Tensor]
Vectors = Float[Tensor, "*batch n"]


class MetaGradient:
    """Solves the inner problems of a batch of tasks and makes the solutions differentiable.

    A rule of one's own writes the step of `adapt` in which it differs: `solve` or `differentiate`.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class HalfTheWay(iopt.MetaGradient):
        ...     def differentiate(self, phi, problem, on_solve):
        ...         anchor = problem.layout.ravel(problem.theta.anchor)
        ...         return phi + (anchor - anchor.detach()) / 2
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> meta = iopt.MetaLearner(
        ...     model,
        ...     torch.nn.functional.mse_loss,
        ...     solver=iopt.gd(lr=0.1),
        ...     meta_gradient=HalfTheWay(),
        ... )
        >>> batch = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        >>> meta.adapt(batch)["weight"].sum().backward()
        >>> model.weight.grad.item()
        0.5
    """

    def adapt(
        self, problem: InnerProblem, start: Vectors, solver: Solver, on_solve: OnSolve
    ) -> Vectors:
        """Adapt to every task of a batch: solve, then differentiate.

        Args:
            problem: the inner problems; ``problem.theta`` has ``anchor`` and ``lam``.
            start: where the solver starts, ``[*batch, n]``, without a graph: the anchor.
            solver: the inner solver.
            on_solve: told of every solve, by name.

        Returns:
            phi ``[*batch, n]``, a function of theta and the data. A task in which NaN or inf appeared
            is NaN throughout, so that it cannot pass unseen.
        """
        solution = self.solve(problem, start, solver)
        on_solve("minimize", solution)
        phi = where(solution.status == Status.NONFINITE.value, math.nan, solution.value)
        return self.differentiate(phi, problem, on_solve)

    def solve(self, problem: InnerProblem, start: Vectors, solver: Solver) -> Solution:
        """The inner solutions ``[*batch, n]``. Default: without a graph."""
        return solve(problem, start, solver)

    def differentiate(self, phi: Vectors, problem: InnerProblem, on_solve: OnSolve) -> Vectors:
        """The solutions phi as a function of theta and the data. Default: a constant."""
        return phi

    def outer(self, anchor: Leaves, phi: Leaves, losses: Tensor) -> Tensor:
        """The losses that ``forward`` returns, for a rule whose gradient is not that of the query loss.

        Args:
            anchor: theta by name, ``[*shape]``.
            phi: what it adapted to, by name, ``[T, *shape]``.
            losses: query losses ``[T]``.

        Returns:
            Losses ``[T]``. Default: as they are.
        """
        return losses


@dataclass(frozen=True)
class Implicit(MetaGradient):
    """Implicit MAML: the gradient of the exact minimiser, by one linear solve a task.

    ``d L/d theta = lam (H + lam I)^-1 grad L(phi)``

    Args:
        linear_solver: solves with the curvature. Default: 5 CG steps, as in the paper.
        curvature: [`Hessian`][implicit_optim.Hessian] (exact, indefinite on many networks),
            [`GaussNewton`][implicit_optim.GaussNewton] (positive definite for every lam > 0, biased), or
            [`SafeguardedHessian`][implicit_optim.SafeguardedHessian]: the second for the tasks in which
            the first is not positive definite; or a function that returns an operator, see
            [`attach`][implicit_optim.attach].

    Examples:
        >>> import implicit_optim as iopt
        >>> iopt.Implicit(iopt.CG(max_steps=5), curvature=iopt.GaussNewton).linear_solver.max_steps
        5

    Source: Rajeswaran et al. 2019, algorithm 2.
    """

    linear_solver: LinearSolver = field(default_factory=lambda: CG(max_steps=5))
    curvature: CurvatureChoice = Hessian

    def differentiate(self, phi: Tensor, problem: InnerProblem, on_solve: OnSolve) -> Tensor:
        """See [`MetaGradient.differentiate`][implicit_optim.MetaGradient.differentiate]."""
        return attach_flat(phi, problem, self.linear_solver, self.curvature, on_solve)


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

    def differentiate(self, phi: Tensor, problem: InnerProblem, on_solve: OnSolve) -> Tensor:
        """See [`MetaGradient.differentiate`][implicit_optim.MetaGradient.differentiate]."""
        anchor = problem.layout.ravel(problem.theta.anchor)
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

    def solve(self, problem: InnerProblem, start: Tensor, solver: Solver) -> Solution:
        """See [`MetaGradient.solve`][implicit_optim.MetaGradient.solve]."""
        return _unrolled(self, problem, start, solver, 0)


@dataclass(frozen=True)
class Truncated(MetaGradient):
    """Truncated back-propagation: differentiate through the last steps of the inner solver alone.

    Memory grows with ``steps``, whatever the solver takes. What is left out is the influence of the
    iterate that these steps started from: the error falls by the solver's contraction each step. With
    as many steps as the solver takes it is [`Unrolled`][implicit_optim.Unrolled].

    Args:
        steps: how many steps are differentiated through, >= 1.

    Raises:
        TypeError: when it adapts, with a solver whose steps keep no graph: ``newton_cg``,
            ``from_torch``.
        ValueError: ``steps < 1``; when it adapts, a solver with ``tol > 0``, whose last steps nobody
            knows beforehand.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> half = torch.nn.Linear(1, 1, bias=False)
        >>> meta = iopt.MetaLearner(
        ...     half,
        ...     torch.nn.functional.mse_loss,
        ...     solver=iopt.gd(lr=0.25, max_steps=8),
        ...     meta_gradient=iopt.Truncated(2),
        ... )
        >>> batch = (
        ...     torch.ones(1, 1, 1),
        ...     torch.zeros(1, 1, 1),
        ... )  # phi <- phi - (2 phi + phi - theta) / 4
        >>> phi = meta.adapt(batch)["weight"]
        >>> torch.autograd.grad(phi.sum(), half.weight)[0].item()  # 1/4 + 1/4 1/4, not 1/3
        0.3125

    Source: Shaban et al. 2019, "Truncated back-propagation for bilevel optimization", section 3;
    Rajeswaran et al. 2019, table 1.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Invalid steps: {self.steps}: it must be >= 1; none: FirstOrder()")

    def solve(self, problem: InnerProblem, start: Tensor, solver: Solver) -> Solution:
        """See [`MetaGradient.solve`][implicit_optim.MetaGradient.solve]."""
        if solver.tol > 0:
            raise ValueError(
                f"{self} counts steps from the last one, which a solver with tol > 0 does not know "
                "beforehand: set tol=0 and max_steps, or use Implicit()"
            )
        first = max(solver.max_steps - self.steps, 0)
        return _unrolled(self, problem, start, solver, first)


@dataclass(frozen=True)
class Reptile(MetaGradient):
    """Reptile: move theta towards every task's solution; the query set plays no part in the gradient.

    ``d/d theta = theta - phi`` for each task, whatever the query loss is; ``forward`` still returns
    that loss's value. With the proximal term it is ``grad Lhat(phi) / lam``, the gradient of the Moreau
    envelope of the support loss divided by lam. lam receives no gradient.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> meta = iopt.MetaLearner(
        ...     model,
        ...     torch.nn.functional.mse_loss,
        ...     solver=iopt.gd(lr=0.25, max_steps=8),
        ...     meta_gradient=iopt.Reptile(),
        ... )
        >>> batch = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        >>> meta(batch, batch).mean().backward()
        >>> phi = meta.adapt(batch)["weight"]
        >>> torch.equal(model.weight.grad, model.weight - phi[0])
        True

    Source: Nichol et al. 2018, "On first-order meta-learning algorithms", algorithm 2; Rajeswaran et
    al. 2019, appendix A; Mishchenko et al. 2023 (Moreau envelope).
    """

    def outer(self, anchor: Leaves, phi: Leaves, losses: Tensor) -> Tensor:
        """The query losses' values with the gradient of ``1/2 ||theta - phi||^2``."""
        offsets = [(p - phi[name].detach()).reshape(len(losses), -1) for name, p in anchor.items()]
        distance = torch.cat(offsets, 1).square().sum(1) / 2
        return losses.detach() + (distance - distance.detach())


def _unrolled(
    rule: MetaGradient, problem: InnerProblem, start: Tensor, solver: Solver, first: int
) -> Solution:
    """The last iterate, with the graph of the steps from the ``first`` on."""
    if not solver.differentiable:
        raise TypeError(
            f"meta_gradient={rule} needs a solver whose steps can be differentiated, gd or agd, "
            f"got {type(solver).__name__.strip('_')}: use Implicit(), which takes any solver"
        )
    anchor = problem.layout.ravel(problem.theta.anchor).expand_as(start)
    with full_precision(start.device):
        init = anchor if first == 0 else start
        return run(problem.prepared(), init, solver, graph_from=first)
