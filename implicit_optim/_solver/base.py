"""The interface of an inner solver, a rule for the next iterate, and what several rules share."""

import abc
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool
from torch import Tensor

from implicit_optim._checks import Settings
from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._problem import InnerProblem
from implicit_optim._search import Line, Minimised, Scalars, Search, Vectors

# What an error message lists.
SOLVERS = "gd(...), agd(...), nonlinear_cg(...), lbfgs(...), newton_cg(...), trust_region(...), "
SOLVERS += "proximal_gradient(...) or from_torch(...)"


class Evaluation(NamedTuple):
    """The objective at an iterate, as far as a rule needs it.

    Attributes:
        value: objective per task ``[*batch]``; ``None`` if the rule does not use it.
        grad: gradient per task ``[*batch, n]``; for a proximal rule the gradient mapping.
        operator: the curvature, linearised there, if the rule uses one.
        point: for a proximal rule the proximal point ``[*batch, n]``, whose zeros are exact. The loop
            returns that of the last evaluation.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> phi = torch.tensor([3.0])
        >>> problem = iopt.InnerProblem.bind(lambda phi, theta: phi @ phi, phi, ())
        >>> at = iopt.newton_cg().evaluate(problem, phi)
        >>> at.value.item(), at.grad.tolist()
        (9.0, [6.0])
    """

    value: Scalars | None
    grad: Vectors
    operator: Linearized | None = None
    point: Vectors | None = None


State = Any  # each rule has its own
Step = tuple[Vectors, State, Bool[Tensor, "*batch"] | None]


@dataclass(frozen=True)
class Solver(Settings, abc.ABC):
    """An inner solver: its settings and its update rule. ``minimize`` has the loop.

    Attributes:
        max_steps: most steps, >= 0. With ``tol = 0`` it takes exactly that many.
        tol: a task stops when ``||grad F|| <= tol`` at its iterate; the paper's delta, because a
            mu-strongly convex F has ``||phi - phi*|| <= ||grad F|| / mu``.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done. A check is
            one host synchronisation; it decides when the loop ends, not what it returns.
        differentiable: whether ``Unrolled`` can differentiate through the steps.
        uses_value: whether the rule uses the objective's value besides the gradient.
        carries_nonfinite: whether a non-finite iterate or gradient makes all later iterates non-finite,
            so that the loop needs to check the last one only.
        proximal: whether the rule is for [`L1`][implicit_optim.L1] objectives, and for no others.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class SignDescent(iopt.Solver):
        ...     def step(self, problem, phi, at, state):
        ...         return phi - 0.25 * at.grad.sign(), state, None
        >>> solver = SignDescent(max_steps=2, tol=0.0)
        >>> iopt.minimize(
        ...     lambda phi, theta: phi @ phi, torch.ones(1), (), solver=solver
        ... ).value.item()
        0.5
    """

    differentiable: ClassVar[bool] = True
    uses_value: ClassVar[bool] = True
    carries_nonfinite: ClassVar[bool] = False
    proximal: ClassVar[bool] = False

    _must: ClassVar = dict(max_steps="be >= 0", tol="be finite and >= 0", check_every="be >= 1")

    max_steps: int
    tol: float
    check_every: int = field(default=1, kw_only=True)

    def evaluate(self, problem: InnerProblem, phi: Tensor) -> Evaluation:
        """Value and gradient at phi, and whatever else the rule needs from the same pass."""
        if not self.uses_value:
            return Evaluation(None, problem.grad(phi))
        grad, value = problem.grad_and_value(phi)
        return Evaluation(value, grad)

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """The rule's state before the first step: tensors ``[*batch, ...]``, or objects that it owns."""
        return ()

    def known(self, state: State) -> Evaluation | None:
        """The evaluation at the last proposal, if the step has made it already: saves ``evaluate``.

        By default the attribute ``evaluation`` of the state, if it has one.
        """
        return getattr(state, "evaluation", None)

    @abc.abstractmethod
    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One step for every task.

        Args:
            problem: the inner problem.
            phi: iterate ``[*batch, n]``.
            at: its evaluation.
            state: the rule's state.

        Returns:
            The next iterate ``[*batch, n]``, the next state, and whether each task found a step,
            bool ``[*batch]`` (``None``: all did).
        """


class Move(NamedTuple):
    """A step along a direction.

    Attributes:
        end: the next iterate, ``[*batch, n]``.
        length: the step length t ``[*batch]``; 0 where none was found.
        found: whether one was found, ``[*batch]``.
        evaluation: at ``end``, if the search has made it already.
    """

    end: Vectors
    length: Scalars
    found: Bool[Tensor, "*batch"]
    evaluation: Evaluation | None


def move(
    problem: Minimised, phi: Vectors, at: Evaluation, d: Vectors, slope: Scalars, search: Search
) -> Move:
    """To ``phi + t d``, with t from the search.

    Args:
        problem: what is minimised.
        phi: iterate ``[*batch, n]``.
        at: its evaluation, with the value.
        d: direction, ``[*batch, n]``.
        slope: ``grad F . d``, ``[*batch]``.
        search: chooses t.
    """
    assert at.value is not None
    line = Line.of(problem, phi, d)
    t, found = search.search(line, at.value, slope)
    known = line.known(t)
    evaluation = None if known is None else Evaluation(*known)
    return Move(phi + t.unsqueeze(-1) * d, t, found, evaluation)


@dataclass(frozen=True, kw_only=True)
class Descent(Solver):
    """What the rules written here have in common: by default they take 100 steps, all of them."""

    max_steps: int = 100
    tol: float = 0.0


class Searching(Descent):
    """A rule that searches along its directions."""

    differentiable = False

    line_search: Search

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.line_search, Search):
            raise TypeError(
                f"line_search must be StrongWolfe(...) or Armijo(...), got {self.line_search!r}"
            )


@dataclass(frozen=True, kw_only=True)
class NewtonMethod(Descent):
    """A rule that uses the curvature."""

    differentiable = False

    curvature: type[Hessian] | type[GaussNewton] = Hessian

    def evaluate(self, problem: InnerProblem, phi: Tensor) -> Evaluation:
        """Linearise the curvature; value and gradient come from the same pass."""
        at = self.curvature(problem, phi).linearize()
        assert at.value is not None and at.gradient is not None
        return Evaluation(at.value, at.gradient, at)
