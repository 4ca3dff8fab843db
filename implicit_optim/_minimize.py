"""The one loop that runs every inner solver: counting, masks, finiteness, status."""

import contextlib
import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._evaluation import Batching, Evaluator, full_precision
from implicit_optim._outcome import Solution, Status, add_task_dim, concatenate
from implicit_optim._problem import L1, Equations, InnerObjective, InnerProblem
from implicit_optim._solver import SOLVERS, Evaluation, Solver
from implicit_optim._vectors import (
    is_free_to_read,
    largest,
    none_running,
    none_running_if_free,
    norm,
    where,
)


def minimize(
    objective: InnerObjective,
    init: Any,
    theta: Any,
    *data: Any,
    solver: Solver,
    batch_ndim: int = 0,
    seed: int | None = None,
    batching: Batching | None = None,
) -> Solution:
    r"""Minimise one objective per task, ``phi*(theta) = argmin_phi F(phi, theta, *data)``.

    No graph is kept: make the solution a function of theta afterwards, with
    [`attach`][implicit_optim.attach]. ``init`` is where the solver starts, not the anchor of a
    proximal term; the solution does not depend on it.

    Args:
        objective: ``F(phi, theta, *data) -> scalar`` of one task, a function or an
            [`Objective`][implicit_optim.Objective]; or an [`L1`][implicit_optim.L1] of one, for
            ``proximal_gradient``.
        init: start, a tensor or pytree of tensors ``[*batch, *shape]``.
        theta: tensor or pytree that all tasks share.
        *data: pytrees of tensors ``[*batch, ...]``.
        solver: ``gd``, ``agd``, ``nonlinear_cg``, ``lbfgs``, ``newton_cg``, ``trust_region``,
            ``proximal_gradient`` or ``from_torch(...)``.
        batch_ndim: how many leading dimensions of init and data count tasks.
        seed: for objectives that draw random numbers (dropout): every evaluation draws from this seed.
            Default: drawing is an error.
        batching: how the tasks of a batch are evaluated, see [`Batching`][implicit_optim.Batching].

    Returns:
        A [`Solution`][implicit_optim.Solution]: value like ``init``; ``stats`` has ``steps`` (int32),
        ``initial_grad_norm``, and ``grad_norm``, the norm of the last gradient evaluated, at the value
        itself if ``tol > 0``, else one step before it.

    Raises:
        TypeError: the solver is none, or none for such an objective, or the objective cannot be called.
        ValueError: shapes do not fit, or the objective returns no scalar.
        RuntimeError: the objective draws random numbers and there is no seed.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta, a: (a * phi**2).sum() / 2 - (theta * phi).sum()
        >>> solution = iopt.minimize(
        ...     F,
        ...     torch.zeros(3, 2),
        ...     torch.ones(2),
        ...     torch.tensor([1.0, 2.0, 4.0]),
        ...     solver=iopt.newton_cg(tol=1e-5),
        ...     batch_ndim=1,
        ... )
        >>> solution.value[:, 0].tolist(), solution.stats["steps"].tolist()
        ([1.0, 0.5, 0.25], [1, 1, 1])

    Source: Rajeswaran et al. 2019, Eq. 4 and algorithm 2, line 2.
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be {SOLVERS}, got {solver!r}")
    if isinstance(objective, Equations):
        raise TypeError(
            f"{type(objective).__name__} has no value to minimise: solve the equations with any root "
            "finder, and attach the gradient to what it finds"
        )
    problem = InnerProblem.bind(
        objective, init, theta, *data, batch_ndim=batch_ndim, seed=seed, batching=batching
    )
    value, status, stats = solve(problem, problem.layout.ravel(init), solver)
    return Solution(problem.layout.unravel(value), status, stats)


def solve(problem: InnerProblem, init: Float[Tensor, "*batch n"], solver: Solver) -> Solution:
    """[`minimize`][implicit_optim.minimize] on a bound problem and a flat ``init [*batch, n]``."""
    _check_not_learned(solver)
    problem, init = problem.detach(), init.detach()

    def part(problem: InnerProblem, tasks: slice | int) -> Solution:
        start = init[tasks].clone()  # because a task that takes no step must not return init itself

        def once(evaluator: Evaluator) -> Solution:
            return run(replace(problem, evaluator=evaluator), start, solver)

        solution = problem.evaluator.entered_once(once, batched=bool(problem.shared))
        return add_task_dim(solution, tasks)

    with torch.no_grad(), full_precision(init.device):
        return concatenate(problem.parts(part, init.shape[0]))


def run(
    problem: InnerProblem, phi: Float[Tensor, "*batch n"], solver: Solver, *, graph_from: int = 0
) -> Solution:
    """The loop itself, on flat vectors and in whatever grad mode it is called.

    A task that is done, that found no step or that met NaN keeps its iterate while the others go on.

    Args:
        problem: the inner problems.
        phi: where to start.
        solver: the rule.
        graph_from: the first step that is recorded where gradients are.

    Returns:
        The last iterates, their status, and the statistics of [`minimize`][implicit_optim.minimize].
    """
    _check_kind(problem, solver)
    graph_from = graph_from if torch.is_grad_enabled() else solver.max_steps + 1
    solution = None
    if solver.carries_nonfinite and solver.tol == 0 and is_free_to_read(phi):
        solution = _run_unmasked(problem, phi, solver, graph_from)
    return _run_masked(problem, phi, solver, graph_from) if solution is None else solution


def _run_unmasked(
    problem: InnerProblem, phi: Tensor, solver: Solver, graph_from: int
) -> Solution | None:
    """The fast path: only the last iterate is checked, since non-finite values persist.

    ``None`` if there are some: `_run_masked` then finds out in which tasks they appeared.
    """
    state, at, tasks = solver.init(problem, phi), None, _Tasks(phi)
    first = last = tasks.unknown
    for k in range(solver.max_steps):
        with _recorded(k >= graph_from):
            try:
                at = solver.known(state) or solver.evaluate(problem, phi)
            except Exception:  # an objective may refuse NaN
                if _is_finite(phi):
                    raise
                return None
            if k in (0, solver.max_steps - 1):
                last = norm(at.grad)
                first = last if k == 0 else first
            phi, state, _ = solver.step(problem, phi, at, state)
        problem = _opened(problem)
    if not _is_finite(phi):
        return None
    steps = torch.full_like(tasks.status, solver.max_steps, dtype=torch.int32)
    return tasks.solution(phi, at, steps, first, last)


def _run_masked(problem: InnerProblem, phi: Tensor, solver: Solver, graph_from: int) -> Solution:
    """Every iterate is checked before it is taken, task by task."""
    state, at, tasks = solver.init(problem, phi), None, _Tasks(phi)
    steps = torch.zeros_like(tasks.status, dtype=torch.int32)
    first = last = tasks.unknown
    looks = solver.max_steps + (solver.tol > 0)  # a tolerance looks at the last iterate too
    for k in range(looks):
        with _recorded(k >= graph_from):
            at = solver.known(state) or solver.evaluate(problem, phi)
        problem = _opened(problem)
        now = norm(at.grad)
        first = now if k == 0 else first
        last = where(tasks.running, now, last)
        if solver.tol > 0:
            tasks.stop(now <= solver.tol, Status.SUCCESS)
            may_end = k % solver.check_every == 0 and none_running(tasks.running)
            if k == solver.max_steps or may_end:
                tasks.stop(~(now < math.inf), Status.NONFINITE)
                break
        if solver.uses_value:  # a task that has stopped asks for no direction and no trial
            at = at._replace(grad=where(~tasks.running, 0.0, at.grad))
        with _recorded(k >= graph_from):
            proposal, state, found = solver.step(problem, phi, at, state)
        tasks.stop(~(torch.maximum(now, largest(proposal)) < math.inf), Status.NONFINITE)
        if found is not None:
            tasks.stop(~found, Status.NO_DESCENT)
        phi = where(tasks.running, proposal, phi)
        steps = steps + tasks.running
    if solver.tol > 0:
        tasks.stop(tasks.running, Status.MAX_STEPS)
    return tasks.solution(phi, at, steps, first, last)


class _Tasks:
    """Which tasks are running, and why the others have stopped."""

    def __init__(self, phi: Tensor) -> None:
        self.running = torch.ones(phi.shape[:-1], dtype=torch.bool, device=phi.device)
        self.status = torch.full_like(self.running, Status.SUCCESS, dtype=torch.int8)
        self.unknown = torch.full_like(self.running, math.nan, dtype=phi.dtype)

    def stop(self, who: Tensor, why: Status) -> None:
        """Stop these, if they are running."""
        if none_running_if_free(who):
            return
        self.status = torch.where(self.running & who, why.value, self.status)
        self.running = self.running & ~who

    def solution(
        self, phi: Tensor, at: Evaluation | None, steps: Tensor, first: Tensor, last: Tensor
    ) -> Solution:
        """What the loop returns: of a proximal rule the proximal point, where it is finite."""
        if at is not None and at.point is not None:
            phi = where(largest(at.point) < math.inf, at.point, phi)
        stats = {"steps": steps, "grad_norm": last, "initial_grad_norm": first}
        return Solution(phi, self.status, stats)


def _opened(problem: InnerProblem) -> InnerProblem:
    """The problem after its first evaluation: one look for foreign tensors is enough."""
    return replace(problem, closed=False) if problem.closed else problem


def _is_finite(phi: Tensor) -> bool:
    return none_running_if_free(~(largest(phi.detach()) < math.inf))


def _recorded(recorded: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients on or off; nothing where that is how they are."""
    if recorded == torch.is_grad_enabled():
        return contextlib.nullcontext()
    return torch.set_grad_enabled(recorded)


def _check_kind(problem: InnerProblem, solver: Solver) -> None:
    """Raise if the objective has an l1 norm that the rule does not know, or the other way round."""
    name, has_l1 = type(solver).__name__, isinstance(problem.objective, L1)
    if has_l1 and not solver.proximal:
        raise TypeError(
            f"{name} needs a gradient, and an L1 objective has none where a number is zero: use "
            "solver=proximal_gradient(lr=...)"
        )
    if solver.proximal and not has_l1:
        raise TypeError(
            f"{name} needs an L1(objective, strength), got {type(problem.objective).__name__}: without "
            "an l1 norm use gd(lr=...) or agd(lr=...)"
        )


def _check_not_learned(solver: Solver) -> None:
    """Raise if a setting of the solver wants a gradient that a minimiser does not have."""
    for name, value in vars(solver).items():
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} of {type(solver).__name__} requires grad, but a minimiser does not depend on "
                "how it was found, so its gradient would be zero: use meta_gradient=Unrolled() to learn "
                f"{name} through the steps, or pass a number"
            )
