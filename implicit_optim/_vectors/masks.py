"""Masks over a batch of tasks: what may be looked at, early exits, one value or the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_optim._torch import is_batched


def none_running(running: Tensor) -> bool:
    """Whether a loop over a batch of tasks may stop early.

    Looking costs one host synchronisation. Where the answer cannot be known (under ``vmap``, on the
    ``meta`` device, while compiling) it is "no", and the loop runs to its end behind masks.

    Args:
        running: bool ``[*batch]``.

    Returns:
        True if no task is running any more.
    """
    return is_readable(running) and not bool(running.any())


def is_readable(mask: Tensor) -> bool:
    """Whether a mask has numbers that a host can look at."""
    compiling = torch.compiler.is_compiling()
    return not (compiling or mask.device.type == "meta" or is_batched(mask))


def where(mask: Tensor, new: Tensor | float, old: Tensor) -> Tensor:
    """``new`` for the tasks in ``mask [*batch]``, ``old`` for the others, over trailing dimensions.

    On a CPU, where looking is cheap, a mask that is all false or all true costs no pass over them.
    """
    return selector(mask)(new, old)


def selector(mask: Tensor) -> Callable[[Tensor | float, Tensor], Tensor]:
    """`where` with this mask, for several pairs: it is looked at once."""
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
    """Whether a host can look at the numbers of ``x``, and looking costs nothing."""
    return x.device.type == "cpu" and is_readable(x)


def none_running_if_free(mask: Tensor) -> bool:
    """Whether the mask is known to be false for every task, where looking costs nothing."""
    return is_free_to_read(mask) and not bool(mask.any())
