"""How one call evaluates its tasks: batching, precision, random numbers.

The inner solver and every product of a linear solve must evaluate the same function. An `Evaluator`
remembers autocast and the seed from when it was made and restores them for every evaluation; the
solver's own arithmetic stays in full precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit_optim._evaluation.batching import LOOP, WHOLE, Batching, ByDefault
from implicit_optim._evaluation.hints import explained
from implicit_optim._evaluation.precision import autocast_is_on
from implicit_optim._evaluation.random import drawing_from, drew, states
from implicit_optim._evaluation.replaced import replaced
from implicit_optim._torch import pytree


@dataclass(frozen=True)
class Evaluator:
    """Evaluates functions of one task for all tasks of a batch, in the same way each time.

    Attributes:
        device: where they are evaluated.
        autocast: dtype of autocast, or ``None`` if it is off.
        seed: from which every evaluation draws its random numbers; ``None``: drawing is an error.
        batching: how the tasks of a batch are evaluated.
        start: index of its first task in the whole batch, so that each task draws its own numbers.
        watched: whether each evaluation outside ``vmap`` checks that no numbers were drawn.
    """

    device: torch.device
    autocast: torch.dtype | None
    seed: int | None
    batching: Batching
    start: int = 0
    watched: bool = True

    @classmethod
    def now(cls, device: torch.device, seed: int | None, batching: Batching) -> Evaluator:
        """An evaluator with the autocast setting of this moment."""
        on = autocast_is_on(device)
        return cls(device, torch.get_autocast_dtype(device.type) if on else None, seed, batching)

    def other_draw(self) -> Evaluator:
        """The same, with other random numbers from the same seed."""
        return self if self.seed is None else replace(self, seed=~self.seed)

    def part(self, place: slice | int, batching: Batching | None = None) -> Evaluator:
        """The evaluator of a chunk of the tasks, or of a single one without the batch dimension."""
        first = place if isinstance(place, int) else place.start
        return replace(self, batching=batching or self.batching.within, start=self.start + first)

    def map(
        self,
        one: Callable[..., Any],
        first: Any,
        theta: Any = None,
        data: tuple[Any, ...] = (),
        shared: tuple[bool, ...] = (True,),
    ) -> Any:
        """Evaluate ``one(first, theta, *data)`` for every task.

        Args:
            one: function of one task.
            first: pytree of tensors ``[*batch, ...]``.
            theta: pytree; a batch dimension is mapped where it is not shared.
            data: pytrees of tensors ``[*batch, ...]``.
            shared: one flag a batch dimension, outermost first: whether theta lacks it.

        Returns:
            A pytree of tensors ``[*batch, ...]``.

        Raises:
            RuntimeError: ``one`` drew random numbers without a seed, or raised it; the message says
                what to do.
        """
        if not shared:
            return self._call(lambda: replaced(one, first, theta, *data), alone=True)
        tasks = _size(first)
        loops = self.batching.loops or tasks == 1
        places: list[Any] = list(range(tasks)) if loops else self.batching.chunks(tasks)
        if loops or len(places) > 1:
            owns = [theta] * len(places) if shared[0] else _parts(theta, places)
            each = zip(places, _parts(first, places), owns, _parts(data, places), strict=True)
            way, rest = LOOP if loops else WHOLE, shared[loops:]
            results = [self.part(place, way).map(one, x, own, d, rest) for place, x, own, d in each]
            join: Callable[..., Tensor] = torch.stack if loops else torch.cat
            return pytree.tree_map(lambda *each: join(each), *results)
        batched, randomness = one, "error" if self.seed is None else "different"
        for is_shared in reversed(shared):
            dims = (_dims(first), None if is_shared else _dims(theta), *_dims(data))
            batched = torch.func.vmap(batched, in_dims=dims, randomness=randomness)
        try:
            return self._call(lambda: replaced(batched, first, theta, *data), alone=False)
        except Exception as error:
            random = "randomness error mode" in str(error)  # which a loop would have to watch for
            by_default = self.batching
            if random or not isinstance(by_default, ByDefault) or torch.compiler.is_compiling():
                raise
            refusal = error
        result = replace(self, batching=LOOP).map(one, first, theta, data, shared)
        by_default.refused(refusal)
        return result

    def entered_once(self, solve: Callable[[Evaluator], Any], *, batched: bool) -> Any:
        """Call ``solve`` and check once, after all its evaluations, that no random numbers were drawn.

        If some were, ``solve`` runs again with a check after each evaluation, which tells whether it was
        the objective or another thread.

        Args:
            solve: is given the evaluator to use.
            batched: whether all evaluations run under ``vmap``, which checks by itself.
        """
        if torch.compiler.is_compiling() or self.seed is not None:
            return solve(self)
        before = states(self.device)
        result = solve(replace(self, watched=False))
        loops = not batched or self.batching.loops  # known only now: vmap may have refused
        return solve(self) if loops and drew(before, self.device) else result

    def _call(self, fn: Callable[[], Any], *, alone: bool) -> Any:
        """Call ``fn`` with seed and precision restored; ``alone``: outside ``vmap``."""
        if torch.compiler.is_compiling() and self.seed is None:
            return fn()
        try:
            with self._precision():
                if self.seed is not None:
                    with drawing_from(self.seed + self.start, self.device):
                        return fn()
                watched = alone and self.watched
                before = states(self.device) if watched else []
                result = fn()
                if watched and drew(before, self.device, again=fn):
                    raise RuntimeError("called a random operation in randomness error mode")
                return result
        except RuntimeError as error:
            hint = explained(error)
            if hint is None:
                raise
            raise hint from error

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None and not autocast_is_on(self.device):
            return contextlib.nullcontext()
        # No cache: casts made under one transform must not be seen by another.
        on = self.autocast is not None
        return torch.autocast(self.device.type, self.autocast, on, cache_enabled=False)


def _parts(tree: Any, places: list[Any]) -> list[Any]:
    """The tree at every place, with one differentiable operation per tensor."""
    leaves, spec = pytree.tree_flatten(tree)

    def split(leaf: Any) -> Sequence[Any]:
        if not isinstance(leaf, Tensor):
            return [leaf] * len(places)
        if isinstance(places[0], int):
            return leaf.unbind()
        return leaf.split([place.stop - place.start for place in places])

    columns = [split(leaf) for leaf in leaves]
    return [pytree.tree_unflatten([c[i] for c in columns], spec) for i in range(len(places))]


def _dims(tree: Any) -> Any:
    if tree is None or isinstance(tree, Tensor):  # the usual case, without a walk
        return None if tree is None else 0
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tree)


def _size(tree: Any) -> int:
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
