"""What settings must be, said and checked in one place."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

# Keyed by the words that the error message puts after "it must".
_RULES: dict[str, Callable[[Any], bool]] = {
    "be >= 0": lambda value: not value < 0,
    "be >= 1": lambda value: not value < 1,
    "be finite and >= 0": lambda value: 0 <= value < math.inf,
    "be finite and > 0": lambda value: 0 < value < math.inf,
    "lie in [0, 1)": lambda value: 0 <= value < 1,
    "lie in (0, 1)": lambda value: 0 < value < 1,
    "lie in [0, 1/4)": lambda value: 0 <= value < 0.25,
}


def check(name: str, value: Any, rule: str) -> None:
    """Raise ``ValueError`` if a number or 0-d tensor breaks a rule, such as ``be >= 1``."""
    if isinstance(value, Tensor) and value.ndim > 0:
        raise ValueError(
            f"Invalid {name} of shape {tuple(value.shape)}: a tensor {name} must be 0-d"
        )
    if not _RULES[rule](value):
        raise ValueError(f"Invalid {name}: {value}: it must {rule}")


class Settings:
    """Base class of frozen dataclasses that check their settings on construction."""

    # Setting -> rule. ``None`` is exempt where it is the default.
    _must: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, rule in self._must.items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name, 0) is not None:
                check(name, value, rule)
