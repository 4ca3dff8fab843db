"""A module as a function of its parameters: the user's own object, called as it is.

The tensors of a task stand in the places of the module's parameters for the time of one call, buffers
are copies, and afterwards everything that the model did not itself set is what it was.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicit_optim._evaluation.batching import in_worker
from implicit_optim._evaluation.kernels import uncompiled
from implicit_optim._evaluation.running_stats import Policy
from implicit_optim._torch import is_compiled, made_in_forward, places

# Who calls a module with other tensors in its places holds its lock.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKING = threading.Lock()


class AsFunction:
    """``(tensors, *inputs) -> output`` of one task, with tensors in place of those of a module.

    The semantics are those of ``torch.func.functional_call``, strict about names. In the threads of a
    [`Batching`][implicit_optim.Batching] the module's structure is copied once for each of them; tensors
    are shared.

    Args:
        model: the module.
        by_batch: see `_running_stats.Policy`; only where the model is called as it is.
    """

    def __init__(self, model: nn.Module, by_batch: bool | None = None) -> None:
        self.model = model
        self.by_batch = by_batch
        self.idle: list[_Places] = []  # structural copies that no thread is using
        if not torch.compiler.is_compiling():
            with undisturbed(model):
                self.places = _Places(model)

    def under(self, by_batch: bool | None) -> AsFunction:
        """The same with another policy for running statistics."""
        other = copy.copy(self)
        other.by_batch = by_batch
        return other

    def __call__(self, state: dict[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        """The output."""
        return self._call(None, state, *inputs, **keywords)

    def statistics(self, state: dict[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        """Mean and unbiased variance of all that is normalised meanwhile, by the buffers' names."""
        seen: dict[str, Tensor] = {}
        self._call(seen, state, *inputs, **keywords)
        return seen

    def _call(self, seen: Any, state: dict[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            if seen is not None:
                raise RuntimeError("RunningStats.PER_TASK cannot be compiled: use BATCH or FROZEN")
            with contextlib.nullcontext() if self.by_batch is None else Policy(self.by_batch, {}):
                return functional_call(self.model, buffers | state, inputs, keywords)
        with self._places() as places, places.holding(state) as names:
            if self.by_batch is None:
                return places.model(*inputs, **keywords)
            with Policy(self.by_batch, names, seen):
                return places.model(*inputs, **keywords)

    @contextlib.contextmanager
    def _places(self) -> Iterator[_Places]:
        if not in_worker():
            yield self.places
            return
        try:
            places = self.idle.pop()
        except IndexError:
            with undisturbed(self.model):
                places = _Places(_structural_copy(self.model))
        try:
            yield places
        finally:
            self.idle.append(places)


class _Places:
    """Where the tensors of a module stand.

    Attributes:
        model: the module.
        slots: of each tensor the dictionary and key where it stands, its name, whether it is a buffer,
            and itself.
        attributes: tensors elsewhere in a module's attributes, which hooks (weight norm) and recurrent
            layers make anew from the parameters in each call.
        packed: names of weights in the format ``channels_last``, which a task's have too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        names = {id(t): name for name, t in model.named_buffers()}
        names |= {id(t): name for name, t in model.named_parameters()}
        self.slots: list[tuple[dict[str, Any], str, str, bool, Tensor]] = []
        self.attributes: list[tuple[dict[str, Any], str]] = []
        self.compiled = False
        for module in model.modules():
            own = vars(module)
            for is_buffer, place in zip((False, True), places(module), strict=True):
                for key, t in place.items():
                    if t is not None:
                        self.slots.append((place, key, names[id(t)], is_buffer, t))
            self.attributes += [(own, key) for key in made_in_forward(module)]
            self.compiled |= is_compiled(module)
        self.names = frozenset(names.values())
        self.packed = {name for _, _, name, _, t in self.slots if _is_packed(t)}
        self.locks = _locks(model)

    @contextlib.contextmanager
    def holding(self, state: dict[str, Tensor]) -> Iterator[dict[int, str]]:
        """The tensors stand in their places, which nobody else sees; the names of the buffers."""
        if not state.keys() <= self.names:
            raise ValueError(
                f"the model has no parameters or buffers {sorted(state.keys() - self.names)}: pass "
                "those that adapt, by the names of model.named_parameters()"
            )
        if self.packed:
            state = {name: _pack(t) if name in self.packed else t for name, t in state.items()}
        buffers: dict[int, str] = {}
        with contextlib.ExitStack() as entered:
            for lock in self.locks:
                entered.enter_context(lock)
            if self.compiled:
                entered.enter_context(uncompiled)
            # A backward pass may come when other tensors stand there than when the problem was bound.
            before = [place[key] for place, key, *_ in self.slots]
            made = [attributes.get(key) for attributes, key in self.attributes]
            try:
                for place, key, name, is_buffer, own in self.slots:
                    given = state.get(name, own)
                    if is_buffer:
                        given = own.clone() if given is own else given
                        buffers[id(given)] = name
                    place[key] = given
                yield buffers
            finally:
                for (place, key, *_), was in zip(self.slots, before, strict=True):
                    place[key] = was
                for (attributes, key), was in zip(self.attributes, made, strict=True):
                    attributes[key] = was


def _locks(model: nn.Module) -> list[threading.RLock]:
    """One lock for each module that holds tensors, in one order for all: nobody waits in a circle."""
    owners = [m for m in model.modules() if any(places(m))]
    with _LOCKING:
        return [_LOCKS.setdefault(m, threading.RLock()) for m in sorted(owners, key=id)]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While nobody in another thread has other tensors in the module's places."""
    with contextlib.ExitStack() as entered:
        for lock in () if torch.compiler.is_compiling() else _locks(model):
            entered.enter_context(lock)
        yield


def arguments(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called: a dictionary in the last place as keywords, if ``forward`` takes them."""
    if not inputs or not isinstance(inputs[-1], dict):
        return inputs, {}
    *first, last = inputs
    try:
        inspect.signature(model.forward).bind(*first, **last)
    except TypeError:
        return inputs, {}
    return tuple(first), last


def _structural_copy(model: nn.Module) -> nn.Module:
    """Other modules over the same tensors, for one more thread."""
    kept = next(_closures(model), None)
    if kept is not None:
        raise RuntimeError(
            "Batching(threads=...) copies the structure of the model for each thread, which the "
            f"function {kept.__qualname__} cannot follow: it holds on to a module itself; use "
            "threads=1, or make it a method"
        )
    shared = [*model.parameters(), *model.buffers()]
    shared += [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    try:
        return copy.deepcopy(model, {id(t): t for t in shared})
    except Exception as error:
        raise RuntimeError(
            "Batching(threads=...) copies the structure of the model for each thread, and "
            f"{type(model).__name__} cannot be copied ({error}): use threads=1"
        ) from error


def _closures(model: nn.Module) -> Iterator[types.FunctionType]:
    """Functions among a model's attributes and hooks that hold on to one of its modules."""
    modules = {id(m) for m in model.modules()}
    for module in model.modules():
        for value in vars(module).values():
            for kept in value.values() if isinstance(value, dict) else (value,):
                if isinstance(kept, types.FunctionType):
                    cells = inspect.getclosurevars(kept).nonlocals.values()
                    held = [*cells, *(kept.__defaults__ or ())]
                    if any(id(getattr(h, "__self__", h)) in modules for h in held):
                        yield kept


def _is_packed(t: Tensor) -> bool:
    """Whether weights are in the format ``channels_last``; strides can be asked for anywhere."""
    if t.ndim not in (4, 5) or t.layout is not torch.strided:
        return False
    return t.stride(1) == 1 and t.stride(-1) == t.shape[1]


def _pack(t: Tensor) -> Tensor:
    """The same numbers in that format, under ``vmap`` too."""
    return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name.

    Raises:
        ValueError: the shape of one is not known yet.
    """
    for name, p in module.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"{name} has no shape yet: run a batch through the model first")
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
