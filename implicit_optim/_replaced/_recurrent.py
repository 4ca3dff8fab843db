"""torch lacks it: fused recurrent kernels have no second derivative; those that torch composes have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from implicit_optim._ambient import unfused


def _composed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        with unfused:
            return function(*args, **settings)

    return call


ENTRIES: dict[Callable[..., Any], Callable[..., Any]] = {
    f: _composed(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
}
