"""A learner's loss: a function, or a module whose parameters are meta-parameters that do not adapt.

They are passed beside the target as data of every task, so that they receive their whole gradient, both
directly and through phi.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from implicit_optim._evaluation import AsFunction, trainable

Loss = Callable[[Any, Any], Tensor]


class _Target(NamedTuple):
    parameters: dict[str, Tensor]
    target: Any


def loss_function(loss: Loss) -> Loss:
    """The loss as a function of what `with_parameters` made of the target."""
    if not isinstance(loss, nn.Module) or not [*loss.parameters(), *loss.buffers()]:
        return loss
    module = AsFunction(loss)

    def of_target(output: Any, target: Any) -> Tensor:
        own, target = target if isinstance(target, _Target) else ({}, target)
        result: Tensor = module.call(own, (output, target), {})
        return result

    return of_target


def with_parameters(loss: Loss, episode: tuple[Any, ...], tasks: int) -> tuple[Any, ...]:
    """The episode with the loss's parameters ``[T, *shape]`` beside its target, if it has any."""
    own = trainable(loss) if isinstance(loss, nn.Module) else {}
    if not own:
        return tuple(episode)
    *inputs, target = episode
    return *inputs, _Target({k: p.expand(tasks, *p.shape) for k, p in own.items()}, target)
