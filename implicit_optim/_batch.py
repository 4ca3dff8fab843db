"""Batches of tasks: how a function of one task is evaluated for all, masks and early exits."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Numbers in the inputs of a task (13 images of 28 x 28) from which on a CPU computes convolutions faster
# task by task than of all tasks in one call.
LARGE_TASK = 10_000


@dataclass(frozen=True)
class Batching:
    """How the tasks of a batch are evaluated and solved.

    Tasks are independent: every way computes the same, up to the rounding of differently shaped
    matrix products.

    Args:
        chunk_size: tasks solved together, by ``torch.func.vmap``; the memory of a solve, and of a
            learner's query losses with their gradient, is that of a chunk. 1 does without ``vmap``, for
            operations that it does not know, such as ``nn.LSTM``. Default: all of them, or an equal
            share for each thread; a `MetaLearner` with threads takes tasks of 10,000 numbers and more
            one by one, smaller ones all at once.
        threads: chunks that are solved at the same time, each in a thread of its own with one
            intra-op thread. The objective must be safe to call from several;
            [`MetaLearner`][implicit_optim.MetaLearner] copies the structure of its model for each.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.Batching(chunk_size=2).chunks(5)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
        >>> iopt.Batching(threads=2).chunks(5)
        [slice(0, 3, None), slice(3, 5, None)]
    """

    chunk_size: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"Invalid chunk_size: {self.chunk_size}: it must be >= 1")
        if self.threads < 1:
            raise ValueError(f"Invalid threads: {self.threads}: it must be >= 1")

    @property
    def loops(self) -> bool:
        """Whether it does without ``vmap``."""
        return self.chunk_size == 1

    def suited_to(self, data: Any) -> Batching:
        """How a learner with threads takes tasks like these ``[T, ...]``: large ones one by one."""
        if self.threads == 1 or self.chunk_size is not None:
            return self
        first = next((t for t in pytree.tree_leaves(data) if isinstance(t, Tensor)), None)
        large = first is not None and first.ndim > 0 and first[:1].numel() >= LARGE_TASK
        return replace(self, chunk_size=1) if large else WHOLE

    @property
    def within(self) -> Batching:
        """How the tasks of a chunk are evaluated."""
        return self if self.loops else WHOLE

    def chunks(self, tasks: int) -> list[slice]:
        """The chunks of ``tasks`` tasks, in order."""
        size = self.chunk_size or -(-tasks // self.threads)
        return [slice(i, min(i + size, tasks)) for i in range(0, tasks, size)]

    def run(self, solve: Callable[[slice], Any], tasks: int) -> list[Any]:
        """Call ``solve`` on every chunk, in threads where nobody differentiates or batches.

        What autograd records and the transforms of ``torch.func`` belong to the thread they are in.
        """
        chunks = self.chunks(tasks)
        if torch.compiler.is_compiling():
            return [solve(chunk) for chunk in chunks]
        workers = min(self.threads, len(chunks))
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if workers < 2 or torch.is_grad_enabled() or transformed:
            return [solve(chunk) for chunk in chunks]
        threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

        def alone(chunk: slice) -> Any:
            torch.set_num_threads(1)
            _THREAD.works = True
            with torch.inference_mode(inference), torch.no_grad():  # both belong to a thread
                return solve(chunk)

        try:
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(alone, chunks))
        finally:
            torch.set_num_threads(threads)  # for threads that start later


WHOLE, LOOP = Batching(), Batching(chunk_size=1)
_THREAD = threading.local()


def in_worker() -> bool:
    """Whether this thread is one of those of a `Batching`."""
    return getattr(_THREAD, "works", False)


@dataclass(frozen=True)
class ByDefault(Batching):
    """All tasks at once; from the first operation on that ``vmap`` refuses, one by one.

    Attributes:
        refusals: what ``vmap`` said.
    """

    refusals: list[str] = field(default_factory=list, compare=False)

    @property
    def loops(self) -> bool:
        """Whether ``vmap`` has refused."""
        return bool(self.refusals)

    @property
    def within(self) -> Batching:
        """The same."""
        return self

    def chunks(self, tasks: int) -> list[slice]:
        """All tasks, or each of them."""
        return (LOOP if self.loops else WHOLE).chunks(tasks)

    def refused(self, error: Exception) -> None:
        """Go through the tasks one by one from now on, and say so."""
        first, *_ = str(error).splitlines() or [""]
        self.refusals.append(f"{type(error).__name__}: {first}")
        warnings.warn(
            "torch.func.vmap cannot batch the tasks, which are gone through one by one from now on: "
            f"exact, but slower; Batching(chunk_size=1) asks for it ({self.refusals[0]})",
            stacklevel=2,
        )


def over_tasks(
    one: Callable[..., Any],
    first: Any,
    theta: Any,
    data: tuple[Any, ...],
    shared: tuple[bool, ...],
    batching: Batching = WHOLE,
    *,
    call: Callable[[Callable[[], Any], int, bool], Any] = lambda evaluate, start, watched: (
        evaluate()
    ),
    random: bool = False,
) -> Any:
    """Evaluate ``one(first, theta, *data)`` for every task.

    Args:
        one: function of one task.
        first: pytree of tensors ``[*batch, ...]``.
        theta: pytree; a batch dimension is mapped where it is not shared.
        data: pytrees of tensors ``[*batch, ...]``.
        shared: one flag a batch dimension, outermost first: whether theta lacks it.
        batching: the chunks in which the outermost dimension is gone through.
        call: calls ``evaluate``, the function of a chunk, given the chunk's first task and whether
            somebody must watch that no random number is drawn, which ``vmap`` does by itself.
        random: whether ``one`` may draw random numbers.

    Returns:
        A pytree of tensors ``[*batch, ...]``.
    """
    if not shared:
        return call(lambda: one(first, theta, *data), 0, True)
    tasks = _size(first)
    loops = batching.loops or tasks == 1
    places: list[Any] = list(range(tasks)) if loops else batching.chunks(tasks)
    if loops or len(places) > 1:
        results = []
        owns = [theta] * len(places) if shared[0] else _parts(theta, places)
        each = zip(places, _parts(first, places), owns, _parts(data, places), strict=True)
        for place, *own in each:
            start = place if loops else place.start
            within = lambda evaluate, _, watched, at=start: call(evaluate, at, watched)  # noqa: E731
            inner = LOOP if loops else WHOLE
            args = (*own, shared[loops:], inner)
            results.append(over_tasks(one, *args, call=within, random=random))
        join: Callable[..., Tensor] = torch.stack if loops else torch.cat
        return pytree.tree_map(lambda *each: join(each), *results)
    batched = one
    for is_shared in reversed(shared):
        dims = (_dims(first), None if is_shared else _dims(theta), *_dims(data))
        batched = torch.func.vmap(
            batched, in_dims=dims, randomness="different" if random else "error"
        )
    try:
        return call(lambda: batched(first, theta, *data), 0, False)
    except Exception as error:
        drew = "randomness error mode" in str(error)  # which a loop would have to watch for
        if drew or not isinstance(batching, ByDefault) or torch.compiler.is_compiling():
            raise
        refusal = error
    result = over_tasks(one, first, theta, data, shared, LOOP, call=call, random=random)
    batching.refused(refusal)
    return result


def _parts(tree: Any, places: list[Any]) -> list[Any]:
    """The tree at every place, by one differentiable operation a tensor."""
    leaves, spec = pytree.tree_flatten(tree)

    def split(leaf: Any) -> Sequence[Any]:
        if not isinstance(leaf, Tensor):
            return [leaf] * len(places)
        if isinstance(places[0], int):
            return leaf.unbind()
        return leaf.split([place.stop - place.start for place in places])

    columns = [split(leaf) for leaf in leaves]
    return [pytree.tree_unflatten([c[i] for c in columns], spec) for i in range(len(places))]


def pick(tree: Any, where: int | slice | tuple[int, ...]) -> Any:
    """Index every tensor of a tree."""
    return pytree.tree_map(lambda leaf: leaf[where] if isinstance(leaf, Tensor) else leaf, tree)


def _dims(tree: Any) -> Any:
    if tree is None or isinstance(tree, Tensor):  # the usual case, without a walk
        return None if tree is None else 0
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tree)


def _size(tree: Any) -> int:
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
