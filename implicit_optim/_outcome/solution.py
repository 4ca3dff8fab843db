"""What a solve leaves behind: a value, a status per task, and the numbers that explain it."""

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int8
from torch import Tensor

from implicit_optim._torch import pytree


class Status(enum.IntEnum):
    """How the solve of one task ended. Zero is success; every other code says what to try.

    A fixed number of steps that was asked for (``tol = 0``, ``rtol = atol = 0``) and done is success.

    Examples:
        >>> import implicit_optim as iopt
        >>> iopt.Status.NEGATIVE_CURVATURE.value, iopt.Status(0).name
        (2, 'SUCCESS')
        >>> print(iopt.Status.MAX_STEPS.message)
        the tolerance was not met: allow more max_steps, loosen the tolerance, or use float64
    """

    SUCCESS = 0
    MAX_STEPS = 1
    NEGATIVE_CURVATURE = 2
    NO_DESCENT = 3
    NONFINITE = 4
    SINGULAR = 5
    LINE_SEARCH = 3  # the old name of NO_DESCENT, until 0.2

    @property
    def message(self) -> str:
        """One sentence on what happened and what to try."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.SUCCESS: "solved to the accuracy asked for",
    Status.MAX_STEPS: "the tolerance was not met: allow more max_steps, loosen the tolerance, or use "
    "float64",
    Status.NEGATIVE_CURVATURE: "conjugate gradients met a direction of negative curvature (or of almost "
    "none: see CG.min_curvature) and kept the best iterate so far: try curvature=GaussNewton, another "
    "lam (on real networks a smaller lam can make the Hessian more definite), a zero-initialised last "
    "layer, or more inner steps",
    Status.NO_DESCENT: "no step along the direction was an improvement: the iterate is as accurate as "
    "the dtype allows, the derivative is wrong or the matrix indefinite; try float64 or "
    "curvature=GaussNewton",
    Status.SINGULAR: "the matrix is singular to working precision, so that the equations do not "
    "determine the solution: add a proximal term or damping",
    Status.NONFINITE: "NaN or inf appeared: look for it in the task's data and parameters, or lower the "
    "inner lr",
}


class Solution(NamedTuple):
    """A solve's result. A ``NamedTuple``, hence a pytree that ``vmap`` understands.

    Attributes:
        value: the solution, a tensor or pytree with the batch dimensions ``[*batch, ...]`` leading.
        status: a [`Status`][implicit_optim.Status] code per task, int8 ``[*batch]``.
        stats: named tensors ``[*batch]`` such as ``steps``, ``residual_norm`` and ``grad_norm``, and
            ``lanczos [*batch, steps, 2]`` from CG, for ``ritz_values``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> done = iopt.Solution(torch.zeros(2, 3), torch.tensor([0, 2], dtype=torch.int8), {})
        >>> done.share(iopt.Status.NEGATIVE_CURVATURE).item()
        0.5
        >>> print(done.summary())
        1 of 2 success, 1 negative_curvature: conjugate gradients met a direction of negative ...
    """

    value: Any
    status: Int8[Tensor, "*batch"]
    stats: dict[str, Tensor]

    def share(self, status: Status) -> Tensor:
        """Fraction of the tasks that ended with ``status``, a 0-d tensor that stays on the device."""
        return (self.status == int(status)).to(torch.get_default_dtype()).mean()

    def ritz_values(self) -> tuple[Tensor, Tensor]:
        r"""Smallest and largest eigenvalue of the matrix A of a linear solve, as CG saw it.

        They lie *inside* the true range and reach its ends as CG goes on: estimates of mu from above,
        of the condition number from below. A smallest one below lam says that the data term curves
        down, a negative one that A is indefinite. They cost nothing during the solve; the small
        eigenproblem is solved when this is called.

        Where the proximal term M is no multiple of the identity, CG sees ``M^-1 A``: these are its
        eigenvalues, times the mean strength ``b.b / b.M^-1 b`` of M.

        Returns:
            The two Ritz values, ``[*batch]`` each, NaN for a task that took no step.

        Raises:
            ValueError: this is no solution of CG.

        Source: Golub & Van Loan 2013, section 10.2; Saad 2003, section 6.7.3.
        """
        if "lanczos" not in self.stats:
            raise ValueError("only a solution of linear_solve with CG has Ritz values")
        diagonal, off = self.stats["lanczos"].unbind(-1)
        if diagonal.shape[-1] == 0:
            nan = torch.full_like(self.stats["rhs_norm"], float("nan"))
            return nan, nan
        # A step that a task did not take becomes a copy of its first Ritz value: inside the range.
        first = diagonal[..., :1]
        taken = torch.isfinite(diagonal)
        tridiagonal = torch.diag_embed(torch.where(taken, diagonal, first.nan_to_num()))
        if diagonal.shape[-1] > 1:
            joined = torch.where(taken[..., 1:], off[..., :-1], 0.0)
            tridiagonal = tridiagonal + joined.diag_embed(1) + joined.diag_embed(-1)
        eigenvalues = torch.linalg.eigvalsh(tridiagonal)
        eigenvalues = torch.where(taken[..., :1], eigenvalues, float("nan"))
        return eigenvalues[..., 0], eigenvalues[..., -1]

    def summary(self) -> str:
        """How many tasks ended how, and what to try for those that failed."""
        counts = {s: int((self.status == int(s)).sum()) for s in Status}
        text = f"{counts.pop(Status.SUCCESS)} of {self.status.numel()} success"
        failed = [f"{c} {s.name.lower()}: {s.message}" for s, c in counts.items() if c]
        return ", ".join([text, *failed])


def status_of(*outcomes: tuple[Tensor, Status]) -> Int8[Tensor, "*batch"]:
    """The status of every task: the last outcome whose mask holds it, ``SUCCESS`` where none does."""
    status = torch.zeros_like(outcomes[0][0], dtype=torch.int8)
    for mask, outcome in outcomes:
        status = torch.where(mask, outcome.value, status)
    return status


OnSolve = Callable[[str, Solution], None]


def add_task_dim(solution: Solution, place: slice | int) -> Solution:
    """The solution of a part of a batch; that of a task at an index gets the batch dimension."""
    if isinstance(place, slice):
        return solution
    return pytree.tree_map(lambda t: t.unsqueeze(0), solution)


def concatenate(parts: Sequence[Solution]) -> Solution:
    """The solution of a batch from those of its parts; the shorter ``lanczos`` end in padding."""
    return parts[0] if len(parts) == 1 else pytree.tree_map(_joined, *parts)


def _joined(*pieces: Tensor) -> Tensor:
    # Only `lanczos` differs in shape: CG took fewer steps in some parts.
    if len({piece.shape[1:] for piece in pieces}) > 1:
        longest, pad = max(t.shape[-2] for t in pieces), torch.nn.functional.pad
        pieces = tuple(pad(t, (0, 0, 0, longest - t.shape[-2]), value=math.nan) for t in pieces)
    return torch.cat(pieces)
