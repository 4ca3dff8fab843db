"""What every inner solver is: a rule that says where the next iterate lies."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from implicit_optim._checks import Settings, check
from implicit_optim._operator import GaussNewton, Hessian, Linearized
from implicit_optim._problem import InnerProblem
from implicit_optim._search import Line, Search

# What an error message lists.
SOLVERS = "gd(...), agd(...), nonlinear_cg(...), lbfgs(...), newton_cg(...), trust_region(...), "
SOLVERS += "proximal_gradient(...) or from_torch(...)"


class Evaluation(NamedTuple):
    """What a rule sees at an iterate.

    Attributes:
        value: objective per task ``[*batch]``; ``None`` for a rule that does not ask for it.
        grad: gradient per task ``[*batch, n]``; of a proximal rule the gradient mapping.
        operator: the curvature, linearised there, for rules that use one.
        point: of a proximal rule the proximal point ``[*batch, n]``, whose zeros are exact. The loop
            returns that of the last evaluation.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> phi = torch.tensor([3.0])
        >>> problem = iopt.InnerProblem.bind(lambda phi, theta: phi @ phi, phi, ())
        >>> at = iopt.newton_cg().evaluate(problem, phi)
        >>> at.value.item(), at.grad.tolist()
        (9.0, [6.0])
    """

    value: Float[Tensor, "*batch"] | None
    grad: Float[Tensor, "*batch n"]
    operator: Linearized | None = None
    point: Float[Tensor, "*batch n"] | None = None


State = tuple[Any, ...]
Step = tuple[Float[Tensor, "*batch n"], State, Bool[Tensor, "*batch"] | None]


@dataclass(frozen=True)
class Solver(Settings, abc.ABC):
    """An inner solver's settings and its update rule; the loop is in ``minimize``.

    Attributes:
        max_steps: most steps, >= 0. With ``tol = 0`` exactly these are taken.
        tol: a task stops when ``||grad F|| <= tol`` at its iterate; the paper's delta, because a
            mu-strongly convex F has ``||phi - phi*|| <= ||grad F|| / mu``.
        check_every: with ``tol > 0``, how many steps lie between two looks whether all tasks are done;
            each look is one host synchronisation. It changes when the loop ends, not what comes out.
        differentiable: whether ``Unrolled`` can differentiate through the steps.
        uses_value: whether the rule looks at the objective's value, beside the gradient.
        carries_nonfinite: whether an iterate or a gradient that is not finite leaves all later iterates
            so: the loop then needs to look at the last one only.
        proximal: whether the rule is one for [`L1`][implicit_optim.L1] objectives, and for no other.

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

    _must: ClassVar = {
        "max_steps": "be >= 0",
        "tol": "be finite and >= 0",
        "check_every": "be >= 1",
    }

    max_steps: int
    tol: float
    check_every: int = field(default=1, kw_only=True)

    def evaluate(self, problem: InnerProblem, phi: Tensor) -> Evaluation:
        """Value and gradient at phi, and whatever else the rule wants from the same pass."""
        if not self.uses_value:
            return Evaluation(None, problem.grad(phi))
        grad, value = problem.grad_and_value(phi)
        return Evaluation(value, grad)

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """The rule's state: a tuple of tensors ``[*batch, ...]``, or of objects that it owns."""
        return ()

    def known(self, state: State) -> Evaluation | None:
        """The evaluation at the last proposal, where the step has made it; it saves ``evaluate``."""
        return None

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


def move(
    problem: InnerProblem,
    phi: Float[Tensor, "*batch n"],
    at: Evaluation,
    direction: Float[Tensor, "*batch n"],
    slope: Float[Tensor, "*batch"],
    line_search: Search,
) -> tuple[Tensor, Tensor, Tensor, Evaluation | None]:
    """``phi + t d`` with t from the line search.

    Returns:
        The next iterate ``[*batch, n]``, t and whether it was found ``[*batch]``, and the evaluation at
        the next iterate where the search has made it.
    """
    assert at.value is not None
    line = Line.of(problem, phi, direction)
    t, found = line_search.search(line, at.value, slope)
    known = line.known(t)
    evaluation = None if known is None else Evaluation(*known)
    return phi + t.unsqueeze(-1) * direction, t, found, evaluation


def check_search(line_search: Search) -> None:
    """Raise if this is no line search."""
    if not isinstance(line_search, Search):
        raise TypeError(f"line_search must be StrongWolfe(...) or Armijo(...), got {line_search!r}")


class Searching(Solver):
    """A rule along whose directions a search looks; its state ends in what the search found out."""

    differentiable: ClassVar[bool] = False

    line_search: Search

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.line_search)

    def known(self, state: State) -> Evaluation | None:
        """The evaluation of the search's last trial."""
        return state[-1]


class SecondOrder(Solver):
    """A rule that looks at the curvature."""

    differentiable: ClassVar[bool] = False

    curvature: type[Hessian] | type[GaussNewton]

    def evaluate(self, problem: InnerProblem, phi: Tensor) -> Evaluation:
        """Linearise the curvature; value and gradient come from the same pass."""
        at = self.curvature(problem, phi).linearize()
        assert at.value is not None and at.gradient is not None
        return Evaluation(at.value, at.gradient, at)


def check_lr(lr: float | Tensor) -> None:
    """Raise if a learning rate is not a finite number > 0."""
    if isinstance(lr, Tensor) and lr.ndim > 0:
        raise ValueError(f"Invalid lr: it must be a number or a 0-d tensor, got {tuple(lr.shape)}")
    check("lr", lr, "be finite and > 0")
