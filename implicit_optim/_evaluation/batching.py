"""Batches of tasks: in which chunks and threads they are gone through."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_optim._checks import Settings
from implicit_optim._torch import in_transform, pytree

# Numbers in the inputs of a task (13 images of 28 x 28) from which on a CPU computes convolutions faster
# task by task than of all tasks in one call.
LARGE_TASK = 10_000


@dataclass(frozen=True)
class Batching(Settings):
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

    _must: ClassVar = {"chunk_size": "be >= 1", "threads": "be >= 1"}

    chunk_size: int | None = None
    threads: int = 1

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
        if workers < 2 or torch.is_grad_enabled() or in_transform():
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


def pick(tree: Any, where: int | slice | tuple[int, ...]) -> Any:
    """Index every tensor of a tree."""
    return pytree.tree_map_only(Tensor, lambda t: t[where], tree)
