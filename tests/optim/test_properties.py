"""Properties that hold for parameters of any shape, in any order, interrupted anywhere."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import CG
from implicit_optim.optim import GD, NesterovAGD, NewtonCG, NonlinearCG, ProximalGradient

F64 = torch.float64
shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)
JOINT = NewtonCG, NonlinearCG
classes = st.sampled_from([GD, NesterovAGD, functools.partial(ProximalGradient, l1=0.3)])


def leaves(shapes, seed, dtype=F64):
    torch.manual_seed(seed)
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def loss(params):
    """Smooth, strictly convex, different for each entry, coupled across parameters."""
    total = sum(p.sum() for p in params) ** 2 / 16
    for p in params:
        weights = 1 + torch.arange(p.numel(), dtype=p.dtype).view(p.shape) / max(p.numel(), 1)
        total = total + (weights * p).cosh().log().sum()
    return total


def backward(opt, params):
    opt.zero_grad()
    value = loss(params)
    value.backward()
    return value


def walk(opt, params, steps):
    for _ in range(steps):
        if isinstance(opt, NewtonCG):
            opt.step(lambda: loss(params))
        else:
            opt.step(lambda: backward(opt, params))
    return [p.detach().clone() for p in params]


@given(cls=classes, shapes=shapes, seed=st.integers(0, 99), maximize=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_foreach_equals_single(cls, shapes, seed, maximize, dtype, tensor_lr):
    results = []
    for foreach in (True, False):
        params = leaves(shapes, seed, dtype)
        lr = torch.tensor(0.03, dtype=dtype) if tensor_lr else 0.03
        opt = cls(params, lr=lr, foreach=foreach, maximize=maximize)
        sign = -1 if maximize else 1
        for _ in range(4):
            opt.zero_grad()
            (sign * loss(params)).backward()
            opt.step()
        xs = [opt.state[p]["x"] for p in params] if cls is NesterovAGD else []
        results.append([*(p.detach() for p in params), *xs])
    tolerance = 100 * torch.finfo(dtype).eps
    start = leaves(shapes, seed, dtype)
    for many, one, before in zip(*results, start + start, strict=False):
        torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)
        assert many.numel() == 0 or not torch.equal(many, before)


@given(
    cls=st.sampled_from([GD, NesterovAGD, *JOINT]),
    shapes=shapes,
    seed=st.integers(0, 99),
    cut=st.integers(0, 5),
)
def test_interrupted_equals_uninterrupted(cls, shapes, seed, cut):
    settings = {} if cls in JOINT else {"lr": 0.03}
    whole = leaves(shapes, seed)
    expected = walk(cls(whole, **settings), whole, 5)
    first = leaves(shapes, seed)
    opt = cls(first, **settings)
    walk(opt, first, cut)
    second = [p.detach().clone().requires_grad_() for p in first]
    resumed = cls(second, **settings)
    resumed.load_state_dict(opt.state_dict())
    for a, b in zip(walk(resumed, second, 5 - cut), expected, strict=True):
        assert torch.equal(a, b)
    state = resumed.state[second[0]]
    if cls in JOINT:
        assert state["n_iter"] == 5
    if cls is NesterovAGD:
        assert torch.equal(state["x"], walkx(shapes, seed))


def walkx(shapes, seed):
    """The last x of the first parameter after five uninterrupted steps."""
    params = leaves(shapes, seed)
    opt = NesterovAGD(params, lr=0.03)
    walk(opt, params, 5)
    return opt.state[params[0]]["x"]


@given(
    cls=st.sampled_from([GD, NesterovAGD, *JOINT]),
    shapes=shapes,
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_order_of_the_parameters_does_not_matter(cls, shapes, seed, data):
    order = data.draw(st.permutations(range(len(shapes))))
    settings = {NewtonCG: {"linear_solver": CG(max_steps=6)}, NonlinearCG: {}}
    settings = settings.get(cls, {"lr": 0.03})
    a, b = leaves(shapes, seed), leaves(shapes, seed)
    results = walk(cls(a, **settings), a, 3), walk(cls([b[i] for i in order], **settings), b, 3)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@given(shapes=shapes, seed=st.integers(0, 99), lr=st.floats(0.1, 4.0))
def test_newton_cg_never_goes_up(shapes, seed, lr):
    params = leaves(shapes, seed)
    opt = NewtonCG(params, lr=lr)
    before = loss(params).item()
    for _ in range(4):
        assert opt.step(lambda: loss(params)).item() == before
        after = loss(params).item()
        assert after <= before * (1 + 1e-14)
        if opt.state[params[0]]["step_length"] > 0 and opt.state[params[0]]["grad_norm"] > 1e-3:
            assert after < before
        before = after
