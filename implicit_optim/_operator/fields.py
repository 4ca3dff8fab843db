"""Dataclasses of tensors and of operators, taken apart and put together again."""

import copy
from typing import Any, ClassVar, TypeVar

Leaves = list[Any]
Self = TypeVar("Self", bound="OfFields")


class OfFields:
    """The tensors of a dataclass whose fields ``_made_of`` are ``[*batch, ...]`` or operators."""

    _made_of: ClassVar[tuple[str, ...]]

    def tensors(self) -> tuple[Leaves, Leaves]:
        """Those of every field, in order; a field that is a tensor carries the batch dimensions."""
        parts = [f.tensors() if _is_operator(f) else ([f], []) for f in self._fields()]
        own, common = zip(*parts, strict=True)
        return sum(own, []), sum(common, [])

    def with_tensors(self: Self, own: Leaves, common: Leaves) -> Self:
        """The same over other tensors."""
        return self._over("with_tensors", own, common)

    def add_batch(self: Self, own: Leaves, common: Leaves, *, shared: bool) -> Self:
        """The same over tensors with one more batch dimension in front."""
        return self._over("add_batch", own, common, shared=shared)

    def _over(self: Self, method: str, own: Leaves, common: Leaves, **settings: bool) -> Self:
        new = copy.copy(self)  # not made anew, which would check a template's tensors: it has none
        for name, field in zip(self._made_of, self._fields(), strict=True):
            if _is_operator(field):
                m, n = map(len, field.tensors())
                field = getattr(field, method)(own[:m], common[:n], **settings)
                own, common = own[m:], common[n:]
            else:
                field, *own = own
            object.__setattr__(new, name, field)
        return new

    def _fields(self) -> list[Any]:
        return [getattr(self, name) for name in self._made_of]


def _is_operator(field: Any) -> bool:
    return hasattr(field, "with_tensors")  # the class is made of this one
