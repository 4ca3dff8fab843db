"""Stream: the one face of every source of tasks (draw, iterate, count, resume)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from implicit_optim.tasks._checks import check_positive

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs `x [T, N, ...]` and targets `y [T, N, ...]` of T tasks at once."""

Episode: TypeAlias = tuple[Batch, Batch]
"""The support batch, which a task adapts to, and the query batch, which judges it."""


class Stream(ABC):
    """Episodes without end, or `steps` of them a pass, from a generator of its own.

    A subclass writes `sample()` and draws every random number from `self.generator`. Two streams
    with the same arguments and the same seed on the same kind of device give the same episodes;
    nothing else in the program can disturb them. Each pass draws new episodes. In a run on many
    processes, give each its own seed (`seed + rank`).

    Args:
        seed: seed of the generator.
        device: where the generator draws, hence where the episodes lie.
        steps: episodes in one pass; None for a stream without end.

    Raises:
        ValueError: if `steps` is not positive.

    Examples:
        >>> class Coins(Stream):
        ...     def sample(self):
        ...         x = torch.rand(2, 3, 1, generator=self.generator).round()
        ...         return (x, x), (x, x)
        >>> coins = Coins(seed=0, steps=4)
        >>> len(coins), sum(int(x.sum()) for (x, _), _ in coins)
        (4, 10)
    """

    def __init__(
        self, *, seed: int = 0, device: torch.device | str = "cpu", steps: int | None = None
    ) -> None:
        if steps is not None:
            check_positive(steps=steps)
        self.steps = steps
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self._taken = 0  # episodes given in the pass under way
        self._resume_at = 0  # where the next pass starts; not 0 only after load_state_dict

    @abstractmethod
    def sample(self) -> Episode:
        """Draw one episode; it does not count towards `steps`.

        Returns:
            `(support, query)`, each `(x [T, N, ...], y [T, N, ...])`.
        """

    def __iter__(self) -> Iterator[Episode]:
        """Give one pass of episodes: `steps` of them, or what a loaded state left of them."""
        taken, self._resume_at = self._resume_at, 0
        while self.steps is None or taken < self.steps:
            taken += 1
            self._taken = taken
            yield self.sample()
        self._taken = 0

    def __len__(self) -> int:
        """Return `steps`, the episodes in one pass.

        Raises:
            TypeError: if the stream has no end.
        """
        if self.steps is None:
            raise TypeError("this stream has no end, so no len(): give steps=")
        return self.steps

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to draw the same episodes.

        Returns:
            The generator's state (uint8 tensor on the CPU) and the place in the pass (int); it
            survives `torch.save` and `torch.load(weights_only=True)`.
        """
        return {"generator": self.generator.get_state(), "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream that gave `state` stood; the next pass gives its remainder.

        Args:
            state: from `state_dict()` of a stream with the same arguments on the same kind of
                device.

        Raises:
            ValueError: if the state is not one of this kind of stream.
        """
        if set(state) != {"generator", "taken"}:
            raise ValueError(
                f"Invalid state: it has the keys {sorted(state)}, not 'generator' and 'taken' "
                "(give what state_dict() of a stream returned)"
            )
        try:
            self.generator.set_state(state["generator"].cpu())
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"Invalid state: the generator on {self.generator.device} refuses it "
                "(load it on the kind of device where it was saved)"
            ) from error
        self._taken = self._resume_at = int(state["taken"])
