"""What layers that track running statistics (batch norm) do while a model adapts.

The user's module is never changed: a policy looks at it through a shallow copy of the module tree, in
which those layers are other objects; parameters are shared.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from implicit_optim._module import shallow, shallow_copy


class RunningStats(enum.Enum):
    """Which statistics normalisation layers use that track running ones, in training mode or not.

    Attributes:
        BATCH: those of the batch at hand, support or query; a task's query examples are normalised
            together (transductive). The running statistics are neither read nor written.
        FROZEN: the running ones, as they are.
        PER_TASK: those of the task's support set: of the batch at hand while it adapts, of the support
            set under the adapted parameters for the query (not transductive). ``adapt`` returns them
            beside the parameters; gradients flow through them.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
        >>> meta = iopt.MetaLearner(
        ...     model,
        ...     torch.nn.functional.mse_loss,
        ...     solver=iopt.gd(lr=0.1, max_steps=2),
        ...     running_stats=iopt.RunningStats.PER_TASK,
        ... )
        >>> phi = meta.adapt((torch.randn(4, 5, 3), torch.randn(4, 5, 1)))
        >>> phi["0.running_mean"].shape, model[0].num_batches_tracked.item()
        (torch.Size([4, 3]), 0)

    Source: Bronskill et al. 2020, "TaskNorm", section 3 (conventional, transductive and per-task).
    """

    BATCH = enum.auto()
    FROZEN = enum.auto()
    PER_TASK = enum.auto()


def tracking(model: nn.Module) -> dict[str, _NormBase]:
    """The layers that track running statistics, by name."""
    return {name: module for name, module in model.named_modules() if _tracks(module)}


def _tracks(module: nn.Module) -> TypeGuard[_NormBase]:
    return isinstance(module, _NormBase) and module.running_mean is not None


def check_statistics(model: nn.Module, policy: RunningStats | None) -> None:
    """Raise ``ValueError`` where a layer would update its statistics and no policy was chosen."""
    for name, module in tracking(model).items() if policy is None else ():
        if module.training:
            raise ValueError(
                f"{name or 'model'} ({type(module).__name__}) would update its running statistics while "
                "it adapts, mixing the tasks: choose running_stats=iopt.RunningStats.BATCH, FROZEN or "
                "PER_TASK, or build the layer with track_running_stats=False"
            )


def adapting(model: nn.Module, policy: RunningStats | None) -> nn.Module:
    """The model as it adapts."""
    if policy is None:
        return model
    return _with_norms(model, _frozen if policy is RunningStats.FROZEN else _of_the_batch)


def predicting(model: nn.Module, policy: RunningStats | None) -> nn.Module:
    """The model as it predicts with what was adapted; PER_TASK expects statistics as buffers."""
    if policy is not RunningStats.PER_TASK:
        return adapting(model, policy)
    return _with_norms(model, _Given)


def statistics(model: nn.Module, forward: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Mean and unbiased variance of what each layer that tracks them sees during ``forward``."""
    seen: dict[str, Tensor] = {}

    def listen(name: str, layer: nn.Module) -> None:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            space = list(range(2, x.ndim))
            over = space if isinstance(layer, _InstanceNorm) else [0, *space]
            var, mean = torch.var_mean(x, over)
            if isinstance(layer, _InstanceNorm):
                var, mean = var.mean(0), mean.mean(0)
            if f"{name}running_mean" in seen:
                raise ValueError(
                    f"{name[:-1] or 'model'} is called twice in one forward pass: RunningStats.PER_TASK "
                    "cannot tell the two apart; use RunningStats.BATCH"
                )
            seen[f"{name}running_mean"], seen[f"{name}running_var"] = mean, var

        layer.register_forward_pre_hook(hook)

    view = _with_norms(model, _of_the_batch)
    for name in tracking(model):
        listen(f"{name}." if name else "", view.get_submodule(name))
    forward(view)
    return seen


def _of_the_batch(layer: _NormBase) -> nn.Module:
    copy = shallow(layer)
    copy.training, copy.track_running_stats = True, False
    copy._buffers.update(running_mean=None, running_var=None, num_batches_tracked=None)
    return copy


def _frozen(layer: _NormBase) -> nn.Module:
    copy = shallow(layer)
    copy.training = False
    return copy


class _Given(nn.Module):
    """Normalisation by its buffers, differentiable in them, which ``F.batch_norm`` is not."""

    def __init__(self, layer: _NormBase) -> None:
        super().__init__()
        self.eps = layer.eps
        self._parameters, self._buffers = dict(layer._parameters), dict(layer._buffers)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.ndim - 2)
        given = self._buffers | self._parameters
        mean, var = given["running_mean"], given["running_var"]
        assert mean is not None and var is not None
        normal = (x - mean.reshape(shape)) * (var + self.eps).rsqrt().reshape(shape)
        weight, bias = given["weight"], given["bias"]
        if weight is not None:
            normal = normal * weight.reshape(shape)
        return normal if bias is None else normal + bias.reshape(shape)


def _with_norms(model: nn.Module, norm: Callable[[Any], nn.Module]) -> nn.Module:
    """The model with other layers in place of those that track running statistics."""
    return shallow_copy(model, lambda module: norm(module) if _tracks(module) else None)
