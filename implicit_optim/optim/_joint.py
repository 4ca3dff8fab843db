"""What is common to the ``torch.optim`` classes that move all parameters together, along a line."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from implicit_optim._outcome import Status
from implicit_optim._solver import Evaluation
from implicit_optim._vectors import Layout
from implicit_optim.optim._base import Checked

Closure = Callable[[], Any]


class Proposal(NamedTuple):
    """What a rule wants to do.

    Attributes:
        end: the next parameters, flat; ``None`` to stay.
        length: of the step.
        status: how it went.
        memory: what the next step needs, for ``state``.
    """

    end: Tensor | None
    length: float
    status: Status
    memory: dict[str, Any] = {}


class ClosureLoss(abc.ABC):
    """The loss of a closure, or minus it to maximise, as a function of the flat parameters.

    A line search can evaluate it like an inner problem. Each evaluation leaves the parameters there.
    """

    needs: ClassVar[str]  # what the closure must do

    def __init__(self, optimizer: Joint, closure: Closure | None) -> None:
        if closure is None:
            name = type(optimizer).__name__
            raise RuntimeError(f"{name} needs a closure that {self.needs}: opt.step(closure)")
        self.optimizer, self.closure, self.options = optimizer, closure, optimizer.param_groups[0]
        # Tied parameters are in the list more than once.
        self.params = list(dict.fromkeys(p for p in self.options["params"] if p.requires_grad))
        if not self.params:
            raise RuntimeError("all parameters are frozen: unfreeze one with requires_grad_(True)")
        self.layout = Layout.of(self.params, name="params")

    @abc.abstractmethod
    def gradient(self) -> tuple[Tensor, Tensor]:
        """Gradient, flat, and value at the present parameters."""

    def evaluate(self) -> Evaluation:
        """Value, gradient and, if the rule uses it, curvature at the present parameters."""
        grad, value = self.gradient()
        return Evaluation(value, grad)

    def grad_and_value(self, phi: Tensor, /) -> tuple[Tensor, Tensor]:
        """Gradient, flat, and value at flat parameters."""
        self.write(phi)
        return self.gradient()

    def values(self, phi: Tensor, /) -> Tensor:
        """The value at flat parameters, 0-d."""
        return self.grad_and_value(phi)[1]

    def write(self, phi: Tensor) -> None:
        """Copy flat parameters into the parameters."""
        for p, value in zip(self.params, self.layout.unravel(phi), strict=True):
            p.copy_(value)

    def signed(self, loss: Any) -> Tensor:
        """A loss, or minus it to maximise, 0-d; ``TypeError`` if it is no scalar tensor."""
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            got = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
            raise TypeError(f"the closure must return the loss, a scalar tensor, got {got}")
        return -loss.reshape(()) if self.options["maximize"] else loss.reshape(())


class Joint(Checked, abc.ABC):
    """One group of parameters, one flat vector; the first parameter's state tells what happened."""

    _settings: ClassVar[tuple[str, ...]] = ()  # attributes that are objects: not in state_dict
    _forgotten: ClassVar[tuple[str, ...]] = ()  # entries of state that only the next step may use

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._settings}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the one group of parameters, as the constructor does.

        Raises:
            TypeError: a parameter is complex.
            ValueError: there is a group already.
        """
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} takes one parameter group, because it solves for all "
                "parameters together: give all of them in one list"
            )
        super().add_param_group(param_group)

    @property
    def status(self) -> Status | None:
        """How the last step went, ``None`` before the first; its ``message`` says what to try."""
        code = self._last_step().get("status")
        return None if code is None else Status(code)

    def _last_step(self) -> dict[str, Any]:
        """What the last step left in the state of the first parameter."""
        return self.state.get(self.param_groups[0]["params"][0], {})

    def _take_step(self, loss: ClosureLoss) -> Tensor:
        """Move the parameters to where the rule says, if that is finite, and record what happened.

        Returns:
            The loss at the start.
        """
        at = loss.evaluate()
        assert at.value is not None
        taken = Proposal(None, 0.0, Status.NONFINITE)
        grad_norm = float(torch.linalg.vector_norm(at.grad))
        if math.isfinite(grad_norm) and bool(at.value.isfinite()):
            end = start = loss.layout.ravel(loss.params).clone()
            try:
                proposal = self._propose(start, at, loss)
                if proposal.end is None:
                    taken = proposal
                elif proposal.end.isfinite().all():
                    taken, end = proposal, proposal.end
            finally:  # if the closure raises at a trial point, the parameters must not stay there
                loss.write(end)
        state = self.state[self.param_groups[0]["params"][0]]
        state["n_iter"] = state.get("n_iter", 0) + 1
        state.update(grad_norm=grad_norm, step_length=taken.length, status=int(taken.status))
        for name in self._forgotten:
            state.pop(name, None)
        state.update(taken.memory)
        return -at.value if loss.options["maximize"] else at.value

    @abc.abstractmethod
    def _propose(self, start: Tensor, at: Evaluation, loss: ClosureLoss) -> Proposal:
        """The rule.

        Args:
            start: the parameters, flat.
            at: the loss there; all of it is finite, except perhaps the curvature.
            loss: for trials of other parameters.
        """
