"""Which of torch's kernels are used while a function runs that needs a second derivative."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_SETTING = threading.RLock()


class _AsLongAsInside:
    """A process-wide setting of torch, in force while any thread is inside.

    torch's own context managers belong to one thread (a ``sdpa_kernel`` entered in one cannot be left in
    another) and also write settings that nobody asked for (``backends.mkldnn.flags``).

    Args:
        enforce: applies the setting and returns a function that restores the previous one.
    """

    def __init__(self, enforce: Callable[[], Callable[[], Any]]) -> None:
        self.enforce = enforce
        self.take_back: Callable[[], Any] = enforce
        self.inside = 0

    def __enter__(self) -> None:
        with _SETTING:
            if self.inside == 0:
                self.take_back = self.enforce()
            self.inside += 1

    def __exit__(self, *exception: object) -> None:
        with _SETTING:
            self.inside -= 1
            if self.inside == 0:
                self.take_back()


def _switches(*switches: tuple[Callable[[], bool], Callable[[bool], Any], bool]) -> _AsLongAsInside:
    """Several switches at once: how each is read, how it is set, and to what."""

    def enforce() -> Callable[[], Any]:
        before = [is_on() for is_on, _, _ in switches]
        for _, put, wanted in switches:
            put(wanted)
        return lambda: [put(was) for (_, put, _), was in zip(switches, before, strict=True)]

    return _AsLongAsInside(enforce)


def _uncompiled() -> Callable[[], Any]:
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


def _off(backend: Any) -> Iterator[Any]:
    yield lambda: backend.enabled, lambda value: setattr(backend, "enabled", value), False


_cuda = torch.backends.cuda
# Of the kernels for attention only the plain one has a second derivative and, on a CPU, a batching rule.
plain_attention = _switches(
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp, True),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp, False),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp, False),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp, False),
)
# Fused recurrent kernels have none either; those that torch composes have.
unfused = _switches(*_off(torch.backends.cudnn), *_off(torch.backends.mkldnn))
# Compiled code has no second derivative, so compiled parts of a model run eagerly.
uncompiled = _AsLongAsInside(_uncompiled)
