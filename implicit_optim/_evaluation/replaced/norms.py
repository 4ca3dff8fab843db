"""Batch, instance, layer and group norm: each is one of numbers over channels.

torch is wrong: third derivatives of batch and instance norm raise, those of layer norm are silently
wrong, as are second ones where the first is taken inside of ``vmap``, and group norm's in a batch before
torch 2.14; of given statistics there are none. Ours is faster: a Hessian-vector product through
``F.batch_norm`` takes about thirty passes over the batch, the formula below torch's own kernel of the
first derivative, once more, and three passes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_optim._evaluation.autograd import lead
from implicit_optim._evaluation.replaced.table import replaces_by_name
from implicit_optim._evaluation.replaced.when import Way, fold, is_linear, note_leaf, unfold, way
from implicit_optim._evaluation.running_stats import check_not_updated


@replaces_by_name(F.batch_norm)
def batch_norm(f: Any) -> Any:
    """``F.batch_norm`` of these arguments."""
    check_not_updated(f.running_mean, f.training)
    if f.running_mean is not None:
        return _by_statistics(f)
    x, weight, bias = f.input, f.weight, f.bias
    if not f.training or x.ndim < 2 or x.numel() <= x.shape[1]:
        return NotImplemented
    how = way(x) if weight is None else way(x, weight)
    if how is Way.TORCH or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    if how is Way.OURS and weight is not None and bias is not None:
        return _BatchNorm.apply(x, weight, bias, f.eps)[0]
    return _affine(_normalised(x, f.eps, how), weight, bias)


@replaces_by_name(F.instance_norm)
def instance_norm(f: Any) -> Any:
    """``F.instance_norm`` of these arguments."""
    check_not_updated(f.running_mean, f.use_input_stats)
    if f.running_mean is not None:
        return _by_statistics(f)
    x, how = f.input, _own_way(f.input)
    if how is Way.TORCH or x.ndim < 3 or x.shape[2:].numel() < 2:
        return NotImplemented
    y = _normalised(x.flatten(0, 1)[None], f.eps, how).reshape(x.shape)
    return _affine(y, f.weight, f.bias)


@replaces_by_name(F.layer_norm)
def layer_norm(f: Any) -> Any:
    """``F.layer_norm`` of these arguments."""
    x, how, shape = f.input, _own_way(f.input), f.normalized_shape
    odd = isinstance(shape, int) or not shape or x.shape[-len(shape) :] != tuple(shape)
    if how is Way.TORCH or odd or x.numel() == 0:
        return NotImplemented
    rows = x.reshape(1, -1, math.prod(shape))
    y = _normalised(rows, f.eps, how).reshape(x.shape)
    y = y if f.weight is None else y * f.weight
    return y if f.bias is None else y + f.bias


@replaces_by_name(F.group_norm)
def group_norm(f: Any) -> Any:
    """``F.group_norm`` of these arguments."""
    x, how = f.input, _own_way(f.input)
    if how is Way.TORCH or x.numel() == 0 or x.shape[1] % f.num_groups:
        return NotImplemented
    rows = x.reshape(1, len(x) * f.num_groups, -1)
    return _affine(_normalised(rows, f.eps, how).reshape(x.shape), f.weight, f.bias)


def _own_way(x: Tensor) -> Way:
    """Of norms whose kernels are silently wrong in a third derivative, which a model may take itself."""
    how = way(x)
    return Way.OURS if how is Way.TORCH and torch.is_grad_enabled() else how


def _along_channels(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (x.ndim - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * _along_channels(weight, x)
    return x if bias is None else x + _along_channels(bias, x)


def _by_statistics(f: Any) -> Tensor:
    """Normalisation by given statistics, differentiable in them, which torch's is not."""
    scale = (f.running_var + f.eps).rsqrt()
    scale = scale if f.weight is None else scale * f.weight
    moved = f.running_mean * scale
    return _affine(f.input, scale, -moved if f.bias is None else f.bias - moved)


def _normalised(x: Tensor, eps: float, how: Way) -> Tensor:
    """``(x - mean) / std`` over the batch ``[N, C, ...]``, channel by channel."""
    if how is Way.OURS:
        one = x.new_ones(x.shape[1])
        return _BatchNorm.apply(x, one, torch.zeros_like(one), eps)[0]
    dims = [d for d in range(x.ndim) if d != 1]
    x = x - x.mean(dims, keepdim=True)
    return x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()


class _BatchNorm(torch.autograd.Function):
    """``(x, weight, bias, eps) -> (y, mean, 1 / std)`` with the statistics of the batch."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Any:
        return torch.native_batch_norm(x, w, b, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, _, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(x, w, mean, r)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        return (*_Backward.apply(dy, *ctx.saved_tensors, ctx.eps), None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Any:
        tasks = info.batch_size
        x, w, b = lead([x, w, b], in_dims[:3], tasks)
        y, *stats = _BatchNorm.apply(fold(x), w.flatten(), b.flatten(), eps)
        return (unfold(y, tasks), *(s.unflatten(0, (tasks, -1)) for s in stats)), (1, 0, 0)


def _kernel(dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
    mask = [True, True, True]
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(dy, x, w, None, None, mean, r, True, eps, mask)


def _dot(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Sum of ``u v`` in each channel, in one pass: the kernel's ``m E[h u]`` with v in h's place."""
    mean, r, mask = torch.zeros_like(w), torch.ones_like(w), [False, True, False]
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(u, v, w, None, None, mean, r, True, 0.0, mask)[1]


class _Backward(torch.autograd.Function):
    r"""``(dy, x, weight, mean, r, eps) -> (dx, dweight, dbias)``.

    With ``h = r (x - mean)``, ``a = weight r`` and the mean E over the batch, channel by channel:
    ``dx = a (dy - E dy - h E[h dy])``, ``dweight = m E[h dy]``, ``dbias = m E dy``.
    """

    @staticmethod
    def forward(dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
        return _kernel(dy, x, w, mean, r, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, u: Tensor, p: Tensor, q: Tensor) -> Any:
        """Along cotangents u of dx, p of dweight, q of dbias; mean and r are functions of x."""
        dy, x, w, mean, r, sum_hdy, sum_dy = ctx.saved_tensors
        if torch.is_grad_enabled() and not is_linear():  # a third derivative may follow
            return (*_differentiable(dy, x, w, (u, p, q), ctx.eps), None, None, None)

        def c(per_channel: Tensor) -> Tensor:
            return _along_channels(per_channel, x)

        # The map dy -> dx is symmetric: u goes the same way. As in torch's own kernels h is never made:
        # what is linear in it is linear in x.
        d_dy, sum_hu, sum_u = _kernel(u, x, w, mean, r, ctx.eps)
        d_dy.addcmul_(x, c(p * r)).add_(c(q - p * r * mean))
        if is_linear():
            return d_dy, None, None, None, None, None
        m = x.numel() // x.shape[1]
        hu, mu, hdy, mdy = sum_hu / m, sum_u / m, sum_hdy / m, sum_dy / m
        a, udy = w * r, _dot(u, dy, w) / m
        covariance = udy - mu * mdy - hu * hdy
        # m a covariance = <u, dx>: differentiate through h, with cotangent k_u u + k_dy dy, and a.
        k_u, k_dy = -a * hdy, p - a * hu
        along_x = -r.square() * (k_u * hu + k_dy * hdy + a * covariance)
        constant = -r * (k_u * mu + k_dy * mdy) - along_x * mean
        d_x = torch.addcmul(c(constant), x, c(along_x))
        d_x.addcmul_(u, c(r * k_u)).addcmul_(dy, c(r * k_dy))
        return d_dy, d_x, m * r * covariance, None, None, None


def _differentiable(dy: Tensor, x: Tensor, w: Tensor, along: Any, eps: float) -> Any:
    """The same by differentiating the formula twice, with a graph for any further derivative."""
    dy, x, w = (t.view_as(t) for t in (dy, x, w))  # so that each is reached through its alias alone
    b = torch.zeros_like(w)
    for t in (dy, x, w, b):
        if not t.requires_grad:
            note_leaf(t.requires_grad_())
    y = _affine(_normalised(x, eps, Way.WRITTEN_OUT), w, b)
    slopes = torch.autograd.grad(y, (x, w, b), dy, create_graph=True)
    return torch.autograd.grad(slopes, [dy, x, w], along, create_graph=True, materialize_grads=True)
