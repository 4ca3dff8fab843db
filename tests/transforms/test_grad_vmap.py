"""grad of a sum over vmap: shared arguments add up over the tasks."""

import pytest
import torch
from torch.func import grad, vmap

from transforms.cases import FIRST, case, close

TASKS = (3,)


@pytest.mark.parametrize("own", [None, (0,)], ids=["theta shared", "theta per task"])
@pytest.mark.parametrize("name", FIRST)
def test_grad_vmap(name, own):
    this = case(name, TASKS, own)
    v = this.cotangent

    def total(*args):
        return (vmap(this.fn, this.dims)(*args) * v).sum()

    by_func = grad(total, this.argnums)(*this.args)
    args = list(this.args)
    leaves = [args[i].detach().requires_grad_() for i in this.argnums]
    for i, leaf in zip(this.argnums, leaves, strict=True):
        args[i] = leaf
    by_autograd = torch.autograd.grad(total(*args), leaves)
    for one, other, theirs in zip(by_func, by_autograd, this.pulled, strict=True):
        close(one, theirs)
        close(other, theirs)


@pytest.mark.parametrize("name", FIRST)
def test_grad_of_nested_vmap(name):
    this = case(name, (2, 3))
    v = this.cotangent
    both = vmap(vmap(this.fn, this.dims), this.dims)
    ours = grad(lambda *args: (both(*args) * v).sum(), this.argnums)(*this.args)
    for mine, theirs in zip(ours, this.pulled, strict=True):
        close(mine, theirs)
