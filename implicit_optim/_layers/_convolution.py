"""Convolution with a second derivative that is one convolution_backward.

The map ``(x, W) -> y`` is bilinear, so what torch calls the backward of a convolution is, given other
arguments, the backward of its backward. torch takes another way there, over convolutions with the
output as their kernel, and computes gradients of the data that nobody wants.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implicit_optim._ambient import autocast_is_on
from implicit_optim._autograd import lead
from implicit_optim._layers._base import fold, is_linear, solving, stand_ins, unfold

# stride, padding, dilation, transposed, output_padding, groups
Geometry = tuple[Any, ...]
_aten = torch.ops.aten


class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        w, zeros = layer.weight, layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
        if not solving() or not zeros or x.ndim != w.ndim or x.dtype != w.dtype or not len(x):
            return super().forward(x)
        if autocast_is_on(x.device):  # which casts for torch's own layer alone
            return super().forward(x)
        none = (0,) * len(layer.stride)
        geometry = (layer.stride, layer.padding, layer.dilation, False, none, layer.groups)
        return _Convolution.apply(x, w, layer.bias, geometry)


CONVOLUTIONS = stand_ins(_Layer, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
        y = _Convolution.apply(fold(x), w.flatten(0, 1), b, (*rest, tasks * groups))
        return unfold(y, tasks), 1


class _Backward(torch.autograd.Function):
    """``(dy, x, weight, geometry, needed) -> (dx, dweight, dbias)``, ``None`` where not needed."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, needed: Any) -> Any:
        if not needed[0] and _gray_on_cpu(x, w):
            return None, *_of_gray_images(dy, x, w, geometry, needed)
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


def _gray_on_cpu(x: Tensor, w: Tensor) -> bool:
    """Whether x are images of one channel whose patches take no more memory than the output."""
    gray = x.ndim == 4 and x.shape[1] == 1
    return gray and x.device.type == "cpu" and w[0].numel() <= len(w)


def _of_gray_images(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, needed: Any
) -> tuple[Tensor | None, Tensor | None]:
    """``(dweight, dbias)`` of images of one channel, twice to four times as fast as oneDNN's."""
    stride, padding, dilation, *_ = geometry
    _, of_w, of_b = needed
    dy = dy.flatten(2)
    patches = F.unfold(x, w.shape[2:], dilation, padding, stride) if of_w else x
    dw = (dy @ patches.mT).sum(0).view_as(w) if of_w else None
    return dw, dy.sum((0, 2)) if of_b else None
