"""grad and backward: a closed form where there is one, else a loop of plain autograd."""

import pytest
import torch
from torch.func import grad
from torch.utils import _pytree as pytree

from problems import CONVEX
from transforms.cases import BATCHES, FIRST, attach, case, close, convex, tree


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_grad(name, batch):
    this = case(name, batch)
    v = this.cotangent
    expected = this.pulled
    close(this.whole(*this.moving), this.value)

    every = tuple(range(len(this.moving)))
    by_func = grad(lambda *moving: (this.whole(*moving) * v).sum(), every)(*this.moving)
    leaves = [m.detach().requires_grad_() for m in this.moving]
    by_autograd = torch.autograd.grad(this.whole(*leaves), leaves, v)
    for one, other, theirs in zip(by_func, by_autograd, expected, strict=True):
        close(one, theirs)
        close(other, theirs)


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_gradient_of_theta_is_the_closed_form(name, batch):
    """The closed forms share no code with autograd: they hold the oracle too."""
    zoo, this = CONVEX[name](batch), attach(convex(name), batch)
    v = this.cotangent
    exact = pytree.tree_leaves(zoo.meta_gradient(tree(v, zoo)))
    of_theta = tuple(range(len(exact)))
    ours = grad(lambda *moving: (this.whole(*moving) * v).sum(), of_theta)(*this.moving)
    for mine, plain, closed in zip(ours, this.pulled, exact, strict=False):
        close(mine, closed)
        close(plain, closed)
