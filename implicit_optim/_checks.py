"""What settings must be, said and checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

# What "it must" do, by the words of the error message.
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
    """Raise ``ValueError`` if a setting does not do what it must, such as ``be >= 1``."""
    if not _RULES[rule](value):
        raise ValueError(f"Invalid {name}: {value}: it must {rule}")


class Settings:
    """Base of frozen dataclasses whose settings are checked when one is made."""

    _must: ClassVar[Mapping[str, str]] = {}  # by name, the rule; a default of None keeps any

    def __post_init__(self) -> None:
        for name, rule in self._must.items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name, 0) is not None:
                check(name, value, rule)
