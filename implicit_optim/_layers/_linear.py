"""A linear layer that vmap does not take apart.

Of torch's, vmap makes a product, a sum and a multiple of the bias by 1, each with its own derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from implicit_optim._ambient import autocast_is_on
from implicit_optim._batch import is_batched
from implicit_optim._layers._base import solving, stand_ins


class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        w, b = layer.weight, layer.bias
        usable = solving(w) and is_batched(w) and b is not None and x.ndim == 2
        if not usable or autocast_is_on(x.device):
            return super().forward(x)
        return torch.mm(x, w.t()) + b


LINEARS = stand_ins(_Layer, nn.Linear)
