"""Named parameters seen as one flat vector: the only place in the library that knows names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._torch import pytree


def keystr(path: tuple[Any, ...]) -> str:
    """Human-readable name of a leaf: ``['head.weight']``; the empty string for a bare tensor."""
    return pytree.keystr(path)


@dataclass(frozen=True)
class Layout:
    """How a pytree of tensors lies in one flat vector ``[*batch, n]``.

    The leaves are laid end to end in the order of the pytree. ``unravel`` takes views, so that it
    costs nothing and differentiates; ``ravel`` concatenates.

    Attributes:
        treespec: structure of the pytree.
        names: one printable name a leaf.
        shapes: shape of each leaf without its batch dimensions.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> tree = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7.0)}
        >>> layout = Layout.of(tree)
        >>> layout.n, layout.ravel(tree).tolist()
        (7, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0])
        >>> layout.unravel(torch.zeros(5, 7))["w"].shape
        torch.Size([5, 2, 3])
    """

    treespec: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: Any, batch_ndim: int = 0, name: str = "phi") -> Layout:
        """Read the layout of ``tree``, whose leaves carry ``batch_ndim`` leading dimensions.

        Args:
            tree: a tensor or a pytree of tensors, each ``[*batch, *shape]``.
            batch_ndim: number of leading batch dimensions.
            name: what error messages call the tree.

        Returns:
            The layout of one element of the batch.

        Raises:
            TypeError: a leaf is no floating-point tensor, or is sharded over processes and not one
                flat vector already.
            ValueError: dtypes, devices or batch shapes differ between leaves.
        """
        leaves, treespec = pytree.tree_flatten_with_path(tree)
        names = tuple(name + keystr(path) for path, _ in leaves)
        tensors = [leaf for _, leaf in leaves]
        if not tensors:
            raise ValueError(f"{name} has no tensors: give at least one parameter to solve for")
        for leaf_name, leaf in zip(names, tensors, strict=True):
            _check_leaf(leaf_name, leaf, names[0], tensors[0], batch_ndim, len(tensors) == 1)
        shapes = tuple(tuple(leaf.shape[batch_ndim:]) for leaf in tensors)
        return cls(treespec, names, shapes)

    @property
    def sizes(self) -> list[int]:
        """Number of scalars in each leaf."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def n(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def ravel(self, tree: Any) -> Float[Tensor, "*batch n"]:
        """Lay the leaves of ``tree`` end to end.

        Args:
            tree: a pytree of this layout with any leading batch dimensions.

        Returns:
            The flat vector ``[*batch, n]``.

        Raises:
            ValueError: the structure or a shape differs from the layout's.
        """
        leaves, treespec = pytree.tree_flatten(tree)
        if treespec != self.treespec:
            raise ValueError(
                f"expected a pytree with the leaves {self.names}, in this order, got {treespec}"
            )
        pieces = []
        for name, leaf, shape in zip(self.names, leaves, self.shapes, strict=True):
            batch = leaf.shape[: leaf.ndim - len(shape)]
            if tuple(leaf.shape[len(batch) :]) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(leaf.shape)}, expected [*batch, {shape}]"
                )
            pieces.append(leaf.reshape(*batch, math.prod(shape)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def unravel(self, flat: Float[Tensor, "*batch n"]) -> Any:
        """View the flat vector as the pytree.

        Args:
            flat: ``[*batch, n]``.

        Returns:
            The pytree, each leaf a view ``[*batch, *shape]`` of ``flat``.
        """
        batch = flat.shape[:-1]
        # One leaf needs no split, which would gather a sharded vector.
        pieces = [flat] if len(self.shapes) == 1 else flat.split_with_sizes(self.sizes, dim=-1)
        leaves = [
            p if len(s) == 1 else p.reshape((*batch, *s))  # each view is one more step of a graph
            for p, s in zip(pieces, self.shapes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.treespec)


def _check_leaf(
    name: str, leaf: Any, first_name: str, first: Any, batch_ndim: int, alone: bool
) -> None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        what = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {what}")
    whole = alone and leaf.ndim == batch_ndim + 1  # it is the flat vector
    if hasattr(leaf, "full_tensor") and not whole:  # a DTensor, whose module is slow to import
        raise TypeError(
            f"{name} is sharded (a {type(leaf).__name__}), but one flat vector needs all of it; with "
            "FSDP: fully_shard(meta), the MetaLearner as a whole and no module inside of it, and "
            'register_fsdp_forward_method(meta, "adapt") to call adapt by itself'
        )
    if leaf.dtype != first.dtype or leaf.device != first.device:
        raise ValueError(
            f"{name} is {leaf.dtype} on {leaf.device} but {first_name} is {first.dtype} on "
            f"{first.device}: bring all leaves to one dtype and device"
        )
    if leaf.ndim < batch_ndim or leaf.shape[:batch_ndim] != first.shape[:batch_ndim]:
        raise ValueError(
            f"{name} has shape {tuple(leaf.shape)}: with batch_ndim={batch_ndim} every leaf needs the "
            f"leading dimensions {tuple(first.shape[:batch_ndim])} of {first_name}"
        )
