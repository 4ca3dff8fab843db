"""Everything private of torch's that the library uses, each name once.

All were seen to work with torch 2.13.0 and 2.14.1; a function says which public one would replace it.
(``torch._foreach_*``, the operations of all torch optimizers, stay in `optim/`.)
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.optim.optimizer import _default_to_fused_or_foreach
from torch.utils import _pytree as pytree  # public one: a documented torch.utils.pytree
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

__all__ = ["hardsigmoid", "outside_transforms", "pytree", "weight_norm"]

# F.hardsigmoid calls the first, both APIs for weight norm the second.
hardsigmoid, weight_norm = torch._C._nn.hardsigmoid, torch._weight_norm

# A context in which no transform is active. Public one: none.
outside_transforms = temporarily_clear_interpreter_stack


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is active. Public one: none."""
    return peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """Whether dual numbers are. Public one: none."""
    return forward_ad._current_level >= 0


def in_nothing_but_vmap() -> bool:
    """Whether nothing but ``vmap`` stands between an operation and plain autograd. Public one: none."""
    stack = get_interpreter_stack() or ()
    return not in_forward_mode() and all(i.key() == TransformType.Vmap for i in stack)


def forward_mode_enabled() -> contextlib.AbstractContextManager[Any]:
    """Forward mode on, which torch turns off inside a ``jvp`` of a Function. Public one: none."""
    return forward_ad._set_fwd_grad_enabled(True)


def is_batched(x: Tensor) -> bool:
    """Whether ``vmap`` stands between a tensor and its numbers. Public one: none."""
    if is_legacy_batchedtensor(x):  # autograd.grad(is_grads_batched=True)
        return True
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def unbatched(x: Tensor) -> Tensor:
    """The tensor ``[B, ...]`` that ``vmap`` wraps. Public one: none."""
    while is_batchedtensor(x):
        x = get_unwrapped(x)
    return x


def unwrapped(x: Tensor) -> Tensor:
    """The tensor that any transforms wrap. Public one: none."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def places(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dictionaries in which a module's own parameters and buffers stand.

    Public one: none that writes a tensor in a parameter's place; ``torch.func.functional_call`` does so
    with these two.
    """
    return module._parameters, module._buffers


def made_in_forward(module: nn.Module) -> Iterator[str]:
    """Names of the attributes that hold tensors beside parameters and buffers.

    Hooks (weight norm) and recurrent layers (``_flat_weights``) make them anew in each call.
    """
    for name, value in vars(module).items():
        if isinstance(value, Tensor) or name.startswith("_flat_weight"):
            yield name


def is_compiled(module: nn.Module) -> bool:
    """Whether it is made by ``torch.compile`` or by ``module.compile()``. Public one: none."""
    return "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None


def foreach_by_default(params: list[Tensor]) -> bool:
    """Whether torch's optimizers would step such parameters together. Public one: none."""
    return _default_to_fused_or_foreach(params, differentiable=False)[1]


def by_device_and_dtype(*lists: Any) -> list[Any]:
    """Lists that go together, cut into groups of one device and dtype. Public one: none."""
    return [group for group, _ in _group_tensors_by_device_and_dtype(list(lists)).values()]
