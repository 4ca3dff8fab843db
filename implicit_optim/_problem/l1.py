"""An objective with an l1 norm: sparse models."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._problem.inner_problem import InnerProblem
from implicit_optim._problem.objective import Equations, Objective
from implicit_optim._torch import pytree


@dataclass(frozen=True, eq=False)
class L1:
    r"""One task's inner problem with an l1 norm, ``F(phi, theta, *data) + sum_i s_i |phi_i|``.

    [`proximal_gradient`][implicit_optim.proximal_gradient] finds the zeros of phi exactly, and
    [`attach`][implicit_optim.attach] differentiates the other numbers: where theta moves by a little the
    zeros stay zero. So the strength can be learned by gradient descent.

    Args:
        objective: F, smooth: a function ``(phi, theta, *data) -> scalar`` or an
            [`Objective`][implicit_optim.Objective].
        strength: s, a function ``theta -> s`` where it shall have a gradient; else s itself. s is a
            number or 0-d tensor, or like phi: tensors that broadcast to phi's leaves. A negative s gives
            NaN.

    Raises:
        TypeError: the objective cannot be called, or is one of these itself.
        ValueError: a fixed strength is negative, not finite, or requires grad.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> fit = lambda phi, theta, y: ((phi - y) ** 2).sum() / 2
        >>> lasso = iopt.L1(fit, strength=lambda theta: theta)
        >>> theta, y = torch.tensor(1.0, requires_grad=True), torch.tensor([3.0, 0.5, -2.0])
        >>> solver = iopt.proximal_gradient(lr=1.0, max_steps=1)
        >>> phi = iopt.minimize(lasso, torch.zeros(3), theta, y, solver=solver).value
        >>> phi.tolist()  # each number of y, one nearer to zero
        [2.0, 0.0, -1.0]
        >>> iopt.attach(phi, lasso, theta, y).abs().sum().backward()
        >>> theta.grad.item()  # each of the two that are left falls with slope one
        -2.0

    Source: Tibshirani 1996 (lasso); Mairal, Bach & Ponce 2012, "Task-driven dictionary learning",
    section 3.2; Bertrand et al. 2020, "Implicit differentiation of Lasso-type models".
    """

    objective: Objective | Callable[..., Tensor]
    strength: Any

    def __post_init__(self) -> None:
        if not callable(self.objective) or isinstance(self.objective, (L1, Equations)):
            raise TypeError(
                "objective must be a smooth function (phi, theta, *data) -> scalar or an Objective, "
                f"got {type(self.objective).__name__}"
            )
        if callable(self.strength):
            return
        for s in pytree.tree_leaves(self.strength):
            if isinstance(s, Tensor) and s.requires_grad:
                raise ValueError(
                    "strength requires grad, but gradients come in through theta: put it into theta, "
                    'and give strength=lambda theta: theta["strength"]'
                )
            number = torch.as_tensor(s)
            if not bool(((number >= 0) & (number < math.inf)).all()):
                raise ValueError(f"Invalid strength: {s}: it must be finite and >= 0")

    def __call__(self, phi: Any, theta: Any, *data: Any) -> Tensor:
        """One task's objective, a scalar."""
        value = self.objective(phi, theta, *data)
        leaves = pytree.tree_leaves(pytree.tree_map(_term, self.strengths(phi, theta), phi))
        return sum(leaves, value)

    def strengths(self, phi: Any, theta: Any) -> Any:
        """The strength of every number in phi, a pytree like phi."""
        s = self.strength(theta) if callable(self.strength) else self.strength
        if isinstance(s, (int, float)) or (isinstance(s, Tensor) and s.ndim == 0):
            number = s
            s = pytree.tree_map(lambda leaf: number, phi)
        if isinstance(s, Mapping) and isinstance(phi, Mapping) and set(s) == set(phi):
            s = pytree.tree_unflatten([s[name] for name in phi], pytree.tree_structure(dict(phi)))
        if pytree.tree_structure(s) != pytree.tree_structure(phi):
            raise ValueError(
                f"strength must be a number or a pytree like phi, got {type(s).__name__}"
            )
        return pytree.tree_map(_spread, s, phi)


def _term(s: Tensor, leaf: Tensor) -> Tensor:
    return (s * leaf.abs()).sum()


def _spread(s: Any, leaf: Tensor) -> Tensor:
    s = s.to(leaf.dtype) if isinstance(s, Tensor) else leaf.new_full((), s)
    try:
        return torch.where(s >= 0, s, math.nan).expand(leaf.shape)
    except RuntimeError as error:
        raise ValueError(
            f"strength of shape {tuple(s.shape)} does not broadcast to phi's {tuple(leaf.shape)}"
        ) from error


def strengths(problem: InnerProblem, phi: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """The strength of every number in phi, of a problem whose objective is an `L1`."""
    assert isinstance(problem.objective, L1)
    each, ravel = problem.objective.strengths, problem.layout.ravel
    return problem.map(lambda phi, theta: ravel(each(phi, theta)), phi, problem.theta)


def smooth(problem: InnerProblem) -> InnerProblem:
    """The problem without its l1 norm, if it has one."""
    if not isinstance(problem.objective, L1):
        return problem
    return replace(problem, objective=problem.objective.objective, term=None)


def soft_threshold(x: Tensor, s: float | Tensor) -> Tensor:
    """``sign(x) max(|x| - s, 0)``, exactly zero where ``|x| <= s``: the proximal map of ``s |x|``."""
    bound: Any = s  # torch takes two numbers or two tensors
    return x - x.clamp(-bound, bound)


def subgradient(phi: Tensor, grad: Tensor, s: Tensor) -> Tensor:
    """The element of smallest norm in ``grad + s d|phi|``: zero at a minimiser, and only there."""
    return torch.where(phi == 0, soft_threshold(grad, s), grad + s * phi.sign())
