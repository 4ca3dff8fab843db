"""Any ``torch.optim`` class as an inner solver."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from implicit_optim._problem import InnerProblem
from implicit_optim._solver.base import Evaluation, Solver, State, Step
from implicit_optim._torch import is_batched, pytree

_NAMES = "SGD Adam AdamW NAdam RAdam Adamax RMSprop Adagrad Adadelta Rprop ASGD"
_ELEMENTWISE = tuple(getattr(torch.optim, name) for name in _NAMES.split())


@dataclass(frozen=True)
class _FromTorch(Solver):
    """A torch.optim class and its settings; see [`from_torch`][implicit_optim.from_torch]."""

    differentiable = False

    optimizer: Callable[..., torch.optim.Optimizer]
    settings: Mapping[str, Any]
    elementwise: bool

    def init(self, problem: InnerProblem, phi: Tensor) -> State:
        """One optimizer over ``[*batch, n]`` if its rule is elementwise, else one per task."""
        tensors = [phi, *pytree.tree_leaves(problem.tensors())]
        if any(isinstance(t, Tensor) and is_batched(t) for t in tensors):
            raise ValueError(
                "from_torch cannot run under vmap, because torch.optim classes change tensors in place: "
                "give the batch to minimize as batch_ndim=1, or use gd, agd, lbfgs or newton_cg"
            )
        if self.elementwise:
            parameter = nn.Parameter(phi.clone())
            return self.optimizer([parameter], **self.settings), parameter
        if problem.evaluator.seed is not None and phi.ndim > 1:
            raise ValueError(
                "from_torch with an optimizer per task evaluates each task alone, and so draws other "
                "random numbers than the whole batch: use batching=Batching(chunk_size=1)"
            )
        tasks = []
        for index in itertools.product(*(range(size) for size in phi.shape[:-1])):
            leaves = pytree.tree_leaves(problem.layout.unravel(phi[index]))
            parameters = [nn.Parameter(leaf.clone()) for leaf in leaves]
            closure = _closure(problem.select(index), parameters)
            tasks.append((self.optimizer(parameters, **self.settings), parameters, closure))
        return tasks

    def step(self, problem: InnerProblem, phi: Tensor, at: Evaluation, state: State) -> Step:
        """One ``optimizer.step`` per optimizer, with a closure if there is one for each task."""
        if self.elementwise:
            optimizer, parameter = state
            parameter.copy_(phi)
            parameter.grad = at.grad
            optimizer.step()
            return parameter.detach().clone(), state, None
        flat = []
        for optimizer, parameters, closure in state:
            closure()
            optimizer.step(closure)
            flat.append(torch.cat([p.detach().reshape(-1) for p in parameters]))
        return torch.stack(flat).reshape(phi.shape), state, None


def _closure(problem: InnerProblem, parameters: list[nn.Parameter]) -> Callable[[], Tensor]:
    """One task's loss, which leaves gradients in ``parameters``, as ``optimizer.step`` expects."""

    @torch.no_grad()
    def closure() -> Tensor:
        grad, value = problem.grad_and_value(torch.cat([p.reshape(-1) for p in parameters]))
        leaves = pytree.tree_leaves(problem.layout.unravel(grad))
        for parameter, leaf in zip(parameters, leaves, strict=True):
            parameter.grad = leaf
        return value

    return closure


def from_torch(
    optimizer: Callable[..., torch.optim.Optimizer],
    *,
    max_steps: int,
    tol: float = 0.0,
    elementwise: bool | None = None,
    check_every: int = 1,
    **settings: Any,
) -> Solver:
    """Use any ``torch.optim`` class as the inner solver.

    The implicit gradient depends on the solution alone, not on the path to it, so the optimizer need
    not be differentiable. One ``optimizer.step`` is one step, with a closure for each task's optimizer.

    Args:
        optimizer: the class, e.g. ``torch.optim.Adam``.
        max_steps: most calls of ``optimizer.step``.
        tol: stop a task at ``||grad F|| <= tol``; 0 takes exactly ``max_steps`` steps.
        elementwise: whether the rule treats each number independently. Then one optimizer serves the
            whole batch; otherwise (LBFGS, Muon, ...) each task gets its own, with parameters in the
            shapes of phi's leaves. Default: True for torch's elementwise classes.
        check_every: with ``tol > 0``, steps between two checks whether all tasks are done (one host
            synchronisation each).
        **settings: the optimizer's own arguments; it rejects unknown ones.

    Returns:
        A solver for [`minimize`][implicit_optim.minimize].

    Raises:
        ValueError: a setting is out of range; when it runs, it is under ``vmap``, or each task has its
            own optimizer and the objective draws random numbers for a batch.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: ((phi - theta) ** 4).sum()
        >>> solver = iopt.from_torch(torch.optim.LBFGS, max_steps=30, tol=1e-6)
        >>> solution = iopt.minimize(F, torch.zeros(1), torch.ones(1), solver=solver)
        >>> bool((solution.value - 1).abs() < 0.02), solution.status.item()
        (True, 0)

    Source: path independence, Rajeswaran et al. 2019, Lemma 1.
    """
    if elementwise is None:
        elementwise = optimizer in _ELEMENTWISE
    return _FromTorch(max_steps, tol, optimizer, settings, elementwise, check_every=check_every)
