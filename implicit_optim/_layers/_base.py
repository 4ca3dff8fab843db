"""When and how a layer of a model is stood in for by one with a cheaper second derivative."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import Tensor, nn

_LOCAL = threading.local()


@contextlib.contextmanager
def _during(flag: str) -> Iterator[None]:
    """The flag is up in this thread."""
    before = getattr(_LOCAL, flag, False)
    setattr(_LOCAL, flag, True)
    try:
        yield
    finally:
        setattr(_LOCAL, flag, before)


def recording() -> contextlib.AbstractContextManager[None]:
    """This thread records a graph for a solve, and nobody will differentiate it a third time."""
    return _during("solving")


def solving() -> bool:
    """Whether a layer may be stood in for."""
    return getattr(_LOCAL, "solving", False)


def along_cotangents() -> contextlib.AbstractContextManager[None]:
    """This thread transposes a map that is linear in the cotangents: only their gradients are wanted."""
    return _during("linear")


def is_linear() -> bool:
    """Whether the gradients of a layer's input and weights are not wanted."""
    return getattr(_LOCAL, "linear", False)


def stand_ins(layer: type[nn.Module], *kinds: type[nn.Module]) -> dict[type, type]:
    """For each kind of module a subclass whose ``forward`` is the layer's."""
    return {kind: type(f"Solving{kind.__name__}", (layer, kind), {}) for kind in kinds}


def fold(x: Tensor) -> Tensor:
    """Tasks into channels: ``[T, N, C, ...] -> [N, T C, ...]``."""
    return x.movedim(0, 1).flatten(1, 2)


def unfold(x: Tensor, tasks: int) -> Tensor:
    """Channels into tasks: ``[N, T C, ...] -> [N, T, C, ...]``."""
    return x.unflatten(1, (tasks, -1))
