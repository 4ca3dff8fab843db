"""vmap of the value: over tasks, over theta alone, over any dimension, around a batch."""

import pytest
import torch
from torch.func import vmap

from transforms.cases import FIRST, SOLVES, case, close

TASKS = (3,)


@pytest.mark.parametrize("name", FIRST)
def test_over_the_tasks(name):
    this = case(name, TASKS)
    close(vmap(this.fn, this.dims)(*this.args), this.value)


@pytest.mark.parametrize("name", FIRST)
def test_over_the_tasks_each_with_a_theta_of_its_own(name):
    this = case(name, TASKS, (0,))
    close(vmap(this.fn, this.dims)(*this.args), this.value)


@pytest.mark.parametrize("name", FIRST)
def test_over_the_last_dimension(name):
    this = case(name, TASKS, (0,))
    moved = [arg.movedim(0, -1) for arg in this.args]
    dims = tuple(arg.ndim - 1 for arg in moved)
    close(vmap(this.fn, dims, out_dims=-1)(*moved).movedim(-1, 0), this.value)


@pytest.mark.parametrize("name", FIRST)
def test_around_a_batch(name):
    """The tasks inside are a batch of the library's own."""
    this = case(name, (2, 3))
    got = vmap(lambda *args: this.fn(*args, batch_ndim=1), this.dims)(*this.args)
    close(got, this.value)


@pytest.mark.parametrize("name", FIRST)
def test_nested(name):
    this = case(name, (2, 3))
    close(vmap(vmap(this.fn, this.dims), this.dims)(*this.args), this.value)


@pytest.mark.parametrize("name", SOLVES)
def test_over_one_argument_at_a_time(name):
    """All others are the same for all elements."""
    this = case(name)
    for k in this.argnums:
        several = torch.stack([(1 + i / 50) * this.args[k] for i in range(3)])
        dims = tuple(0 if i == k else None for i in range(len(this.args)))
        got = vmap(this.fn, dims)(*this.args[:k], several, *this.args[k + 1 :])
        loop = [this.plain(*this.args[:k], one, *this.args[k + 1 :]).detach() for one in several]
        close(got, torch.stack(loop))
