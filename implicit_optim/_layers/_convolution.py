"""Convolution with a second derivative that is one convolution_backward.

The map ``(x, W) -> y`` is bilinear, so what torch calls the backward of a convolution is, given other
arguments, the backward of its backward. torch takes another way there, over convolutions with the
output as their kernel, and computes gradients of the data that nobody wants.

On a CPU the channels of a pixel lie side by side (``torch.channels_last``): that is how oneDNN's kernels
like it, and those of batch norm too. The weights of a layer are packed so, its output comes out so, and
the layers behind it keep the order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from implicit_optim._ambient import autocast_is_on
from implicit_optim._autograd import lead
from implicit_optim._batch import is_batched
from implicit_optim._layers._base import fold, is_linear, may_pack, solving, stand_ins, unfold

# stride, padding, dilation, transposed, output_padding, groups
Geometry = tuple[Any, ...]
_aten = torch.ops.aten
# Weights that outnumber the input's numbers by this are not packed: it would take longer than it saves.
SMALL_INPUT = 8


class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        w, zeros = layer.weight, layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
        if not zeros or x.ndim != w.ndim or x.dtype != w.dtype or not len(x):
            return super().forward(x)
        if autocast_is_on(x.device):  # which casts for torch's own layer alone
            return super().forward(x)
        if not is_batched(x):
            x, w = _packed(x, w, 0, layer.stride)
        if not solving(w):
            y: Tensor = layer._conv_forward(x, w, layer.bias)
            return y
        none = (0,) * len(layer.stride)
        geometry = (layer.stride, layer.padding, layer.dilation, False, none, layer.groups)
        return _Convolution.apply(x, w, layer.bias, geometry)


CONVOLUTIONS = stand_ins(_Layer, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _packed(
    x: Tensor, w: Tensor, batch_ndim: int, stride: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The input, and the weights ``[*batch, out, in, *kernel] -> [*batch out, in, *kernel]``.

    Of images in the order for oneDNN, unless they are few beside the weights.
    """
    batched, images = is_batched(w), len(stride) == 2 and w.device.type == "cpu"
    if batched or not images or not may_pack():
        return x, w.flatten(0, batch_ndim)
    if w.numel() > SMALL_INPUT * x.numel():
        return x.contiguous(), w.flatten(0, batch_ndim)
    w = w.movedim(-3, -1).flatten(0, batch_ndim)
    if w.stride(-1) != 1 or not w.is_contiguous():  # of one channel only the stride tells the order
        w = w.clone(memory_format=torch.contiguous_format)
    return x, w.movedim(-1, -3)


class _Convolution(torch.autograd.Function):
    """``(x, weight, bias, geometry) -> y``."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        return _aten.convolution(x, w, b, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, _, ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needed = tuple(ctx.needs_input_grad[:3])
        return (*_Backward.apply(dy, *ctx.saved_tensors, ctx.geometry, needed), None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor, b: Any, geometry: Geometry) -> Any:
        tasks, (*rest, groups) = info.batch_size, geometry
        x, w, b = lead([x, w, b], in_dims[:3], tasks)
        b = None if b is None else b.flatten()
        x, w = _packed(fold(x), w, 1, rest[0])
        y = _Convolution.apply(x, w, b, (*rest, tasks * groups))
        return unfold(y, tasks), 1


class _Backward(torch.autograd.Function):
    """``(dy, x, weight, geometry, needed) -> (dx, dweight, dbias)``, ``None`` where not needed."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, needed: Any) -> Any:
        return _aten.convolution_backward(dy, x, w, [w.shape[0]], *geometry, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.geometry, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor | None, p: Tensor | None, q: Tensor | None) -> Any:
        """Along cotangents u of dx, p of dweight, q of dbias."""
        dy, x, w = ctx.saved_tensors
        if p is not None and p.stride() != w.stride():
            p = torch.empty_like(w).copy_(p)  # packed as w is
        terms = [(u, w), (x, p)]
        terms = [
            (image, kernel) for image, kernel in terms if image is not None and kernel is not None
        ]
        d_dy = None if q is None else q.reshape(-1, *[1] * (dy.ndim - 2)).expand_as(dy)
        for i, (image, kernel) in enumerate(terms):
            more = _aten.convolution(image, kernel, q if i == 0 else None, *ctx.geometry)
            d_dy = more if i == 0 else more.add_(d_dy)
        if is_linear():
            return d_dy, None, None, None, None
        _, of_x, of_w, *_ = ctx.needs_input_grad
        needed = (of_x and p is not None, of_w and u is not None, False)
        d_x = d_w = None
        if any(needed):
            image, kernel = x if u is None else u, w if p is None else p
            rest = _aten.convolution_backward(dy, image, kernel, None, *ctx.geometry, needed)
            d_x, d_w, _ = rest
        return d_dy, d_x, d_w, None, None
