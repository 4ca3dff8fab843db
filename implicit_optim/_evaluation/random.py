"""Random numbers: each evaluation draws from one seed, or drawing is an error.

torch's generators are process-wide, so changing one for a moment takes a lock: solves in several
threads do not disturb each other.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from implicit_optim._torch import outside_transforms

_DRAWING = threading.RLock()
# torch reads a generator while holding its mutex and may run garbage collection, which releases the
# GIL: a second reader then holds the GIL and waits for the mutex, the first for the GIL. A deadlock.
_READING = threading.RLock()


def draw_seed() -> int:
    """A seed from torch's default generator, drawn while no other thread has changed it."""
    with _DRAWING:
        return int(torch.randint(2**62, (), device="cpu"))


@contextlib.contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from this seed, then restore the generators."""
    with _DRAWING:
        before = states(device)
        for generator in _generators(device):
            generator.manual_seed(seed)
        try:
            yield
        finally:
            with outside_transforms():
                for generator, state in zip(_generators(device), before, strict=True):
                    generator.set_state(state)


def states(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators that a model on this device may draw from."""
    with _READING, outside_transforms():
        return [generator.get_state() for generator in _generators(device)]


def drew(
    before: list[torch.Tensor], device: torch.device, *, again: Callable[[], Any] | None = None
) -> bool:
    """Whether numbers were drawn since ``before``. Running ``again`` rules out another thread."""
    after = states(device)
    with outside_transforms():
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if same or again is None:
        return not same
    with _DRAWING:
        before = states(device)
        again()
        return drew(before, device)


def _generators(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]
