"""Random numbers: drawn from a seed for one evaluation, or not drawn at all.

torch's generators belong to the whole process: whoever changes them for a moment holds a lock, so that
solves in several threads do not see each other's.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from implicit_optim._torch import outside_transforms

_DRAWING = threading.RLock()
# torch reads a generator with its mutex locked and may collect garbage meanwhile, which lets go of the
# GIL: a second reader then waits for the mutex with the GIL, the first for the GIL with the mutex.
_READING = threading.RLock()


def draw_seed() -> int:
    """A seed from torch's generator, drawn while no evaluation of another thread has it."""
    with _DRAWING:
        return int(torch.randint(2**62, (), device="cpu"))


@contextlib.contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from this seed, and leave the generators as they were."""
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
    """The states of the generators that a model there may draw from; no part of any transform."""
    with _READING, outside_transforms():
        return [generator.get_state() for generator in _generators(device)]


def drew(
    before: list[torch.Tensor], device: torch.device, *, again: Callable[[], Any] | None = None
) -> bool:
    """Whether numbers were drawn since; by what is called ``again``, and not by another thread."""
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
