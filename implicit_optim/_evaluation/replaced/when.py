"""When a replacement takes which of its forms, and what tasks folded into channels look like.

Its own entries are about tensors that require grad. torch is wrong: under vmap none seems to, so that
hooks on it are left out (told the truth, a model goes on to register its hook, which vmap refuses
aloud). And torch lacks it: nothing tells the leaves that a model makes for derivatives of its own from
those that it got from elsewhere.
"""

import contextlib
import enum
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from implicit_optim._evaluation.replaced.table import replaces
from implicit_optim._torch import in_nothing_but_vmap, is_batched, unbatched

_LOCAL = threading.local()


@contextlib.contextmanager
def _during(name: str, value: int = 1) -> Iterator[None]:
    """The name has this value in this thread."""
    before = getattr(_LOCAL, name, 0)
    setattr(_LOCAL, name, value)
    try:
        yield
    finally:
        setattr(_LOCAL, name, before)


def recording(derivatives: int) -> contextlib.AbstractContextManager[None]:
    """This thread records a graph for a solve, of which it takes 1 or 2 derivatives."""
    return _during("derivatives", derivatives)


def written_out() -> contextlib.AbstractContextManager[None]:
    """This thread needs more derivatives than torch's kernels have."""
    return _during("written_out")


def along_cotangents() -> contextlib.AbstractContextManager[None]:
    """This thread transposes a map that is linear in the cotangents: only their gradients are wanted."""
    return _during("linear")


def is_linear() -> bool:
    """Whether the gradients of a layer's input and weights are not wanted."""
    return getattr(_LOCAL, "linear", 0) == 1


@contextlib.contextmanager
def noting_leaves() -> Iterator[list[Tensor]]:
    """The leaves of autograd's graph that a model makes itself meanwhile, to differentiate inside."""
    before, _LOCAL.leaves = getattr(_LOCAL, "leaves", None), []
    try:
        yield _LOCAL.leaves
    finally:
        _LOCAL.leaves = before


_attribute: Any = Tensor.requires_grad


@replaces(_attribute.__get__)
def requires_grad(x: Tensor) -> bool:
    """``x.requires_grad`` of what ``vmap`` wraps."""
    return unbatched(x).requires_grad


@replaces(_attribute.__set__, Tensor.requires_grad_)
def note_leaf(x: Tensor, *args: Any, **settings: Any) -> Any:
    """``x.requires_grad_()`` and its like."""
    leaves = getattr(_LOCAL, "leaves", None)
    if leaves is not None:
        leaves.append(x)
    return NotImplemented


class Way(enum.Enum):
    """How a replaced operation is computed.

    Attributes:
        TORCH: by torch's own function: right to second derivatives, cheapest where one is taken.
        OURS: by a Function of ours with a cheap second derivative.
        WRITTEN_OUT: by differentiable torch operations, for any number of derivatives of any kind.
    """

    TORCH = enum.auto()
    OURS = enum.auto()
    WRITTEN_OUT = enum.auto()


def way(*tensors: Tensor) -> Way:
    """The cheapest way that is right where these tensors are."""
    if (
        torch.compiler.is_compiling()
        or not in_nothing_but_vmap()
        or getattr(_LOCAL, "written_out", 0) == 1
    ):
        return Way.WRITTEN_OUT
    derivatives = getattr(_LOCAL, "derivatives", 0)
    if derivatives == 0:
        return Way.WRITTEN_OUT if torch.is_grad_enabled() else Way.TORCH
    return Way.OURS if derivatives == 2 or any(map(is_batched, tensors)) else Way.TORCH


def fold(x: Tensor) -> Tensor:
    """Tasks into channels: ``[T, N, C, ...] -> [N, T C, ...]``."""
    return x.movedim(0, 1).flatten(1, 2)


def unfold(x: Tensor, tasks: int) -> Tensor:
    """Channels into tasks: ``[N, T C, ...] -> [N, T, C, ...]``."""
    return x.unflatten(1, (tasks, -1))
