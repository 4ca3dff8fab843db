"""Truncated conjugate gradients in a ball: the step of a trust region."""

import torch
from torch import Tensor

from implicit_optim._operator import Linearized
from implicit_optim._outcome import Solution, Status, status_of
from implicit_optim._search import Scalars, Vectors
from implicit_optim._solver.gd import Number
from implicit_optim._vectors import (
    dot,
    none_running,
    none_running_if_free,
    norm,
    power_of_two,
    where,
)


@torch.no_grad()
def steihaug(
    A: Linearized, b: Vectors, radius: Scalars, *, rtol: Number = 0.0, max_steps: int | None = None
) -> Solution:
    r"""Lower the model ``m(x) = x.Ax / 2 - b.x`` in the ball ``||x|| <= radius``, for every task.

    Conjugate gradients from ``x = 0``, whose iterates grow in norm. A task stops when the residual is at
    most ``rtol ||b||``. It stops on the boundary where the next iterate would lie outside, or where it
    follows the first direction with ``p.Ap <= 0``, along which the model is unbounded below. The first
    iterate is the Cauchy point, so that ``m(0) - m(x) >= 1/2 ||b|| min(radius, ||b|| / ||A||)``.

    Args:
        A: symmetric, definite or not, linearised. Its preconditioner is not used, because the ball is
            Euclidean.
        b: minus the gradient, ``[*batch, n]``.
        radius: of the ball, in units of x, ``[*batch]``.
        rtol: residual relative to ``||b||``, a number or ``[*batch]``.
        max_steps: most products. Default: ``min(10 n, 1000)``, with a host synchronisation each to see
            whether all tasks are done; with a number, only where that costs nothing.

    Returns:
        A [`Solution`][implicit_optim.Solution] with value ``[*batch, n]``; the status is
        ``NEGATIVE_CURVATURE`` where it followed such a direction, ``NONFINITE`` where a product was not
        finite. ``stats``: ``steps`` (products that moved the iterate), ``norm = ||x||``, ``on_boundary``
        (bool), and ``decrease = m(0) - m(x) >= 0``, a sum of positive terms without cancellation.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> saddle = iopt.Dense(torch.diag(torch.tensor([1.0, -1.0]))).linearize()
        >>> inside = steihaug(saddle, torch.tensor([1.0, 0.0]), torch.tensor(2.0))
        >>> inside.value.tolist(), inside.stats["decrease"].item()
        ([1.0, 0.0], 0.5)
        >>> down = steihaug(saddle, torch.tensor([0.0, 1.0]), torch.tensor(4.0))
        >>> down.value.tolist(), down.stats["decrease"].item(), iopt.Status(down.status.item()).name
        ([0.0, 4.0], 12.0, 'NEGATIVE_CURVATURE')

    Source: Steihaug 1983; Nocedal & Wright 2006, algorithm 7.2.
    """
    eps = torch.finfo(b.dtype).eps
    look, max_steps = max_steps is None, max_steps or min(10 * b.shape[-1], 1000)
    scale = power_of_two(b)  # otherwise squares of a tiny or huge b underflow or overflow
    r, radius = b / scale.unsqueeze(-1), radius / scale
    residual = norm(r)
    target = torch.as_tensor(rtol, dtype=b.dtype, device=b.device).clamp(min=eps) * residual
    nonfinite = ~torch.isfinite(residual)
    running = ~nonfinite & (residual > target)
    indefinite = on_boundary = torch.zeros_like(running)
    steps = torch.zeros_like(running, dtype=torch.int32)
    x, p, rr = torch.zeros_like(r), r, residual.square()
    decrease, norm_of_A = torch.zeros_like(residual), torch.zeros_like(residual)

    for _ in range(max_steps):
        if none_running_if_free(running) or (look and none_running(running)):
            break
        Ap, p_norm = A.mv(p), norm(p)
        curvature = dot(p, Ap)
        nonfinite = nonfinite | (running & ~torch.isfinite(curvature))
        running = running & ~nonfinite
        norm_of_A = torch.maximum(norm_of_A, torch.where(running, norm(Ap) / p_norm, 0.0))
        down = running & (curvature <= eps * norm_of_A * p_norm.square())
        alpha = rr / curvature
        edge = down | (running & ~(norm(x + alpha.unsqueeze(-1) * p) < radius))
        step = torch.where(running, torch.where(edge, _to_edge(x, p, p_norm, radius), alpha), 0.0)
        x = where(running, torch.addcmul(x, step.unsqueeze(-1), p), x)
        r = where(running, torch.addcmul(r, step.unsqueeze(-1), Ap, value=-1), r)
        gain = step * rr - step.square() / 2 * curvature  # r.p = r.r
        decrease = decrease + torch.where(running, gain, 0.0)
        steps = steps + running
        indefinite, on_boundary = indefinite | down, on_boundary | edge
        residual, rr_before = norm(r), rr
        running = running & ~edge & (residual > target)
        rr = residual.square()
        p = where(running, torch.addcmul(r, (rr / rr_before).unsqueeze(-1), p), p)

    x = where(nonfinite, torch.nan, x * scale.unsqueeze(-1))
    status = status_of((indefinite, Status.NEGATIVE_CURVATURE), (nonfinite, Status.NONFINITE))
    stats = {"steps": steps, "norm": norm(x), "on_boundary": on_boundary}
    return Solution(x, status, {**stats, "decrease": decrease * scale.square()})


def _to_edge(x: Tensor, p: Tensor, p_norm: Tensor, radius: Tensor) -> Tensor:
    """The t >= 0 with ``||x + t p|| = radius``, without squaring the radius and without cancellation."""
    x_norm = norm(x)
    gap = (radius - x_norm).clamp(min=0).sqrt() * (radius + x_norm).sqrt()
    along = dot(x, p) / p_norm  # >= 0, up to rounding
    return gap * (gap / (along + torch.hypot(along, gap))) / p_norm
