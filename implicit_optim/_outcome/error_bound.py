"""How far an implicit meta-gradient can be from the exact one."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._outcome.solution import Solution, Status


def error_bound(
    solution: Solution,
    *,
    lam: float | Tensor,
    smoothness: float | Tensor,
    hessian_lipschitz: float | Tensor = 0.0,
    strong_convexity: float | Tensor | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Bound on ``||g - g*||`` for each task, from what the solves left behind.

    ``g = lam w`` is the meta-gradient computed at phi with the linear solution w, ``g*`` the exact one
    at the minimiser phi*, both for the anchor theta of ``G = Lhat(phi) + lam/2 ||phi - theta||^2``:

    ``||g - g*|| <= lam/mu (||r|| + delta (L_s + rho (||w|| + ||r||/mu)))``, where
    ``delta = ||grad G(phi)||/mu``.

    It is Lemma 3 of the paper with the norm of the computed w in place of a Lipschitz constant of L,
    which makes it computable and needs no small delta. It follows from ``||phi - phi*|| <= delta``,
    ``||w - A^-1 v|| <= ||r||/mu`` and ``A^-1 v - A*^-1 v* = A*^-1 ((A* - A) A^-1 v + v - v*)``.

    What it assumes, and cannot check: G is mu-strongly convex, the Hessian of Lhat is
    rho-Lipschitz and the outer loss L_s-smooth in phi, along the segment from phi to phi*; rounding is
    negligible. A solve with a tolerance reports its true residual, one of a fixed number of steps that
    of CG's recurrence.

    Args:
        solution: of the linear solve, as ``on_solve`` hears it.
        lam: proximal strength, a scalar, or the largest eigenvalue of a matrix.
        smoothness: ``L_s``, a Lipschitz constant of the outer gradient v as a function of phi, a
            scalar or one per task ``[*batch]``; 0 if v does not depend on phi.
        hessian_lipschitz: ``rho``, a scalar or ``[*batch]``; 0 for a quadratic inner loss.
        strong_convexity: ``mu``, a scalar or ``[*batch]``. A convex inner loss has ``mu >= lam``.
            Default: the smallest Ritz value of the solve. That is an estimate from above: the result
            is then an estimate, and no bound.

    Returns:
        The bound ``[*batch]``, in units of the meta-gradient; inf for a task whose solve met
        negative curvature, and whatever is not finite in the solution stays so.

    Raises:
        ValueError: a constant is out of range, or the solution is none of an ``attach``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: phi @ phi / 2 + 2 * (phi - theta) @ (phi - theta) / 2
        >>> def tell(name, solution):
        ...     bound = iopt.error_bound(solution, lam=2.0, smoothness=0.0, strong_convexity=3.0)
        ...     print(f"{bound:.4f}")
        >>> theta = torch.ones(1, requires_grad=True)
        >>> phi = iopt.attach(
        ...     torch.ones(1), F, theta, on_solve=tell, linear_solver=iopt.CG(max_steps=0)
        ... )
        >>> phi.sum().backward()  # 2 instead of 2/3
        2.6667

    Source: Rajeswaran et al. 2019, Lemma 3; Grazzi et al. 2020, theorem 3.1 (fixed points).
    """
    stats, w = solution.stats, solution.value
    if "rhs_norm" not in stats or "stationarity" not in stats:
        raise ValueError("solution must be that of a linear solve in attach, as on_solve hears it")
    constants = {"lam": lam, "smoothness": smoothness, "hessian_lipschitz": hessian_lipschitz}
    lam, L_s, rho = (_constant(name, value, w) for name, value in constants.items())
    if strong_convexity is None:
        mu = solution.ritz_values()[0]
    else:
        mu = _constant("strong_convexity", strong_convexity, w)

    norm = torch.linalg.vector_norm(w, dim=-1)
    linear = stats["residual_norm"] / mu
    if "steps" in stats:  # a task that took none got M^-1 v, but reports the residual of zero
        linear = torch.where((stats["steps"] == 0) & (linear > 0), norm + linear, linear)
    delta = stats["stationarity"] / mu
    length = norm + linear
    bound = lam * (linear + delta * (L_s + rho * length) / mu)
    convex = (mu > 0) & (solution.status != Status.NEGATIVE_CURVATURE.value)
    return torch.where(convex, bound, math.inf)


def _constant(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    constant = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    strict = name in ("lam", "strong_convexity")
    good = constant > 0 if strict else constant >= 0
    if not bool((good & (constant < math.inf)).all()):
        least = "> 0" if strict else ">= 0"
        raise ValueError(f"Invalid {name}: {value}: it must be finite and {least}")
    return constant
