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

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> class FirstOrderDirection(iopt.LinearSolver):
        ...     stats_names = ()
        ...
        ...     def solve(self, operator, b):
        ...         solved = torch.zeros(b.shape[:-1], dtype=torch.int8)
        ...         return iopt.Solution(operator.precondition(b), solved, {})
        >>> A = iopt.Damped(iopt.Dense(torch.eye(2)), 4.0)
        >>> iopt.linear_solve(A, torch.ones(2), FirstOrderDirection()).value.tolist()  # b / damping
        [0.25, 0.25]
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
