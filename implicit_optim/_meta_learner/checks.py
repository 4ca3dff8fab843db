"""Checks of what a learner is given: types, shapes of episodes, a loss that uses the model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from implicit_optim._evaluation import Batching, Foreign, RunningStats
from implicit_optim._meta_gradient import MetaGradient
from implicit_optim._outcome import Solution
from implicit_optim._solver import SOLVERS, Solver
from implicit_optim._torch import places, pytree

Episode = tuple[Any, ...]


def count_tasks(name: str, episode: Episode) -> int:
    """The number of tasks T with which every tensor of an episode leads, or a ``ValueError``."""
    if not isinstance(episode, (tuple, list)) or len(episode) < 2:
        raise ValueError(f"{name} must be a tuple (x [T, N, ...], y [T, N, ...])")
    tensors = [t for t in pytree.tree_leaves(episode) if isinstance(t, Tensor)]
    if any(t.is_sparse or t.is_sparse_csr for t in tensors):
        raise ValueError(
            f"{name} holds a sparse tensor, which cannot be cut into tasks: pass its indices and values "
            "as dense tensors and build it in forward (a graph network takes edge_index and "
            "edge_weight), or make it a buffer of the model if all tasks share it"
        )
    shapes = [tuple(t.shape) for t in tensors]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1 or shapes[0][0] == 0:
        raise ValueError(
            f"{name} must hold tensors that lead with the same number of tasks T >= 1, got the shapes "
            f"{shapes}; for a single task add a dimension: x.unsqueeze(0)"
        )
    return shapes[0][0]


_KINDS: dict[str, tuple[Any, str]] = {
    "model": (nn.Module, "an nn.Module"),
    "solver": (Solver, SOLVERS),
    "meta_gradient": (
        MetaGradient,
        "Implicit(...), Unrolled(), Truncated(k), FirstOrder() or Reptile()",
    ),
    "running_stats": (RunningStats | None, "RunningStats.BATCH, FROZEN, PER_TASK or None"),
    "batching": (Batching | None, "Batching(...) or None"),
}


def check_kinds(**given: Any) -> None:
    """Raise ``TypeError`` if one of a learner's arguments has the wrong type."""
    for name, value in given.items():
        kind, what = _KINDS[name]
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {what}, got {type(value).__name__}")


def check_reached(solution: Solution, anchor: Callable[[], dict[str, Tensor]]) -> None:
    """Raise ``ValueError`` if the first gradient of the support loss was exactly zero everywhere."""
    if bool(solution.stats["initial_grad_norm"].any()):
        return
    adapting = anchor()
    if any(p.numel() for p in adapting.values()):
        raise ValueError(
            "the support loss does not reach the parameters that adapt: its first gradient is exactly "
            f"zero in every task (parameters {list(adapting)}). See that forward uses them, detaches "
            "nothing and runs without torch.no_grad(); if theta solves every task exactly, there is "
            "nothing to adapt to"
        )


@contextlib.contextmanager
def foreign_tensors_named(learner: nn.Module) -> Iterator[None]:
    """Name the attribute that holds a `Foreign` tensor in the error message."""
    try:
        yield
    except Foreign as error:
        found = (
            f"{path}.{key}, of shape {tuple(error.tensor.shape)},"
            for path, module in learner.named_modules()
            for place in (places(module)[0], vars(module))
            for key, value in place.items()
            for held in (value if isinstance(value, (list, tuple)) else [value])
            if held is error.tensor
        )
        raise Foreign(error.tensor, next(found, None)) from None
