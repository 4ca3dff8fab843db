"""A module as a function of its parameters, without changing the module."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from implicit_optim._ambient import draw_again, unfused
from implicit_optim._layers import STAND_INS, plainly

# Models that call view on an image whose channels lie side by side.
_PLAIN: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def as_function(model: nn.Module) -> Callable[..., Any]:
    """``(phi, *inputs) -> output`` of one task, which changes nothing of the model.

    Parameters are put into a module for a moment: here into a shallow copy, one for each thread, where
    nobody else sees them. Buffers are copies too: a model that updates them is the same function at
    every evaluation.

    Args:
        model: the module.

    Returns:
        A function of parameters (and buffers) by name, and of the module's inputs.
    """
    if torch.compiler.is_compiling():
        return lambda phi, *inputs: functional_call(model, phi, inputs)
    buffers, views = dict(model.named_buffers()), threading.local()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())

    def forward(phi: dict[str, Tensor], *inputs: Any) -> Any:
        if not hasattr(views, "own"):
            views.own = _View(model)
        state = {name: buffer.clone() for name, buffer in buffers.items()} | phi
        if recurrent:  # these keep a second list of their weights
            with unfused:
                return functional_call(views.own.module, state, inputs)
        return views.own(state, *inputs)

    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return forward
    return lambda phi, *inputs: _in_any_order(model, lambda: forward(phi, *inputs))


def _in_any_order(model: nn.Module, forward: Callable[[], Any]) -> Any:
    """Call the model with images in the order that its convolutions like, if it can do with it."""
    if model not in _PLAIN:
        try:
            return pytree.tree_map_only(Tensor, Tensor.contiguous, forward())
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            _PLAIN.add(model)
            draw_again()
    with plainly():
        return forward()


class _View:
    """A shallow copy that is called with other tensors: ``functional_call`` without its checks."""

    def __init__(self, model: nn.Module) -> None:
        names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self.module = shallow_copy(model, _stand_in)
        self.slots: list[tuple[Any, str, str, Tensor]] = [
            (place, key, names[id(t)], t)
            for module in self.module.modules()
            for place in (module._parameters, module._buffers)
            for key, t in place.items()
            if t is not None
        ]

    def __call__(self, state: dict[str, Tensor], *inputs: Any) -> Any:
        try:
            for place, key, name, own in self.slots:
                place[key] = state.get(name, own)
            return self.module(*inputs)
        finally:
            for place, key, _, own in self.slots:
                place[key] = own


def _stand_in(module: nn.Module) -> nn.Module | None:
    if type(module) not in STAND_INS:
        return None
    copy = shallow(module)
    copy.__class__ = STAND_INS[type(module)]
    return cast(nn.Module, copy)


def shallow_copy(
    model: nn.Module, instead: Callable[[nn.Module], nn.Module | None] = lambda module: None
) -> nn.Module:
    """Another module tree over the same parameters and buffers.

    Args:
        model: the tree; of what torch.compile wraps, the module inside, since the wrapper would not see
            the copies.
        instead: what stands for a module, or ``None`` for its copy.

    Returns:
        The copy.
    """
    made: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            other = instead(module)
            made[id(module)] = copy = shallow(module) if other is None else other
            if other is None:  # after it was made: a circle ends here
                copy._modules.update({k: c and visit(c) for k, c in module._modules.items()})
        return made[id(module)]

    return visit(getattr(model, "_orig_mod", model))


def shallow(module: nn.Module) -> Any:
    """Another module with the same attributes, that has its own places for tensors and children."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = dict(module.__dict__)
    for own in ("_parameters", "_buffers", "_modules", "_forward_pre_hooks"):
        copy.__dict__[own] = type(module.__dict__[own])(module.__dict__[own])
    return copy


class _Nothing:
    """Stands for ``None`` in an output: a tree without leaves, where ``None`` is a leaf to torch."""


_NOTHING = _Nothing()
pytree.register_pytree_node(_Nothing, lambda _: ([], None), lambda _, __: _NOTHING)


def only_tensors(output: Any) -> Any:
    """The output as a tree whose leaves are tensors; `as_returned` is the way back.

    Raises:
        TypeError: it holds something else, a class that is not known as a tree for instance.
    """

    def visit(leaf: Any) -> Any:
        if leaf is None:
            return _NOTHING
        if isinstance(leaf, Tensor):
            return leaf
        name = type(leaf).__name__
        raise TypeError(
            f"the output holds a {name}: predict and curvature=GaussNewton need tensors (or None) in "
            f"dicts, tuples or lists; of a dataclass, call torch.export.register_dataclass({name}) once"
        )

    return pytree.tree_map(visit, output)


def as_returned(output: Any) -> Any:
    """What `only_tensors` was given."""
    nothing = lambda x: isinstance(x, _Nothing)  # noqa: E731
    return pytree.tree_map(lambda x: None if nothing(x) else x, output, is_leaf=nothing)
