"""Step lengths that lower the objective and flatten its slope sufficiently: strong Wolfe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicit_optim._search.base import Found, Line, Scalars, Search, rounding_of
from implicit_optim._vectors import none_running

_GROW = 10.0  # while there is no bracket, a trial is at most this many times the last one
_MARGIN = 0.1  # least distance of a trial from the ends of the bracket, relative to its width


class _Point(NamedTuple):
    """A step length per task with the objective's value and slope there, ``[*batch]`` each."""

    t: Scalars
    value: Scalars
    slope: Scalars

    def replaced(self, where: Tensor, other: _Point) -> _Point:
        """This point, with the tasks in ``where`` taken from the other one."""
        return _Point(*(torch.where(where, new, old) for new, old in zip(other, self, strict=True)))


@dataclass(frozen=True)
class StrongWolfe(Search):
    """Bracketing and zoom, until the strong Wolfe conditions hold.

    ``F(phi + t d) <= F(phi) + c1 t slope`` and ``|slope(t)| <= c2 |slope|``, the first up to the
    rounding of F. The trials start at ``lr`` and grow until they bracket a minimiser along the line;
    then the bracket shrinks. The next trial is the minimiser of a cubic, kept away from the ends of the
    bracket, or its midpoint where interpolation converges slowly. If the trials run out, the task takes
    the lowest one that met the first condition, provided that it lowers F or that no more than rounding
    could be gained; otherwise it found no step. Where the slope is 0, so is t.

    Each trial costs a gradient. The second condition makes ``s.y`` of a quasi-Newton pair positive.

    Args:
        lr: first step to try, > 0; 1 is the full Newton step.
        c1: fraction of the predicted decrease to require, in (0, c2).
        c2: fraction of the slope that may remain, in (c1, 1): 0.9 for Newton and quasi-Newton
            directions, 0.1 for conjugate gradients.
        max_trials: gradients of the objective before the task gives up.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> phi = torch.tensor([1.0])  # F = phi^2, d = -4: the minimiser is at t = 1/4
        >>> problem = iopt.InnerProblem.bind(lambda phi, theta: phi @ phi, phi, ())
        >>> line = iopt.Line.of(problem, phi, torch.tensor([-4.0]))
        >>> iopt.StrongWolfe(c2=0.1).search(line, torch.tensor(1.0), torch.tensor(-8.0))[0].item()
        0.25

    Source: Nocedal & Wright 2006, algorithms 3.5 and 3.6, equation 3.59.
    """

    _must: ClassVar = dict(lr="be finite and > 0", max_trials="be >= 1")

    lr: float = 1.0
    c1: float = 1e-4
    c2: float = 0.9
    max_trials: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.c1 < self.c2 < 1:
            raise ValueError(
                f"Invalid c1, c2: {self.c1}, {self.c2}: they must satisfy 0 < c1 < c2 < 1"
            )

    def search(self, along: Line, value: Scalars, slope: Scalars) -> Found:
        """See [`Search.search`][implicit_optim.Search.search]; one gradient per trial.

        Raises:
            TypeError: ``along`` has no slopes.
        """
        if not hasattr(along, "value_and_slope"):
            raise TypeError(
                "StrongWolfe needs the slopes along the line: pass an iopt.Line, or search with Armijo()"
            )
        rounding, zero = rounding_of(value), torch.zeros_like(value)
        # A task has the bracket [low, high], in either order, or none yet: then high.t is infinite.
        # low is the lowest trial so far that met the first condition, at first the start itself.
        # end is the trial that completed the bracket; without a bracket, the last one.
        low = end = _Point(zero, value, slope)
        high = _Point(zero + math.inf, value, slope)
        width = zero + math.inf
        t = proposal = torch.where(slope < 0, self.lr, zero)
        found, done = slope == 0, ~(slope < 0)
        for trial in range(self.max_trials):
            if trial > 0:
                if none_running(~done):
                    break
                t = torch.where(done, t, proposal)
            at = _Point(t, *along.value_and_slope(t))
            end = end.replaced(high.t == math.inf, at)
            falls = (at.value <= value + self.c1 * t * slope + rounding) & at.slope.isfinite()
            falls = falls & (at.value > -math.inf) & (at.value <= low.value + rounding)
            met = ~done & falls & (at.slope.abs() <= -self.c2 * slope)
            found, done = found | met, done | met
            # A minimum lies before a trial that is too high, and beyond one that still descends.
            before = falls & (at.slope * (high.t - low.t) >= 0)
            last = low
            high = high.replaced(before, low).replaced(~falls, at)
            low = low.replaced(falls, at)
            width, width_before = (high.t - low.t).abs(), width
            slow = (width > 2 / 3 * width_before) & (width_before < math.inf)
            inside = _between(low, high, rounding, slow)
            proposal = torch.where(high.t < math.inf, inside, _beyond(last, low, rounding))
        if none_running(~found):
            return t, found  # the tensor of the last trial, so that `Line.known` recognises it
        # Could F fall by more than rounding? With the curvature over the first bracket it falls by
        # slope^2 / (2 curvature), and a convex F by no more than slope times the bracket's length.
        level = slope.square() * end.t <= 2 * rounding * (end.slope - slope)
        level = level | ((-slope * end.t <= rounding) & (high.t < math.inf))
        falls = (low.value < value) | (level & (slope < 0))
        return torch.where(found, t, torch.where(falls, low.t, zero)), found | falls


def _between(low: _Point, high: _Point, rounding: Scalars, halve: Tensor) -> Scalars:
    """The next trial inside a bracket."""
    t, gap = _cubic(low, high, rounding), high.t - low.t
    middle = low.t + gap / 2
    ends = low.t + _MARGIN * gap, high.t - _MARGIN * gap
    kept = t.clamp(torch.minimum(*ends), torch.maximum(*ends))
    return torch.where(halve | ~t.isfinite(), middle, kept)


def _beyond(last: _Point, now: _Point, rounding: Scalars) -> Scalars:
    """The next trial without a bracket: the farthest allowed, unless a cubic has its minimum nearer."""
    t = _cubic(last, now, rounding)
    nearest, farthest = now.t + _MARGIN * (now.t - last.t), _GROW * now.t
    return torch.where(t > now.t, torch.minimum(torch.maximum(t, nearest), farthest), farthest)


def _cubic(a: _Point, b: _Point, rounding: Scalars) -> Scalars:
    """Minimiser of the cubic through two values and slopes, NaN where there is none."""
    gap = b.t - a.t
    d1 = a.slope + b.slope - 3 * (b.value - a.value) / gap
    # Values that differ by rounding alone say nothing: use the secant of the slopes instead.
    d1 = torch.where((b.value - a.value).abs() <= rounding, -(a.slope + b.slope) / 2, d1)
    d2 = gap.sign() * (d1.square() - a.slope * b.slope).sqrt()
    return b.t - gap * (b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2)
