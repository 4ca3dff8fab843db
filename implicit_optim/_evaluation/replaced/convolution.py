"""Convolutions and linear layers.

Ours is faster: a convolution with a second derivative that is one convolution_backward.

The map ``(x, W) -> y`` is bilinear, so what torch calls the backward of a convolution is, given other
arguments, the backward of its backward. torch takes another way there, over convolutions with the
output as their kernel, and computes gradients of the data that nobody wants. Under vmap the tasks become
groups of one call. Both functions are made of differentiable operations, so that any number of
derivatives is right. And torch is wrong: under vmap a convolution does not see autocast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_optim._evaluation.autograd import lead
from implicit_optim._evaluation.precision import autocast_is_on
from implicit_optim._evaluation.replaced.table import replaces
from implicit_optim._evaluation.replaced.when import Way, fold, is_linear, unfold, way
from implicit_optim._torch import is_batched

# stride, padding, dilation, transposed, output_padding, groups
Geometry = tuple[Any, ...]
_aten = torch.ops.aten


@replaces(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``x W^T + b`` under vmap: torch multiplies b by 1 and, which is wrong, does not see autocast."""
    if bias is None or torch.compiler.is_compiling() or not is_batched(weight):
        return NotImplemented
    if autocast_is_on(input.device):
        product = torch.matmul(input, weight.t())
        return product + bias.to(product.dtype)
    if input.ndim != 2 or way(weight) is not Way.OURS:
        return NotImplemented
    return torch.mm(input, weight.t()) + bias


_TORCHS = (F.conv1d, F.conv2d, F.conv3d)


@replaces(*_TORCHS)
def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    x, w, sides = input, weight, weight.ndim - 2
    if torch.compiler.is_compiling():
        return NotImplemented
    if autocast_is_on(x.device):
        if not is_batched(w):
            return NotImplemented
        dtype = torch.get_autocast_dtype(x.device.type)
        b = None if bias is None else bias.to(dtype)
        return _TORCHS[sides - 1](x.to(dtype), w.to(dtype), b, stride, padding, dilation, groups)
    usable = x.ndim == w.ndim and x.dtype == w.dtype and len(x) > 0 and not isinstance(padding, str)
    if not usable or way(x, w) is not Way.OURS:
        return NotImplemented
    stride, padding, dilation = (_each_side(v, sides) for v in (stride, padding, dilation))
    return _Convolution.apply(x, w, bias, (stride, padding, dilation, False, (0,) * sides, groups))


def _each_side(value: Any, sides: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * sides if len(value) == 1 else value


def _all_groups(w: Tensor) -> Tensor:
    """Weights ``[T, out, in, *kernel] -> [T out, in, *kernel]``, in the memory format that they have."""
    if w.ndim == 5 and w.stride(-3) == 1 and w.stride(-1) != 1:  # channels_last
        return w.movedim(-3, -1).flatten(0, 1).movedim(-1, -3)
    return w.flatten(0, 1)


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
        y = _Convolution.apply(fold(x), _all_groups(w), b, (*rest, tasks * groups))
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
        of_x, of_w = of_x and p is not None, of_w and u is not None
        d_x = d_w = None
        if of_x or of_w:
            image, kernel = x if u is None else u, w if p is None else p
            needed = (of_x, of_w, False)
            rest = _aten.convolution_backward(dy, image, kernel, None, *ctx.geometry, needed)
            d_x, d_w, _ = rest
        return d_dy, d_x, d_w, None, None
