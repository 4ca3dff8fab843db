"""What normalisation by running statistics means while a model adapts.

The unit is the function, ``F.batch_norm`` or ``F.instance_norm``, told by the buffers that it is given:
whatever layer calls it, and with whatever hooks, is the user's.
"""

import enum
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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


# How each is told to take the statistics of what it normalises.
_BY_BATCH: dict[Callable[..., Any], str] = {
    F.batch_norm: "training",
    F.instance_norm: "use_input_stats",
}
_ARGUMENTS = {function: tuple(inspect.signature(function).parameters) for function in _BY_BATCH}


class Policy(TorchFunctionMode):
    """Tells the functions that are given running statistics which ones to take; none are updated.

    Args:
        by_batch: those of what is normalised, or the given ones.
        names: of the model's buffers, by their identity in this call.
        seen: where the statistics of what is normalised are left, by name; ``None`` if nobody asks.
    """

    def __init__(
        self, by_batch: bool, names: dict[int, str], seen: dict[str, Tensor] | None = None
    ) -> None:
        self.by_batch, self.names, self.seen = by_batch, names, seen

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _BY_BATCH:
            return func(*args, **(kwargs or {}))
        told = dict(zip(_ARGUMENTS[func], args, strict=False)) | (kwargs or {})
        if told.get("running_mean") is not None:
            if self.seen is not None:
                self._see(told["running_mean"], told["input"], self.seen, func is F.instance_norm)
            told[_BY_BATCH[func]] = self.by_batch
            if self.by_batch:
                told["running_mean"] = told["running_var"] = None
        return func(**told)

    def _see(self, running_mean: Tensor, x: Tensor, seen: Any, of_each_example: bool) -> None:
        name = self.names.get(id(running_mean))
        if name is None:
            return
        if name in seen:
            layer = name.removesuffix("running_mean").removesuffix(".") or "the model"
            raise ValueError(
                f"{layer} is called twice in one forward pass: RunningStats.PER_TASK cannot tell the "
                "two apart; use RunningStats.BATCH"
            )
        var, mean = torch.var_mean(x, [d for d in range(of_each_example, x.ndim) if d != 1])
        if of_each_example:
            var, mean = var.mean(0), mean.mean(0)
        seen[name], seen[name.removesuffix("mean") + "var"] = mean, var


def check_not_updated(running_mean: Tensor | None, training: bool) -> None:
    """Raise ``ValueError`` if a function with these arguments would update running statistics."""
    if running_mean is not None and training:
        raise ValueError(
            "a normalisation would update its running statistics while the model adapts, mixing the "
            "tasks: choose running_stats=iopt.RunningStats.BATCH, FROZEN or PER_TASK of a MetaLearner, "
            "call .eval(), or build the layer with track_running_stats=False"
        )


def check_statistics(model: nn.Module, policy: RunningStats | None) -> None:
    """Raise ``ValueError`` where a layer would update its statistics and no policy was chosen."""
    for name, module in model.named_modules() if policy is None else ():
        if module.training and isinstance(getattr(module, "running_mean", None), Tensor):
            raise ValueError(
                f"{name or 'model'} ({type(module).__name__}) would update its running statistics while "
                "it adapts, mixing the tasks: choose running_stats=iopt.RunningStats.BATCH, FROZEN or "
                "PER_TASK, or build the layer with track_running_stats=False"
            )


def statistics_needed(model: nn.Module, phi: Any) -> set[str]:
    """Names of the statistics that belong to those in phi; of all layers if there are none.

    A layer that ``forward`` leaves out has none.
    """
    ends = ("running_mean", "running_var")
    told = [name for name in phi if name.endswith(ends)]
    names = told or [name for name, _ in model.named_buffers() if name.endswith(ends)]
    return {f"{name.rsplit('running_', 1)[0]}{end}" for name in names for end in ends}
