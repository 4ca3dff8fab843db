"""The outputs of a model as a pytree of tensors."""

from typing import Any

from torch import Tensor

from implicit_optim._torch import pytree


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

    def is_nothing(x: Any) -> bool:
        return isinstance(x, _Nothing)

    return pytree.tree_map(lambda x: None if is_nothing(x) else x, output, is_leaf=is_nothing)
