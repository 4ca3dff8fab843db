"""Nonlinear conjugate gradients as a ``torch.optim`` class, with the closure of LBFGS."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._outcome import Status
from implicit_optim._search import Line, Search, StrongWolfe
from implicit_optim._solver import check_search, conjugate_direction, first_length
from implicit_optim._vectors import Layout
from implicit_optim.optim._gd import check_tensor_lr
from implicit_optim.optim._joint import Closure, Joint, Move, Trials, scalar, write

_WOLFE = StrongWolfe(c2=0.1)


class NonlinearCG(Joint):
    """Nonlinear conjugate gradients of Polak and Ribiere, with restarts (PR+).

    ``d = -grad + beta d_last``, ``params <- params + t d`` with t from the search,
    ``beta = max(0, grad . (grad - last grad) / ||last grad||^2)``

    The closure is that of ``torch.optim.LBFGS``: it clears the gradients, computes the loss, calls
    ``backward()`` and returns the loss, of the same data each time it is called. It runs once at the
    start of the step and once a trial of the search; ``.grad`` is what its last call left. A step
    starts again from ``-grad`` where d does not descend, and after a step that was not possible. What
    happened is in ``state`` of the first parameter:

    - ``"n_iter"``: calls of ``step`` so far.
    - ``"grad_norm"``: norm of the gradient at the start of the step.
    - ``"step_length"``: the factor on d; 0 where the parameters were left as they were.
    - ``"status"``: a [`Status`][implicit_optim.Status] code, also as the property ``status``:
      ``SUCCESS``, or ``LINE_SEARCH`` or ``NONFINITE`` where no step was possible.
    - ``"grad"``, ``"direction"``, ``"decrease"``: what the next step needs of this one.

    Args:
        params: parameters or named parameters, in a single group, of one dtype and device. Frozen
            ones are left out; those that the loss does not use stay where they are.
        lr: factor on the first step tried, > 0; a float or a 0-d tensor. A scheduler may change it.
        line_search: how to choose t, in units of the step that promises what the last one did; the
            first one is of length 1 at most. Default: strong Wolfe with a slope of 0.1 left over.
        maximize: ascend instead: minimise minus the loss.

    Raises:
        TypeError: a parameter is complex, or line_search is none.
        ValueError: lr is out of range, or there is more than one group.

    Examples:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> opt = NonlinearCG([x])
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (x.cosh() - torch.tensor([1.0, 2.0]) * x).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(8):
        ...     loss = opt.step(closure)
        >>> [round(v, 3) for v in x.tolist()], opt.status.name  # asinh of 1 and 2
        ([0.881, 1.444], 'SUCCESS')

    Source: Polak & Ribiere 1969; Nocedal & Wright 2006, algorithm 5.4, equations 5.45 and 3.60.
    """

    _settings = ("line_search",)
    _forgotten = ("grad", "direction", "decrease")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float | Tensor = 1.0,
        line_search: Search = _WOLFE,
        maximize: bool = False,
    ) -> None:
        check_tensor_lr(lr)
        check_search(line_search)
        self.line_search = line_search
        super().__init__(params, {"lr": lr, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()``, returns it.

        Returns:
            The loss at the start of the step, a scalar without a graph.

        Raises:
            RuntimeError: there is no closure, or it left no gradients.
            TypeError: it returned something else than a scalar tensor.
            ValueError: the parameters differ in dtype or device.
        """
        if closure is None:
            raise RuntimeError(
                "NonlinearCG needs a closure that calls backward() and returns the loss: "
                "opt.step(closure)"
            )
        params, layout = self._parameters()

        def grad_and_value(flat: Tensor) -> tuple[Tensor, Tensor]:
            write(params, layout, flat)
            return self._evaluate(closure, params, layout)

        grad, value = self._evaluate(closure, params, layout)
        trials = Trials(lambda flat: grad_and_value(flat)[1], grad_and_value)
        propose = partial(self._propose, grad=grad, value=value, trials=trials)
        return self._move(params, layout, grad, value, propose)

    def _propose(self, start: Tensor, grad: Tensor, value: Tensor, trials: Trials) -> Move:
        """Along the conjugate direction, as far as the line search says."""
        state, lr = self._told(), self.param_groups[0]["lr"]
        zero = torch.zeros_like(grad)
        last_grad, last_direction = state.get("grad", zero), state.get("direction", zero)
        if last_grad.shape != grad.shape:  # a parameter was frozen or thawed meanwhile
            last_grad = last_direction = zero
        direction, slope = conjugate_direction(grad, last_grad, last_direction)
        scale = lr * first_length(grad, slope, state.get("decrease", torch.zeros_like(slope)))
        line = Line.of(trials, start, scale * direction)
        t, found = self.line_search.search(line, value, scale * slope)
        if not found:
            return Move(None, 0.0, Status.LINE_SEARCH)
        length = t * scale
        memory = {"grad": grad, "direction": direction, "decrease": length * slope}
        return Move(start + t * line.direction, float(length), Status.SUCCESS, memory)

    def _evaluate(
        self, closure: Closure, params: list[Tensor], layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Gradient and value of what is minimised, from one call of the closure."""
        with torch.enable_grad():
            loss = scalar(closure())
        if all(p.grad is None for p in params):
            raise RuntimeError("the closure left no gradients: call loss.backward() in it")
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        grad, value = layout.ravel([g.to_dense() for g in pieces]), loss.detach()
        grad = grad.clone() if len(pieces) == 1 else grad  # a view of what the next call clears
        return (-grad, -value) if self.param_groups[0]["maximize"] else (grad, value)
