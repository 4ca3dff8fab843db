"""What ``torch.optim`` classes share that move all parameters together, along a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import Optimizer

from implicit_optim._flat import Layout
from implicit_optim._solution import Status
from implicit_optim.optim._gd import check_real

Closure = Callable[[], Any]


class Joint(Optimizer):
    """One group of parameters, one flat vector; what happened is in the first parameter's state."""

    _settings: ClassVar[tuple[str, ...]] = ()  # objects: pickled, not in state_dict

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

    def _tell(self, grad_norm: float, length: float, status: Status) -> dict[str, Any]:
        """Write down what happened."""
        state = self.state[self.param_groups[0]["params"][0]]
        state["n_iter"] = state.get("n_iter", 0) + 1
        state.update(grad_norm=grad_norm, step_length=length, status=int(status))
        return state


def write(params: list[Tensor], layout: Layout, flat: Tensor) -> None:
    """Copy the flat vector into the parameters."""
    for p, value in zip(params, layout.unravel(flat), strict=True):
        p.copy_(value)
