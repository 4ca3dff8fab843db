"""Nonlinear conjugate gradients as a ``torch.optim`` class, with the closure of LBFGS."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from implicit_optim._outcome import Status
from implicit_optim._search import Search, StrongWolfe
from implicit_optim._solver import Evaluation, NonlinearCgState, conjugate_step, move, nonlinear_cg
from implicit_optim.optim._joint import Closure, ClosureLoss, Joint, Proposal

_WOLFE = StrongWolfe(c2=0.1)


class BackwardLoss(ClosureLoss):
    """The loss of a closure that calls ``backward()`` itself."""

    needs = "calls backward() and returns the loss"

    def gradient(self) -> tuple[Tensor, Tensor]:
        """See `ClosureLoss.gradient`; a search has no cheaper values, since a closure does all."""
        with torch.enable_grad():
            value = self.signed(self.closure()).detach()
        if all(p.grad is None for p in self.params):
            raise RuntimeError("the closure left no gradients: call loss.backward() in it")
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        grad = self.layout.ravel([g.to_dense() for g in pieces])
        if self.options["maximize"]:
            return -grad, value
        # That of a single parameter is a view of its .grad, which the next call clears.
        return grad.clone() if len(pieces) == 1 else grad, value


class NonlinearCG(Joint):
    """Nonlinear conjugate gradients of Polak and Ribiere, with restarts (PR+).

    ``d = -grad + beta d_last``, ``params <- params + t d`` with t from the search,
    ``beta = max(0, grad . (grad - last grad) / ||last grad||^2)``

    The closure is that of ``torch.optim.LBFGS``: it clears the gradients, computes the loss, calls
    ``backward()`` and returns the loss, of the same data in every call. It runs once at the start of the
    step and once per trial of the search; ``.grad`` is what its last call left. The method restarts from
    ``-grad`` where d is no descent direction, and after a step that was not possible. The ``state`` of
    the first parameter tells what happened:

    - ``"n_iter"``: calls of ``step`` so far.
    - ``"grad_norm"``: norm of the gradient at the start of the step.
    - ``"step_length"``: the factor on d; 0 where the parameters were left as they were.
    - ``"status"``: a [`Status`][implicit_optim.Status] code, also as the property ``status``:
      ``SUCCESS``, or ``NO_DESCENT`` or ``NONFINITE`` where no step was possible.
    - ``"grad"``, ``"direction"``, ``"decrease"``: what the next step needs from this one.

    Args:
        params: parameters or named parameters, in a single group, of one dtype and device. Frozen
            ones are left out; those that the loss does not use stay where they are.
        lr: factor on the first step tried, > 0; a float or a 0-d tensor. A scheduler may change it.
        line_search: chooses t, as a multiple of the step that to first order lowers the loss as much as
            the last one did; the first moves by 1 at most. Default: strong Wolfe with ``c2 = 0.1``.
        maximize: ascend instead: minimise minus the loss.

    Raises:
        TypeError: a parameter is complex, or line_search is no line search.
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
        self.line_search = nonlinear_cg(line_search=line_search).line_search  # which checks it
        super().__init__(params, dict(lr=lr, maximize=maximize))

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
        return self._take_step(BackwardLoss(self, closure))

    def _propose(self, start: Tensor, at: Evaluation, loss: ClosureLoss) -> Proposal:
        """Along the conjugate direction, as far as the line search says."""
        state, last = self._last_step(), NonlinearCgState.zero(start)
        last = last._replace(decrease=state.get("decrease", last.decrease))
        # Frozen or unfrozen parameters change the shapes: then there is nothing to be conjugate to.
        if "grad" in state and state["grad"].shape == start.shape:
            last = last._replace(grad=state["grad"], direction=state["direction"])
        direction, slope, length = conjugate_step(at.grad, last)
        scale = self.param_groups[0]["lr"] * length
        moved = move(loss, start, at, scale * direction, scale * slope, self.line_search)
        if not moved.found:
            return Proposal(None, 0.0, Status.NO_DESCENT)
        length = moved.length * scale
        memory = dict(grad=at.grad, direction=direction, decrease=length * slope)
        return Proposal(moved.end, float(length), Status.SUCCESS, memory)
