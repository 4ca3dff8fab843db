"""What the library's autograd.Functions share: saving, batching, derivatives by single leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from implicit_optim._torch import forward_mode_enabled, in_transform

Leaves = list[Any]
Function = type[torch.autograd.Function]


def apply(function: Function, compiled: Function, *inputs: Any) -> Any:
    """``function.apply``, or that of its base class while torch.compile traces.

    torch.compile rejects a Function with a ``jvp``, so each keeps its own in a subclass. Without
    gradients the forward alone does: torch 2.13 passes one that ends in ``*tensors`` a context too many.
    """
    if not torch.compiler.is_compiling():
        return function.apply(*inputs)
    return compiled.apply(*inputs) if torch.is_grad_enabled() else compiled.forward(*inputs)


def save(ctx: Any, output: Tensor, leaves: Sequence[Any]) -> None:
    """Keep a Function's output and its leaves, tensors or not, for either mode."""
    ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    tensors = (output, *(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def saved(ctx: Any, *, forward: bool = False) -> tuple[Tensor, Leaves]:
    """What `save` kept; in forward mode without the tangents of the current level."""
    tensors = ctx.saved_tensors
    if forward:
        tensors = [None if t is None else forward_ad.unpack_dual(t).primal for t in tensors]
    output, *leaves = tensors
    return output, [o if t is None else t for t, o in zip(leaves, ctx.others, strict=True)]


@dataclass(frozen=True, eq=False)
class Template:
    """Something made of tensors, without them: what an autograd.Function is given beside its tensors.

    Attributes:
        blank: an inner problem or an operator over no tensors.
        count: how many of its tensors carry the batch dimensions; the others come after them.
    """

    blank: Any
    count: int

    @classmethod
    def of(cls, thing: Any) -> tuple[Template, Leaves]:
        """The template of an inner problem or an operator, and its tensors."""
        own, common = thing.tensors()
        return cls(_blank(thing.with_tensors, own, common), len(own)), [*own, *common]

    def bind(self, tensors: Leaves) -> Any:
        """The thing over these tensors."""
        return self.blank.with_tensors(tensors[: self.count], tensors[self.count :])

    def add_batch(
        self, tensors: Leaves, dims: Sequence[int | None], size: int
    ) -> tuple[Template, Leaves]:
        """The template with one more batch dimension in front, and tensors that have it."""
        n = self.count
        shared = all(dim is None for dim in dims[n:])
        own, common = lead(tensors[:n], dims[:n], size), tensors[n:]
        blank = _blank(partial(self.blank.add_batch, shared=shared), own, common)
        return Template(blank, n), [*own, *(common if shared else lead(common, dims[n:], size))]


def _blank(make: Callable[[Leaves, Leaves], Any], own: Leaves, common: Leaves) -> Any:
    return make([None] * len(own), [None] * len(common))


def lead(tensors: Sequence[Any], dims: Sequence[int | None], size: int) -> Leaves:
    """Give every tensor ``[size, *shape]`` the new batch dimension in front, moved there or as a view.

    Args:
        tensors: tensors, or other leaves, which stay as they are.
        dims: where the batch dimension of each stands, ``None`` for one that has none.
        size: length of the batch dimension.
    """

    def move(t: Any, dim: int | None) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)

    return [move(t, d) for t, d in zip(tensors, dims, strict=True)]


def split_grads(
    fn: Callable[[Leaves], Any],
    leaves: Sequence[Any],
    needed: Sequence[bool],
    cotangent: Any,
    *,
    vjp: Callable[..., Any] | None = None,
) -> list[Tensor | None]:
    """Vector-Jacobian product of ``fn(leaves)`` with respect to the leaves that are needed.

    Args:
        fn: function of the list of leaves.
        leaves: tensors and others.
        needed: which of them want a gradient.
        cotangent: like ``fn``'s value.
        vjp: of a function of a list, at a list. Default: ``torch.func.vjp``.

    Returns:
        One gradient a leaf, ``None`` where none is needed.
    """
    result: list[Tensor | None] = [None] * len(leaves)
    chosen = [i for i, need in enumerate(needed) if need]
    if chosen:
        of_chosen, values = _of_chosen(fn, leaves, chosen)
        if vjp is None:
            _, pull = cast(Any, torch.func.vjp(of_chosen, *values))
        else:
            _, pull = vjp(lambda values: of_chosen(*values), values)
        for i, gradient in zip(chosen, pull(cotangent), strict=True):
            result[i] = gradient
    return result


def push_forward(
    fn: Callable[[Leaves], Any], leaves: Sequence[Any], tangents: Sequence[Tensor | None]
) -> Any:
    """Jacobian-vector product of ``fn(leaves)``, or ``None`` if no leaf moves.

    Args:
        fn: function of the list of leaves.
        leaves: tensors and others.
        tangents: one a leaf, ``None`` for those that do not move.

    Returns:
        The tangent of ``fn``'s value.
    """
    chosen = [i for i, tangent in enumerate(tangents) if tangent is not None]
    if not chosen:
        return None
    of_chosen, values = _of_chosen(fn, leaves, chosen)
    along = [tangents[i] for i in chosen]
    if in_transform():
        return torch.func.jvp(of_chosen, tuple(values), tuple(along))[1]
    # Inside plain dual numbers torch.func.jvp would be a second level, which torch refuses.
    duals = [forward_ad.make_dual(v, t) for v, t in zip(values, along, strict=True)]
    return forward_ad.unpack_dual(of_chosen(*duals)).tangent


def forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Let the ``jvp`` of an autograd.Function be differentiated in forward mode again.

    torch turns forward mode off while it runs such a method: a second, outer tangent would be dropped
    without a word.
    """

    @wraps(jvp)
    def enabled(*args: Any) -> Any:
        with forward_mode_enabled():
            return jvp(*args)

    return enabled


class Foreign(ValueError):
    """Something wants a gradient that is not among what a function depends on.

    Attributes:
        tensor: what it is.
    """

    def __init__(self, tensor: Tensor, name: str | None = None) -> None:
        hidden = (
            f"a tensor of shape {tuple(tensor.shape)} (closed over, or of an earlier evaluation: then "
            "the model keeps a cache of its parameters; many do in eval mode alone, so call .train())"
        )
        name = name or hidden
        super().__init__(
            f"{name} requires grad and takes part in the objective, but is neither in phi, nor in "
            "theta, nor in the data: its gradient would be a part of the true one; pass it in theta, "
            "make it a parameter that adapts, or detach it"
        )
        self.tensor = tensor


def foreign(results: Sequence[Tensor], own: Sequence[Any]) -> Tensor | None:
    """A leaf other than these tensors in which the graph of the results ends, or ``None``."""
    leaves = {id(t) for t in own}
    seen = {t.grad_fn for t in own if isinstance(t, Tensor) and t.grad_fn is not None} | {None}
    ahead: list[Any] = [result.grad_fn for result in results]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in leaves:
            return variable
        ahead.extend(before for before, _ in node.next_functions)
    return None


def check_closed(results: Sequence[Tensor], own: Sequence[Any]) -> None:
    """Raise `Foreign` if the graph of the results ends elsewhere than at these tensors."""
    variable = foreign(results, own)
    if variable is not None:
        raise Foreign(variable)


def _of_chosen(
    fn: Callable[[Leaves], Any], leaves: Sequence[Any], chosen: list[int]
) -> tuple[Callable[..., Any], Leaves]:
    """``fn`` as a function of the chosen leaves alone, and their values."""

    def of_chosen(*values: Tensor) -> Any:
        merged = list(leaves)
        for i, value in zip(chosen, values, strict=True):
            merged[i] = value
        return fn(merged)

    return of_chosen, [leaves[i] for i in chosen]
