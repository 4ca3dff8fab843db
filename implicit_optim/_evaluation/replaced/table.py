"""The table: by torch's function, what takes its place while a model runs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]
TABLE: dict[Function, Function] = {}


class Arguments:
    """Those of a call, as attributes; torch.compile does not take a ``SimpleNamespace``."""

    def __init__(self, named: dict[str, Any]) -> None:
        for name, value in named.items():
            setattr(self, name, value)


def replaces(*functions: Function) -> Callable[[Function], Function]:
    """Enter a function that takes the arguments as torch's does, and may return ``NotImplemented``."""

    def enter(own: Function) -> Function:
        TABLE.update(dict.fromkeys(functions, own))
        return own

    return enter


def replaces_by_name(function: Function) -> Callable[[Function], Function]:
    """Enter a function of one namespace: all arguments of torch's Python function, by name."""
    parameters = inspect.signature(function).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}

    def enter(own: Function) -> Function:
        @functools.wraps(own)
        def call(*args: Any, **settings: Any) -> Any:
            named = defaults | dict(zip(parameters, args, strict=False)) | settings
            # torch itself says what is wrong with arguments that are missing or unknown.
            complete = len(named) == len(parameters)
            return own(Arguments(named)) if complete else NotImplemented

        TABLE[function] = call
        return own

    return enter
