"""Any model, meta-trained: a module that adapts to tasks and is differentiable in its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_optim._evaluation import (
    AsFunction,
    Batching,
    ByDefault,
    Evaluator,
    RunningStats,
    as_returned,
    check_statistics,
    draw_seed,
    of_tasks,
    only_tensors,
    query_losses,
    statistics_needed,
    trainable,
    undisturbed,
)
from implicit_optim._meta_gradient import Implicit, MetaGradient
from implicit_optim._meta_learner.checks import (
    Episode,
    check_kinds,
    check_reached,
    count_tasks,
    foreign_tensors_named,
)
from implicit_optim._meta_learner.loss import loss_function, with_parameters
from implicit_optim._outcome import OnSolve, Report, Solution, Warn, remembered
from implicit_optim._problem import InnerProblem, Objective, Proximal, Theta, proximal
from implicit_optim._solver import Solver
from implicit_optim._vectors import is_free_to_read


class MetaLearner(nn.Module):
    r"""A model whose parameters are meta-parameters: it adapts to T tasks at once.

    ``phi_i = argmin_phi Lhat_i(phi) + lam/2 ||phi - theta||^2``, and ``forward`` returns the query
    losses ``L_i(phi_i)``, differentiable in theta and in a learned lam. It is no trainer: any
    optimizer, scheduler, checkpoint or launcher takes it like any other module.

    The parameters that require grad when the learner is made adapt, tied ones once; the others are
    shared by all tasks as they are.

    Args:
        model: the module; ``model(x)`` gives the output of one task's ``x [N, ...]``. It is called as it
            is, with the tensors of a task in the places of its parameters for the time of the call, and
            is never changed by adapting.
        loss: ``(output, target) -> scalar``, for support and query. The parameters of an
            ``nn.Module`` do not adapt and are meta-parameters as well.
        solver: the inner solver, e.g. ``gd(lr=0.1, max_steps=16)``.
        lam: proximal strength > 0: a number, a tensor, a dict by parameter name, or a
            [`Proximal`][implicit_optim.Proximal], which can be learned.
        meta_gradient: how phi becomes a function of theta. Default: ``Implicit(CG(max_steps=5))``.
        on_solve: called as ``on_solve(name, solution)`` after every solve, name ``"minimize"`` or
            ``"linear_solve"``: a policy or a logger. Default: [`Warn`][implicit_optim.Warn] once if
            more than a tenth of the tasks failed; also [`Raise`][implicit_optim.Raise] and
            [`Ignore`][implicit_optim.Ignore].
        running_stats: what layers that track running statistics do, see
            [`RunningStats`][implicit_optim.RunningStats]. Default: in training mode they are an error.
        stochastic: whether the model draws random numbers (dropout). Every evaluation of one call,
            in the inner steps and in every product of a linear solve, then draws the same ones, from
            a seed that torch's generator gives.
        batching: how the tasks are solved, see [`Batching`][implicit_optim.Batching]. Default: all at
            once, by ``torch.func.vmap``; one by one if the model does what that refuses, which is said
            in a warning and in ``report()``.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: lam is not > 0 or does not name every trainable parameter; the model has no
            trainable parameter, or one whose shape is not known yet.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> meta = iopt.MetaLearner(
        ...     torch.nn.Linear(3, 1),
        ...     torch.nn.functional.mse_loss,
        ...     solver=iopt.gd(lr=0.1, max_steps=16),
        ...     lam=2.0,
        ... )
        >>> support = query = (torch.ones(4, 5, 3), torch.ones(4, 5, 1))
        >>> meta(support, query).shape
        torch.Size([4])

    Source: Rajeswaran et al. 2019, Eq. 4 and algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        *,
        solver: Solver,
        lam: float | Tensor | Mapping[str, Any] | Proximal = 1.0,
        meta_gradient: MetaGradient | None = None,
        on_solve: OnSolve | None = None,
        running_stats: RunningStats | None = None,
        stochastic: bool = False,
        batching: Batching | None = None,
    ) -> None:
        super().__init__()
        meta_gradient = Implicit() if meta_gradient is None else meta_gradient
        check_kinds(model=model, solver=solver, meta_gradient=meta_gradient)
        check_kinds(running_stats=running_stats, batching=batching)
        self.model = model
        self.loss = loss
        self.solver = solver
        self.meta_gradient = meta_gradient
        self.on_solve = Warn() if on_solve is None else on_solve
        self.running_stats = running_stats
        self.stochastic = stochastic
        self.batching = batching
        self._solves: dict[str, Solution] = {}
        self._by_default = ByDefault()
        self._adapting = tuple(trainable(model))
        anchor = self.anchor()
        if not anchor:
            raise ValueError(
                "model has no trainable parameter: nothing can adapt; set requires_grad=True on some"
            )
        first = next(iter(anchor.values()))
        self.proximal = lam if isinstance(lam, Proximal) else Proximal(lam, dtype=first.dtype)
        self.proximal.to(device=first.device, dtype=first.dtype)
        self.proximal.check(anchor)

    def anchor(self) -> dict[str, Tensor]:
        """The meta-parameters that adapt, by name: theta."""
        with undisturbed(self.model):
            named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] for name in self._adapting}

    def forward(self, support: Episode, query: Episode) -> Float[Tensor, " T"]:
        """Query loss of each task after adaptation.

        Args:
            support: ``(x [T, N, ...], y [T, N, ...])``, or more inputs before the target.
            query: ``(x [T, M, ...], y [T, M, ...])``, other examples of the same tasks.

        Returns:
            The losses ``[T]``; ``losses.mean().backward()`` leaves the meta-gradient. A task in
            which NaN or inf appeared has loss NaN.

        Raises:
            ValueError: shapes do not fit, or the model would change its running statistics.
        """
        tasks, asked = count_tasks("support", support), count_tasks("query", query)
        if tasks != asked:
            raise ValueError(
                f"support has {tasks} tasks but query has {asked}: they belong together"
            )
        evaluator, model = self._evaluator(support), AsFunction(self.model)
        with foreign_tensors_named(self):
            phi = self._adapt(model, support, evaluator)
            loss = self._objective(model.under(self._by_batch(adapting=False))).fit
            data = with_parameters(self.loss, query, tasks)
            losses = query_losses(loss, phi, data, evaluator.other_draw())
        return self.meta_gradient.outer(self.anchor(), phi, losses)

    if TYPE_CHECKING:  # torch types the call of any module as Any

        def __call__(self, support: Episode, query: Episode) -> Tensor: ...  # noqa: D102

    def adapt(self, support: Episode) -> dict[str, Tensor]:
        """Adapted parameters by name, ``[T, *shape]``; no graph is kept under ``torch.no_grad()``.

        Args:
            support: ``(x [T, N, ...], y [T, N, ...])``.

        Returns:
            phi ``[T, *shape]`` by name: one set of parameters a task; with ``RunningStats.PER_TASK``
            also the statistics.
        """
        with foreign_tensors_named(self):
            return self._adapt(AsFunction(self.model), support, self._evaluator(support))

    def _adapt(
        self, model: AsFunction, support: Episode, evaluator: Evaluator
    ) -> dict[str, Tensor]:
        tasks, anchor = count_tasks("support", support), self.anchor()
        check_statistics(self.model, self.running_stats)
        model = model.under(self._by_batch(adapting=True))
        like = {name: p.detach().expand(tasks, *p.shape) for name, p in anchor.items()}
        theta, data = Theta(anchor, self.proximal()), with_parameters(self.loss, support, tasks)
        problem = InnerProblem.bind(self._objective(model), like, theta, *data, batch_ndim=1)
        problem = replace(problem, evaluator=evaluator, closed=True)
        start = problem.layout.ravel(anchor).detach().expand(tasks, -1)
        flat = self.meta_gradient.adapt(problem, start, self.solver, self._record)
        phi = problem.layout.unravel(flat)
        if self.running_stats is RunningStats.PER_TASK:
            phi = phi | of_tasks(model.statistics, phi, tuple(support[:-1]), evaluator)
        return phi

    def predict(self, phi: dict[str, Tensor], *inputs: Any) -> Any:
        """The model's outputs under adapted parameters.

        Args:
            phi: from [`adapt`][implicit_optim.MetaLearner.adapt], ``[T, *shape]``.
            *inputs: the model's inputs, ``[T, N, ...]``.

        Returns:
            Outputs ``[T, N, ...]``: tensors, or a structure of them as the model returns it.

        Raises:
            TypeError: the structure is of a class that torch does not know as a tree.
            ValueError: phi lacks parameters that adapt, or has others.
        """
        needed = set(self._adapting)
        if self.running_stats is RunningStats.PER_TASK and isinstance(phi, dict):
            needed |= statistics_needed(self.model, phi)
        if not isinstance(phi, dict) or not needed <= phi.keys():
            got = sorted(phi) if isinstance(phi, dict) else type(phi).__name__
            raise ValueError(f"phi must hold {sorted(needed)}, as adapt() returns them, got {got}")
        count_tasks("phi and inputs", (phi, *inputs))
        model = AsFunction(self.model, self._by_batch(adapting=False))

        def one(phi: Any, *inputs: Any) -> Any:
            return only_tensors(model(phi, *inputs))

        return as_returned(of_tasks(one, phi, inputs, self._evaluator(inputs)))

    def report(self) -> Report:
        """What happened in the last solves: how many tasks failed and why, how exact the others are.

        Reading it synchronises with the device.
        """
        return Report(dict(self._solves), tuple(self._by_default.refusals))

    @property
    def objective(self) -> Objective:
        """One task's inner problem, a function of ``(phi, (anchor, lam), *inputs, target)``."""
        return self._objective(AsFunction(self.model, self._by_batch(adapting=True)))

    def _objective(self, model: AsFunction) -> Objective:
        return Objective(model, loss_function(self.loss), proximal)

    def _by_batch(self, *, adapting: bool) -> bool | None:
        """Whether the norms with running statistics take those of the batch."""
        if self.running_stats is None:
            return None
        return self.running_stats is not RunningStats.FROZEN and (
            adapting or self.running_stats is RunningStats.BATCH
        )

    def _evaluator(self, data: tuple[Any, ...]) -> Evaluator:
        """How one call evaluates tasks like these."""
        device = attrgetter(self._adapting[0])(self.model).device
        seed = draw_seed() if self.stochastic else None
        batching = (self.batching or self._by_default).suited_to(data)
        return Evaluator.now(device, seed, batching)

    def _record(self, name: str, solution: Solution) -> None:
        if torch.compiler.is_compiling():  # a graph has no side effects
            return
        last = remembered(solution)
        if last is not None:
            first_time = name not in self._solves
            self._solves[name] = last
            if name == "minimize" and (first_time or is_free_to_read(last.status)):
                check_reached(last, self.anchor)
        self.on_solve(name, solution)
