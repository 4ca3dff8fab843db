"""What every linear solver is."""

from __future__ import annotations

import abc
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from implicit_optim._operator import Linearized
from implicit_optim._solution import Solution


class LinearSolver(abc.ABC):
    """Solves ``A x = b`` for every task of a batch at once.

    A subclass is a frozen dataclass of settings. Its ``solve`` is batch-native: masks per task, no
    ``.item()`` where none is needed, so that it runs under ``vmap`` and on any device.

    Attributes:
        stats_names: what the solutions' ``stats`` hold, in order.
    """

    stats_names: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def solve(self, operator: Linearized, b: Float[Tensor, "*batch n"]) -> Solution:
        """Solve at a fixed linearisation.

        Args:
            operator: A, already linearised.
            b: right-hand side ``[*batch, n]``.

        Returns:
            A [`Solution`][implicit_optim.Solution] with value ``[*batch, n]``, without a graph.
        """
