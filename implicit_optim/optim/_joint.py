"""What ``torch.optim`` classes share that move all parameters together, along a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from implicit_optim._outcome import Status
from implicit_optim._vectors import Layout
from implicit_optim.optim._gd import check_real

Closure = Callable[[], Any]


class Move(NamedTuple):
    """What a rule proposes: where to go (``None``: stay), how far, how it went, what to remember."""

    end: Tensor | None
    length: float
    status: Status
    memory: dict[str, Any] = {}  # for the state


class Trials(NamedTuple):
    """What is minimised, of flat parameters that are tried: as a line search asks an inner problem."""

    values: Callable[[Tensor], Tensor]
    grad_and_value: Callable[[Tensor], tuple[Tensor, Tensor]]


class Joint(Optimizer):
    """One group of parameters, one flat vector; what happened is in the first parameter's state."""

    _settings: ClassVar[tuple[str, ...]] = ()  # objects: pickled, not in state_dict
    _forgotten: ClassVar[
        tuple[str, ...]
    ] = ()  # of the state: what a step leaves for the next alone

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._settings}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

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
        check_real(self, self.param_groups[0]["params"])

    @property
    def status(self) -> Status | None:
        """How the last step went, ``None`` before the first; its ``message`` says what to try."""
        code = self._told().get("status")
        return None if code is None else Status(code)

    def _told(self) -> dict[str, Any]:
        """What is known of the last step, in the state of the first parameter."""
        return self.state.get(self.param_groups[0]["params"][0], {})

    def _parameters(self) -> tuple[list[Tensor], Layout]:
        """Those that are not frozen, each once, and how they lie in the flat vector."""
        params = self.param_groups[0]["params"]
        params = list(dict.fromkeys(p for p in params if p.requires_grad))
        if not params:
            raise RuntimeError("all parameters are frozen: unfreeze one with requires_grad_(True)")
        return params, Layout.of(params, name="params")

    def _move(
        self,
        params: list[Tensor],
        layout: Layout,
        grad: Tensor,
        value: Tensor,
        propose: Callable[[Tensor], Move],
    ) -> Tensor:
        """Move the parameters to where the rule says, if that is finite, and write down what happened.

        Args:
            params: the parameters.
            layout: how they lie in the flat vector.
            grad: gradient of what is minimised, where they are.
            value: what is minimised, there.
            propose: the rule, of the flat parameters; it may try others.

        Returns:
            The loss at the start.
        """
        move, grad_norm = Move(None, 0.0, Status.NONFINITE), float(torch.linalg.vector_norm(grad))
        if math.isfinite(grad_norm) and bool(value.isfinite()):
            end = start = layout.ravel(params).clone()
            try:
                proposed = propose(start)
                if proposed.end is None:
                    move = proposed
                elif proposed.end.isfinite().all():
                    move, end = proposed, proposed.end
            finally:  # also where the closure raises: the parameters never stay at a trial point
                write(params, layout, end)
        state = self.state[self.param_groups[0]["params"][0]]
        state["n_iter"] = state.get("n_iter", 0) + 1
        state.update(grad_norm=grad_norm, step_length=move.length, status=int(move.status))
        for name in self._forgotten:
            state.pop(name, None)
        state.update(move.memory)
        return -value if self.param_groups[0]["maximize"] else value


def scalar(loss: Any) -> Tensor:
    """The loss that a closure returned, 0-d; raise ``TypeError`` if it is no scalar tensor."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
        raise TypeError(f"the closure must return the loss, a scalar tensor, got {got}")
    return loss.reshape(())


@torch.no_grad()
def write(params: list[Tensor], layout: Layout, flat: Tensor) -> None:
    """Copy the flat vector into the parameters."""
    for p, value in zip(params, layout.unravel(flat), strict=True):
        p.copy_(value)
