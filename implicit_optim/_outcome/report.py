"""What happened in the last solves, for humans; and what to do about a solve that failed."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from implicit_optim._outcome.solution import Solution, Status
from implicit_optim._torch import unwrapped
from implicit_optim._vectors import is_readable


class SolveWarning(UserWarning):
    """More tasks than expected were not solved; the message says how many, and what to try.

    Examples:
        >>> import implicit_optim as iopt
        >>> issubclass(iopt.SolveWarning, UserWarning)
        True
    """


class SolveError(RuntimeError):
    """A task was not solved; the message says how many, and what to try.

    Examples:
        >>> import implicit_optim as iopt
        >>> issubclass(iopt.SolveError, RuntimeError)
        True
    """


class Ignore:
    """Policy for ``on_solve``: say nothing. `MetaLearner.report` still shows what happened.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.Ignore()("minimize", iopt.Solution(None, torch.ones(3), {}))
    """

    def __call__(self, name: str, solution: Solution) -> None:
        """Do nothing."""


@dataclass
class Warn:
    """Policy for ``on_solve``: warn once if many tasks failed. The default of `MetaLearner`.

    Looking costs one host synchronisation, so that it looks at the solves number 1, 2, 4, 8, ... only.

    Args:
        share: fraction of the tasks that may fail without a word.

    Examples:
        >>> import torch, implicit_optim as iopt, warnings
        >>> policy, failed = iopt.Warn(), iopt.Solution(None, torch.tensor([0, 2, 2]), {})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for _ in range(4):
        ...         policy("linear_solve", failed)
        >>> print(len(caught), caught[0].message)
        1 linear_solve: 1 of 3 success, 2 negative_curvature: conjugate gradients met ...
    """

    share: float = 0.1
    _seen: Counter[str] = field(default_factory=Counter, repr=False)
    _warned: bool = field(default=False, repr=False)

    def __call__(self, name: str, solution: Solution) -> None:
        """Look, now and then."""
        self._seen[name] += 1
        count = self._seen[name]
        if self._warned or count & (count - 1) or not is_readable(solution.status):
            return
        if _share_failed(solution) > self.share:
            self._warned = True
            warnings.warn(f"{name}: {solution.summary()}", SolveWarning, stacklevel=2)


@dataclass(frozen=True)
class Raise:
    """Policy for ``on_solve``: raise a `SolveError` if tasks failed. Looks at every solve.

    Args:
        share: fraction of the tasks that may fail.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> iopt.Raise(share=0.5)("minimize", iopt.Solution(None, torch.tensor([0, 0, 1]), {}))
    """

    share: float = 0.0

    def __call__(self, name: str, solution: Solution) -> None:
        """Look, and raise."""
        if is_readable(solution.status) and _share_failed(solution) > self.share:
            raise SolveError(f"{name}: {solution.summary()}")


@dataclass(frozen=True)
class Report:
    """The last solves of a `MetaLearner`, by name: ``print`` it, or log ``numbers()``.

    Attributes:
        solves: the last solution by name, without its value.
        refusals: what ``torch.func.vmap`` said where it could not batch the tasks.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> meta = iopt.MetaLearner(
        ...     torch.nn.Linear(2, 1),
        ...     torch.nn.functional.mse_loss,
        ...     solver=iopt.gd(lr=0.1, max_steps=50),
        ... )
        >>> batch = torch.ones(3, 4, 2), torch.zeros(3, 4, 1)
        >>> meta(batch, batch).mean().backward()
        >>> print(meta.report())
        minimize       3 of 3 success
                       50 steps, ||grad|| ... of the first
        linear_solve   3 of 3 success
                       1 steps, residual ... of ||v||, ||grad G(phi)|| ...
                       eigenvalues from 7 to 7, condition number 1
        Nothing to change.
    """

    solves: Mapping[str, Solution]
    refusals: tuple[str, ...] = ()

    def numbers(self) -> dict[str, float]:
        """Medians over the tasks and shares of them, by ``"solve/what"``: for a logger.

        Returns:
            ``success`` and the other statuses are shares. Of the others those that the solve tells:
            ``steps``; ``reduction = ||grad|| / ||grad at the start||``; ``residual = ||r|| / ||b||``;
            ``stationarity = ||grad G(phi)||``;
            ``smallest`` and ``largest`` Ritz value (extremes over the tasks) and ``condition``;
            ``fallback``, the share of tasks that took the second matrix of a safeguarded one.
        """
        solves = self.solves.items()
        return {f"{name}/{key}": v for name, s in solves for key, v in _numbers(s).items()}

    def advice(self) -> str:
        """One sentence on what to change."""
        n = self.numbers()
        for name in self.solves:
            for status in reversed(Status):  # the worst first
                if status != Status.SUCCESS and n[f"{name}/{status.name.lower()}"] > 0.1:
                    return f"{name}: {status.message}."
        for key, advice in _LEFT.items():
            if n.get(key, 0) > 0.1:
                return advice.format(n[key])
        return "Nothing to change."

    def __str__(self) -> str:
        """The table for humans."""
        lines = []
        for name, solution in self.solves.items():
            lines.append(f"{name:<14} {solution.summary().split(':')[0]}")
            lines += [f"{'':<14} {detail}" for detail in _details(_numbers(solution))]
        if self.refusals:
            lines.append(f"Tasks one by one, since torch.func.vmap refuses: {self.refusals[0]}")
        return "\n".join([*lines, self.advice()]) if lines else "No solve so far."


def remembered(solution: Solution) -> Solution | None:
    """A solution without its value and without a graph, or ``None`` where its numbers are hidden."""
    if not is_readable(solution.status):
        return None
    stats = {name: unwrapped(t).detach() for name, t in solution.stats.items()}
    return Solution(None, unwrapped(solution.status).detach(), stats)


def _share_failed(solution: Solution) -> float:
    return float((solution.status != Status.SUCCESS.value).double().mean())


_LEFT = {
    "minimize/reduction": "The inner solver left {:.2g} of the gradient: take more inner steps, another "
    "lr, or newton_cg; the implicit gradient is that of a minimiser.",
    "linear_solve/residual": "The linear solve left {:.2g} of its right-hand side: take more CG steps, "
    "or add damping with a larger lam.",
}

_DETAILS = {
    "steps": "{:.0f} steps",
    "reduction": "||grad|| {:.2g} of the first",
    "residual": "residual {:.2g} of ||v||",
    "stationarity": "||grad G(phi)|| {:.2g}",
}


def _details(n: dict[str, float]) -> list[str]:
    """What the report says of the numbers that a solve has."""
    lines = [", ".join(text.format(n[key]) for key, text in _DETAILS.items() if key in n)]
    if "condition" in n:
        ends = "eigenvalues from {smallest:.3g} to {largest:.3g}, condition number {condition:.3g}"
        lines.append(ends.format(**n))
    if n.get("fallback", 0) > 0:
        lines.append(
            f"{100 * n['fallback']:.0f} % of the tasks indefinite, solved with the fallback"
        )
    return lines


def _numbers(solution: Solution) -> dict[str, float]:
    stats = solution.stats
    result = {s.name.lower(): float(solution.share(s)) for s in Status}
    result |= {k: _median(stats[k]) for k in ("steps", "stationarity") if k in stats}
    if "initial_grad_norm" in stats:
        result["reduction"] = _median(stats["grad_norm"] / stats["initial_grad_norm"])
    if "rhs_norm" in stats:
        result["residual"] = _median(stats["residual_norm"] / stats["rhs_norm"])
    if "fallback" in stats:
        result["fallback"] = float(stats["fallback"].double().mean())
    if "lanczos" in stats:
        smallest, largest = solution.ritz_values()  # NaN for a task that took no step
        result["smallest"] = float(smallest.double().nanquantile(0.0))
        result["largest"] = float(largest.double().nanquantile(1.0))
        result["condition"] = _median(torch.where(smallest <= 0, torch.inf, largest / smallest))
    return result


def _median(t: Tensor) -> float:
    return float(t.double().nanmedian())
