"""vmap(grad(f)): a gradient for every task, against a loop of plain autograd."""

import pytest
import torch
from torch.func import grad, vmap

from transforms.cases import FIRST, case, close

TASKS = (3,)


def gradient(this, **kwargs):
    """`(v, *args) -> d <v, value> / d argument`, by the library."""
    of = tuple(i + 1 for i in this.argnums)
    return grad(lambda v, *args: (this.fn(*args, **kwargs) * v).sum(), of)


@pytest.mark.parametrize("own", [None, (0,)], ids=["theta shared", "theta per task"])
@pytest.mark.parametrize("name", FIRST)
def test_vmap_grad(name, own):
    this = case(name, TASKS, own)
    v = this.cotangent
    together = vmap(gradient(this), (0, *this.dims))(v, *this.args)
    for ours, theirs in zip(together, this.each, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("name", FIRST)
def test_over_the_cotangent_alone(name):
    this = case(name)
    v = this.cotangent
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=v.dtype)
    together = vmap(gradient(this), (0, *(None,) * len(this.args)))(
        factors[:, None] * v, *this.args
    )
    for ours, theirs in zip(together, this.each, strict=True):
        close(ours, torch.stack([factor * theirs for factor in factors]))


@pytest.mark.parametrize("name", FIRST)
def test_over_the_last_dimension(name):
    this = case(name, TASKS, (0,))
    v = this.cotangent
    moved = [arg.movedim(0, -1) for arg in (v, *this.args)]
    together = vmap(gradient(this), tuple(arg.ndim - 1 for arg in moved))(*moved)
    for ours, theirs in zip(together, this.each, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("name", FIRST)
def test_around_a_batch(name):
    """A gradient for each of two batches of three tasks, whose tasks add up where they share."""
    this = case(name, (2, 3))
    v = this.cotangent
    together = vmap(gradient(this, batch_ndim=1), (0, *this.dims))(v, *this.args)
    for i, ours, theirs in zip(this.argnums, together, this.each, strict=True):
        close(ours, theirs if this.mapped[i] else theirs.sum(1))
