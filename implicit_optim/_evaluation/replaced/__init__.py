"""One table of torch's functions that are replaced while a model runs, and the mode that looks it up.

Each entry says why it is there: torch is wrong, torch lacks it, or ours is faster. The unit is the
function, not the layer's class: subclasses, hooks, functional use and patched methods all see their own
code.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

from implicit_optim._evaluation.replaced import convolution, embedding, formulas, norms, recurrent
from implicit_optim._evaluation.replaced.table import TABLE
from implicit_optim._evaluation.replaced.when import (
    along_cotangents,
    noting_leaves,
    recording,
    written_out,
)

Result = TypeVar("Result")


class _Replacing(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = TABLE.get(func)
        if replacement is not None:
            result = replacement(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


_REPLACING = _Replacing()


def replaced(fn: Callable[..., Result], *args: Any) -> Result:
    """Call a model or an objective with the replacements of the table."""
    with _REPLACING:
        return fn(*args)
