"""Batch norm whose second derivative takes a few passes over the batch, where torch's takes thirty.

A Hessian-vector product through ``F.batch_norm`` spends more time there than in the convolutions. The
formula below needs torch's own kernel of the first derivative, once more, and three passes. It stands
in for the layers of a model inside a solve, where only two derivatives are ever taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from implicit_optim._autograd import lead
from implicit_optim._layers._base import fold, is_linear, solving, stand_ins, unfold


class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        w, b = layer.weight, layer.bias
        usable = w is not None and solving(w) and layer.running_mean is None
        if not usable or x.ndim < 2 or x.dtype != w.dtype or x.numel() <= x.shape[1]:
            return super().forward(x)
        layer._check_input_dim(x)
        y, *_ = _BatchNorm.apply(x, w, b, layer.eps)
        return y


BATCH_NORMS = stand_ins(_Layer, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor, p: Tensor, q: Tensor) -> Any:
        """Along cotangents u of dx, p of dweight, q of dbias; mean and r are functions of x."""
        dy, x, w, mean, r, sum_hdy, sum_dy = ctx.saved_tensors

        def c(per_channel: Tensor) -> Tensor:
            return per_channel.reshape(-1, *[1] * (x.ndim - 2))

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
