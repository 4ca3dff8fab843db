"""torch lacks it: fused kernels have no second derivative; those that torch composes have.

Recurrent layers and attention. Under vmap the fused ones have no batching rule either.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from implicit_optim._evaluation.kernels import plain_attention, unfused
from implicit_optim._evaluation.replaced.table import TABLE
from implicit_optim._evaluation.replaced.when import Way, way
from implicit_optim._torch import is_batched


def _unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **settings: Any) -> Any:
        with unfused:
            return function(*args, **settings)

    return call


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(query: Any, *args: Any, **settings: Any) -> Any:
        fused = way(query) is Way.TORCH and not is_batched(query)
        if fused or torch.compiler.is_compiling():
            return NotImplemented
        with plain_attention:
            return function(query, *args, **settings)

    return call


_ATTENTION: Any = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
_RECURRENT: Any = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
TABLE.update({f: _plain(f) for f in _ATTENTION} | {f: _unfused(f) for f in _RECURRENT})
