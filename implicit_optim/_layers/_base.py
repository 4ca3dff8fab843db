"""When and how a layer of a model is stood in for by one with a cheaper second derivative."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import Tensor, nn

from implicit_optim._batch import is_batched

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
    """This thread records a graph for a solve, of which 1 or 2 derivatives are taken and no third."""
    return _during("derivatives", derivatives)


def solving(w: Tensor) -> bool:
    """Whether a layer of these weights may be stood in for, and gains by it.

    It does where there is a second derivative, or a batch of tasks.
    """
    derivatives = getattr(_LOCAL, "derivatives", 0)
    return derivatives == 2 or (derivatives == 1 and is_batched(w))


def along_cotangents() -> contextlib.AbstractContextManager[None]:
    """This thread transposes a map that is linear in the cotangents: only their gradients are wanted."""
    return _during("linear")


def is_linear() -> bool:
    """Whether the gradients of a layer's input and weights are not wanted."""
    return getattr(_LOCAL, "linear", 0) == 1


def plainly() -> contextlib.AbstractContextManager[None]:
    """This thread runs a model that needs the numbers of an image in their usual order."""
    return _during("plain")


def may_pack() -> bool:
    """Whether a layer may order the numbers of an image as suits it."""
    return getattr(_LOCAL, "plain", 0) == 0


def stand_ins(layer: type[nn.Module], *kinds: type[nn.Module]) -> dict[type, type]:
    """For each kind of module a subclass whose ``forward`` is the layer's."""
    return {kind: type(f"Solving{kind.__name__}", (layer, kind), {}) for kind in kinds}


def fold(x: Tensor) -> Tensor:
    """Tasks into channels: ``[T, N, C, ...] -> [N, T C, ...]``."""
    return x.movedim(0, 1).flatten(1, 2)


def unfold(x: Tensor, tasks: int) -> Tensor:
    """Channels into tasks: ``[N, T C, ...] -> [N, T, C, ...]``."""
    return x.unflatten(1, (tasks, -1))
