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
from collections.abc import Iterable, Iterator, Sequence
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

    The semantics are those of ``torch.func.functional_call``, strict about names; a dictionary in the
    last place of the inputs is passed as keywords, if ``forward`` takes them. In the threads of a
    [`Batching`][implicit_optim.Batching] the module's structure is copied once for each of them; tensors
    are shared.

    Args:
        model: the module.
        by_batch: see `running_stats.Policy`; only where the model is called as it is.
    """

    def __init__(self, model: nn.Module, by_batch: bool | None = None) -> None:
        self.model = model
        self.by_batch = by_batch
        self.idle: list[_Places] = []  # structural copies that no thread is using
        if not torch.compiler.is_compiling():
            self.places = _Places(model)

    def under(self, by_batch: bool | None) -> AsFunction:
        """The same with another policy for running statistics."""
        other = copy.copy(self)
        other.by_batch = by_batch
        return other

    def __call__(self, state: dict[str, Tensor], *inputs: Any) -> Any:
        """The output."""
        return self.call(state, *_arguments(self.model, inputs))

    def statistics(self, state: dict[str, Tensor], *inputs: Any) -> Any:
        """Mean and unbiased variance of all that is normalised meanwhile, by the buffers' names."""
        seen: dict[str, Tensor] = {}
        self.call(state, *_arguments(self.model, inputs), seen)
        return seen

    def call(
        self, state: dict[str, Tensor], inputs: Sequence[Any], keywords: Any, seen: Any = None
    ) -> Any:
        """The output of the inputs as they are; statistics are left in ``seen``."""
        if torch.compiler.is_compiling():
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            if seen is not None:
                raise RuntimeError("RunningStats.PER_TASK cannot be compiled: use BATCH or FROZEN")
            with contextlib.nullcontext() if self.by_batch is None else Policy(self.by_batch, {}):
                return functional_call(self.model, buffers | state, tuple(inputs), keywords)
        if not in_worker():
            return self._inside(self.places, state, inputs, keywords, seen)
        try:
            places = self.idle.pop()
        except IndexError:
            with undisturbed(self.model):
                copied = _structural_copy(self.model)
            places = _Places(copied)
        try:
            return self._inside(places, state, inputs, keywords, seen)
        finally:
            self.idle.append(places)

    def _inside(
        self,
        places: _Places,
        state: dict[str, Tensor],
        inputs: Sequence[Any],
        keywords: Any,
        seen: Any,
    ) -> Any:
        with places.locks, places.eagerly:
            buffers, before = places.put(state)
            try:
                if self.by_batch is None:
                    return places.model(*inputs, **keywords)
                with Policy(self.by_batch, buffers, seen):
                    return places.model(*inputs, **keywords)
            finally:
                places.put_back(before)


class _Places:
    """Where the tensors of a module stand.

    Attributes:
        model: the module.
        slots: of each tensor the dictionary and key where it stands, its name, whether it is a buffer,
            and itself.
        attributes: tensors elsewhere in a module's attributes, which hooks (weight norm) and recurrent
            layers make anew from the parameters in each call.
        packed: names of weights in the format ``channels_last``, which a task's have too.
        locks: held by whoever has other tensors in these places.
        eagerly: in which compiled parts run eagerly, if there are some.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.slots: list[tuple[dict[str, Any], str, str, bool, Tensor]] = []
        self.attributes: list[tuple[dict[str, Any], str]] = []
        named = list(model.named_modules())
        names: dict[int, str] = {}  # a tied tensor has the first of its names
        self.locks = _Locks(module for _, module in named)
        with self.locks:
            for path, module in named:
                prefix = f"{path}." if path else ""
                for is_buffer, place in zip((False, True), places(module), strict=True):
                    for key, t in place.items():
                        if t is not None:
                            name = names.setdefault(id(t), prefix + key)
                            self.slots.append((place, key, name, is_buffer, t))
                self.attributes += [(vars(module), key) for key in made_in_forward(module)]
        compiled = any(is_compiled(module) for _, module in named)
        self.eagerly: Any = uncompiled if compiled else contextlib.nullcontext()
        self.names = frozenset(names.values())
        self.packed = {name for _, _, name, _, t in self.slots if _is_packed(t)}

    def put(self, state: dict[str, Tensor]) -> tuple[dict[int, str], tuple[list[Any], list[Any]]]:
        """Put the tensors in their places, under the locks.

        Returns:
            The names of the buffers by their identity, and what stood there before: a backward pass may
            come when other tensors stand there than when the problem was bound.
        """
        if not state.keys() <= self.names:
            raise ValueError(
                f"the model has no parameters or buffers {sorted(state.keys() - self.names)}: pass "
                "those that adapt, by the names of model.named_parameters()"
            )
        if self.packed:
            state = {name: _pack(t) if name in self.packed else t for name, t in state.items()}
        made = [attributes.get(key) for attributes, key in self.attributes]
        before = [place[key] for place, key, *_ in self.slots], made
        buffers: dict[int, str] = {}
        try:
            for place, key, name, is_buffer, own in self.slots:
                given = state.get(name, own)
                if is_buffer:
                    given = own.clone() if given is own else given
                    buffers[id(given)] = name
                place[key] = given
        except BaseException:
            self.put_back(before)
            raise
        return buffers, before

    def put_back(self, before: tuple[list[Any], list[Any]]) -> None:
        """Undo `put`."""
        for (place, key, *_), was in zip(self.slots, before[0], strict=True):
            place[key] = was
        for (attributes, key), was in zip(self.attributes, before[1], strict=True):
            attributes[key] = was


class _Locks:
    """One lock for each module that holds tensors, in one order for all: nobody waits in a circle."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        owners = sorted((m for m in modules if any(places(m))), key=id)
        with _LOCKING:
            self.locks = [_LOCKS.setdefault(m, threading.RLock()) for m in owners]

    def __enter__(self) -> None:
        for lock in self.locks:
            lock.acquire()

    def __exit__(self, *exception: object) -> None:
        for lock in self.locks:
            lock.release()


def undisturbed(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While nobody in another thread has other tensors in the module's places."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _Locks(model.modules())


def _arguments(model: nn.Module, inputs: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Inputs and keywords of a call."""
    if not inputs or not isinstance(inputs[-1], dict):
        return inputs, {}
    *first, last = inputs
    try:
        inspect.signature(model.forward).bind(*first, **last)
    except TypeError:
        return inputs, {}
    return first, last


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
