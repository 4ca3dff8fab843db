"""ReLU whose second derivative is one mask: torch's adds a batch of zeros to the input's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from implicit_optim._layers._base import is_taken_twice, stand_ins


class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        if layer.inplace or not is_taken_twice():
            return super().forward(x)
        y: Tensor = _ReLU.apply(x)
        return y


RELUS = stand_ins(_Layer, nn.ReLU)


class _ReLU(torch.autograd.Function):
    """``x -> y``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Backward.apply(dy, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return _ReLU.apply(x), in_dims[0]


class _Backward(torch.autograd.Function):
    """``(dy, y) -> dx``, which does not change with y where it has a derivative."""

    @staticmethod
    def forward(dy: Tensor, y: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(dy, y, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(u, y, 0), None
