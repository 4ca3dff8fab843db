"""Forward mode: jvp, jacfwd, both over and under reverse mode, and torch's plain dual numbers."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, jvp, vmap

from transforms.cases import BATCHES, FIRST, SECOND, case, close

SECOND_ORDER = {
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_jvp(name, batch):
    this = case(name, batch)
    value, change = jvp(this.whole, this.moving, this.tangents)
    close(value, this.value)
    close(change, this.pushed)


@pytest.mark.parametrize("name", FIRST)
def test_jvp_along_one_argument_at_a_time(name):
    """Which, one after the other, make up the whole change."""
    this, parts = case(name, (3,)), []
    for k, direction in enumerate(this.tangents):

        def alone(m, k=k):
            return this.whole(*this.moving[:k], m, *this.moving[k + 1 :])

        parts.append(jvp(alone, (this.moving[k],), (direction,))[1])
    close(sum(parts), this.pushed)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_dual_numbers(name, batch):
    this = case(name, batch)
    with forward_ad.dual_level():
        pairs = zip(this.moving, this.tangents, strict=True)
        value = this.whole(*(forward_ad.make_dual(m, t) for m, t in pairs))
        change = forward_ad.unpack_dual(value).tangent
    close(change, this.pushed)


@pytest.mark.parametrize("name", FIRST)
def test_vmap_jvp(name):
    this = case(name, (3,), (0,))

    def one(args, along):
        return jvp(lambda *moving: this.fn(*this.put(args, moving)), this.pick(args), along)[1]

    close(vmap(one)(this.args, this.tangents), this.pushed)


@pytest.mark.parametrize("name", FIRST)
def test_jacfwd(name):
    plane = case(name).plane
    close(jacfwd(plane.fn)(plane.origin), plane.jacobian)


@pytest.mark.parametrize("order", SECOND_ORDER)
@pytest.mark.parametrize("name", SECOND)
def test_second_order(name, order):
    plane = case(name).plane
    close(SECOND_ORDER[order](plane.fn)(plane.origin), plane.hessian)


@pytest.mark.parametrize("name", SECOND)
def test_dual_numbers_through_the_backward_pass(name):
    """Hessian-vector product, forward over reverse, without torch.func."""
    plane = case(name).plane
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    with forward_ad.dual_level():
        s = forward_ad.make_dual(plane.origin.requires_grad_(), direction)
        (gradient,) = torch.autograd.grad(plane.fn(s).sum(), s, create_graph=True)
        change = forward_ad.unpack_dual(gradient).tangent
    close(change.detach(), plane.hessian.sum(0) @ direction)
