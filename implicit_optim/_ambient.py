"""What an evaluation depends on beside its arguments: precision, random numbers, kernels.

All evaluations of one inner problem, in the inner solver and in every product of a linear solve, must
be of one and the same function. `Ambient` remembers autocast and the seed of the moment the problem
was bound, and brings them back each time; the numbers of a solver itself stay in full precision.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from implicit_optim._batch import Batching, over_tasks

# torch's generators and kernel switches belong to the whole process: whoever changes them for a
# moment holds this lock, so that solves in several threads do not see each other's.
_LOCK = threading.RLock()
# torch reads a generator with its mutex locked and may collect garbage meanwhile, which lets go of the
# GIL: a second reader then waits for the mutex with the GIL, the first for the GIL with the mutex.
_READING = threading.RLock()


@dataclass(frozen=True)
class Ambient:
    """Precision and random numbers of an inner problem.

    Attributes:
        device: where it is evaluated.
        autocast: dtype of autocast, or ``None`` if it is off.
        seed: what every evaluation draws its random numbers from, or ``None`` if none may be drawn.
        held: whether all this is in force already, for many evaluations: see `hold`.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    seed: int | None = None
    held: bool = False

    @classmethod
    def now(cls, device: torch.device, seed: int | None = None) -> Ambient:
        """The precision in force where this is called."""
        on = autocast_is_on(device)
        return cls(device, torch.get_autocast_dtype(device.type) if on else None, seed)

    def evaluate(self, fn: Callable[[], Any], *, start: int = 0, watched: bool) -> Any:
        """Call ``fn`` as things were when the problem was bound.

        Args:
            fn: the evaluation.
            start: the first task that it evaluates: other tasks draw other numbers.
            watched: look whether random numbers were drawn without a seed, as ``vmap`` does by itself.

        Raises:
            RuntimeError: they were, or ``fn`` raised it; the message says what to do.
        """
        try:
            if self.held and not autocast_is_on(self.device):
                return fn()
            with self._precision(), _without_fast_path(), self._kernels():
                if self.seed is not None:
                    with _drawing_from(self.seed + start, self.device):
                        return fn()
                before = _states(self.device) if watched else []
                result = fn()
                if watched and _moved(before, self.device):
                    with _LOCK:  # once more, in case that it was another thread that drew
                        before = _states(self.device)
                        fn()
                        if _moved(before, self.device):
                            raise RuntimeError("called a random operation in randomness error mode")
                return result
        except RuntimeError as error:
            for symptom, hint in _HINTS.items():
                if symptom in str(error):
                    raise RuntimeError(f"{hint}\n(torch: {error})") from error
            raise

    def hold(self, solve: Callable[[Ambient], Any], *, watched: Callable[[], bool]) -> Any:
        """Call ``solve``, whose many evaluations find all as it was, instead of each bringing it back.

        Args:
            solve: is given what its problem is to be evaluated with.
            watched: asked afterwards whether anybody must look if random numbers were drawn
                meanwhile; if they were, ``solve`` is called once more, and each of its evaluations
                tells whether that was the objective.
        """
        if torch.compiler.is_compiling() or self.seed is not None or self.autocast is not None:
            return solve(self)
        with _without_fast_path(), self._kernels():
            before = _states(self.device)
            result = solve(replace(self, held=True))
        return solve(self) if watched() and _moved(before, self.device) else result

    def over_tasks(
        self,
        one: Callable[..., Any],
        first: Any,
        theta: Any,
        data: tuple[Any, ...],
        shared: tuple[bool, ...],
        batching: Batching,
        *,
        start: int = 0,
    ) -> Any:
        """`over_tasks` as things were; ``start`` is the place of the first task in the whole batch."""
        random = self.seed is not None
        args = (one, first, theta, data, shared, batching)
        if torch.compiler.is_compiling() and not random:
            return over_tasks(*args)

        def call(evaluate: Callable[[], Any], at: int, watched: bool) -> Any:
            return self.evaluate(evaluate, start=start + at, watched=watched)

        return over_tasks(*args, call=call, random=random)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None and not autocast_is_on(self.device):
            return contextlib.nullcontext()
        # No cache: casts made under one transform must not be seen by another.
        on = self.autocast is not None
        return torch.autocast(self.device.type, self.autocast, on, cache_enabled=False)

    def _kernels(self) -> contextlib.AbstractContextManager[Any]:
        # On the CPU fused attention has no batching rule: vmap would take the tasks one by one.
        return twice_differentiable() if self.device.type == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off: dot products in 16 bits would ruin a solve."""
    if not autocast_is_on(device):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on there."""
    available = torch.amp.is_autocast_available(device.type)  # the meta device has none
    return available and torch.is_autocast_enabled(device.type)


@contextlib.contextmanager
def _drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    generators = _generators(device)
    with _LOCK:
        with temporarily_clear_interpreter_stack():  # the states are no part of any transform
            states = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            with temporarily_clear_interpreter_stack():
                for generator, state in zip(generators, states, strict=True):
                    generator.set_state(state)


def _states(device: torch.device) -> list[torch.Tensor]:
    with _READING, temporarily_clear_interpreter_stack():
        return [generator.get_state() for generator in _generators(device)]


def _moved(before: list[torch.Tensor], device: torch.device) -> bool:
    after = _states(device)
    with temporarily_clear_interpreter_stack():
        return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _generators(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


def draw_seed() -> int:
    """A seed from torch's generator, drawn while no evaluation of another thread has it."""
    with _LOCK:
        return int(torch.randint(2**62, (), device="cpu"))


class _AsLongAsInside:
    """A setting of torch's for the process that is in force as long as anyone is inside, in any thread.

    torch's own context managers belong to one thread (a token of ``sdpa_kernel`` cannot be given back
    in another) and write settings beside those asked for (``backends.mkldnn.flags``).

    Args:
        enforce: puts it in force, and returns what takes it back.
    """

    def __init__(self, enforce: Callable[[], Callable[[], Any]]) -> None:
        self.enforce = enforce
        self.take_back: Callable[[], Any] = enforce
        self.inside = 0

    def __enter__(self) -> None:
        with _LOCK:
            if self.inside == 0:
                self.take_back = self.enforce()
            self.inside += 1

    def __exit__(self, *exception: object) -> None:
        with _LOCK:
            self.inside -= 1
            if self.inside == 0:
                self.take_back()


def _switches(*switches: tuple[Callable[[], bool], Callable[[bool], Any], bool]) -> _AsLongAsInside:
    """Switches of torch's for its kernels: how each is read, how it is set, and to what."""

    def enforce() -> Callable[[], Any]:
        before = [is_on() for is_on, _, _ in switches]
        for _, put, wanted in switches:
            put(wanted)
        return lambda: [put(was) for (_, put, _), was in zip(switches, before, strict=True)]

    return _AsLongAsInside(enforce)


def _uncompiled() -> Callable[[], Any]:
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


_cuda, _C = torch.backends.cuda, torch._C
# Of the kernels for attention, only the plain one has a second derivative.
_PLAIN_ATTENTION = _switches(
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp, True),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp, False),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp, False),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp, False),
)
# What nn.MultiheadAttention takes without grad in eval mode has no batching rule on any device.
_SLOW_PATH = _switches(
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
)
# Fused recurrent kernels have none either; those that torch composes have.
unfused = _switches(
    (_C._get_cudnn_enabled, _C._set_cudnn_enabled, False),
    (_C._get_mkldnn_enabled, _C._set_mkldnn_enabled, False),
)
# Compiled code has no second derivative: what the user compiled runs as it was written.
uncompiled = _AsLongAsInside(_uncompiled)


def twice_differentiable() -> contextlib.AbstractContextManager[None]:
    """Kernels that have a second derivative; a graph that is being compiled keeps its own."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _PLAIN_ATTENTION


def _without_fast_path() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _SLOW_PATH


_DEVICES = (
    "an operation of the objective met two devices: move the data, support and query, to the device "
    "of the parameters"
)
_DTYPES = (
    "an operation of the objective met two dtypes: bring the data to the dtype of the parameters, or "
    "evaluate under torch.autocast"
)
_HINTS = {
    "randomness error mode": (
        "the objective draws random numbers (dropout?), so that every evaluation would be of another "
        "function: give minimize and attach the same seed=..., or MetaLearner stochastic=True, to "
        "draw the same numbers each time; or call .eval() on those modules"
    ),
    "saved tensor hooks": (
        "torch.func transforms do not support activation checkpointing (torch.utils.checkpoint): turn "
        "it off in the inner model; the memory of an implicit gradient does not grow with the steps"
    ),
    "must override the setup_context": (
        "torch.func transforms do not support this autograd.Function (torch.utils.checkpoint with "
        "use_reentrant=True is one): give it a setup_context; activation checkpointing: turn it off "
        "in the inner model"
    ),
    "expected scalar type": _DTYPES,
    "must have the same dtype": _DTYPES,
    "not on the expected device": _DEVICES,
    "tensors to be on the same device": _DEVICES,
    "Batching rule not implemented": (
        "an operation of the objective cannot be batched over tasks by vmap (nn.LSTM, nn.GRU and "
        "nn.RNN, for instance): use batching=iopt.Batching(chunk_size=1)"
    ),
}
