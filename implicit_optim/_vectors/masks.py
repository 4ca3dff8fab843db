"""Masks over a batch of tasks: which may be read, early exits, selection."""

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_optim._torch import is_batched


def none_running(running: Tensor) -> bool:
    """Whether a loop over a batch of tasks may stop early.

    Reading the mask costs one host synchronisation. If it cannot be read (under ``vmap``, on the
    ``meta`` device, while compiling), the answer is "no" and the loop runs to its end behind masks.

    Args:
        running: bool ``[*batch]``.

    Returns:
        True if no task is running any more.
    """
    return is_readable(running) and not bool(running.any())


def is_readable(mask: Tensor) -> bool:
    """Whether the host can read the mask."""
    compiling = torch.compiler.is_compiling()
    return not (compiling or mask.device.type == "meta" or is_batched(mask))


def where(mask: Tensor, new: Tensor | float, old: Tensor) -> Tensor:
    """``new`` for the tasks in ``mask [*batch]``, ``old`` for the others, over trailing dimensions.

    On a CPU, where reading the mask is free, one that is all false or all true copies nothing.
    """
    return selector(mask)(new, old)


def selector(mask: Tensor) -> Callable[[Tensor | float, Tensor], Tensor]:
    """`where` with this mask, for several pairs; the mask is read once."""
    every = none = False
    if is_free_to_read(mask):
        every = bool(mask.all())
        none = not every and not bool(mask.any())

    def choose(new: Tensor | float, old: Tensor) -> Tensor:
        if every and isinstance(new, Tensor):
            return new
        if none:
            return old
        return torch.where(mask.reshape(mask.shape + (1,) * (old.ndim - mask.ndim)), new, old)

    return choose


def is_free_to_read(x: Tensor) -> bool:
    """Whether the host can read ``x`` without a synchronisation."""
    return x.device.type == "cpu" and is_readable(x)


def none_running_if_free(mask: Tensor) -> bool:
    """Whether the mask is false for every task, as far as the host can tell for free."""
    return is_free_to_read(mask) and not bool(mask.any())
