"""Tensors that require grad.

torch is wrong: under vmap none seems to, so that hooks on it are left out. Told the truth, a model that
asks goes on to register its hook, which vmap refuses aloud. And torch lacks it: nothing tells the leaves
that a model makes for derivatives of its own from those that it got from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from implicit_optim._evaluation.replaced.when import note_leaf
from implicit_optim._torch import unbatched


def requires_grad(x: Tensor) -> bool:
    """``x.requires_grad`` of what ``vmap`` wraps."""
    return unbatched(x).requires_grad


_attribute: Any = Tensor.requires_grad
ENTRIES: dict[Callable[..., Any], Callable[..., Any]] = {
    _attribute.__get__: requires_grad,
    _attribute.__set__: note_leaf,
    Tensor.requires_grad_: note_leaf,
}
