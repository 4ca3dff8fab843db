"""What torch expects of every optimizer: schedulers, groups, dtypes, gradients of every kind."""

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

from implicit_optim import CG, FixedStep
from implicit_optim.optim import GD, NesterovAGD, NewtonCG, NonlinearCG, TrustRegion
from optimizers import (
    FIRST_ORDER,
    JOINT,
    X,
    Y,
    both_paths,
    each,
    each_first_order,
    flat,
    make,
    network,
    step,
    train,
)


@pytest.mark.parametrize(
    "cls", [*FIRST_ORDER, NewtonCG]
)  # the others: no lr, or another first trial
@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5), [0.2, 0.2, 0.1, 0.1]),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 2), [0.2, 0.1, 0.0, 0.1]),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0), [0.2, 0.2, 0.02, 0.002]),
        (lambda o: lr_scheduler.LambdaLR(o, lambda k: k / 2), [0.0, 0.1, 0.2, 0.3]),
    ],
    ids=["step", "cosine", "plateau", "warm-up"],
)
def test_schedulers(cls, scheduler, expected):
    settings = {"linear_solver": CG(max_steps=3), "line_search": FixedStep(1.0)}
    x = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    opt = make(cls, [x], lr=0.2, **(settings if cls is NewtonCG else {}))
    schedule = scheduler(opt)
    rates = []
    for _ in range(4):
        at, rate = x.detach().clone(), opt.param_groups[0]["lr"]
        step(opt, lambda: x.square().sum() / 2)  # the gradient is x, Newton's direction -x
        new = opt.state[x]["x"] if cls is NesterovAGD else x.detach()
        torch.testing.assert_close(new, at - rate * at, rtol=1e-12, atol=1e-15)
        rates.append(rate)
        schedule.step(*([1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    assert rates == pytest.approx(expected, abs=1e-12)


def test_one_cycle_moves_the_momentum_too():
    x = torch.ones(1, requires_grad=True)
    opt = NesterovAGD([x], lr=0.1)
    schedule = lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5, pct_start=0.5)
    seen = []
    for _ in range(4):
        step(opt, lambda: x.square().sum())
        seen.append(opt.param_groups[0]["momentum"])
        schedule.step()
    assert (seen[0], min(seen)) == pytest.approx((0.95, 0.85), abs=2e-2)


@each_first_order
@both_paths
def test_add_param_group(cls, foreach):
    a, b, twin_a, twin_b = (
        torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(4)
    )
    opt = make(cls, [a], lr=0.1, foreach=foreach)
    one, two = make(cls, [twin_a], lr=0.1), make(cls, [twin_b], lr=0.3)
    for k in range(4):
        if k == 2:
            opt.add_param_group({"params": b, "lr": 0.3})
        opt.zero_grad()
        (a.cosh() + b.cosh()).sum().backward()
        opt.step()
        step(one, lambda: twin_a.cosh().sum())
        if k >= 2:
            step(two, lambda: twin_b.cosh().sum())
    torch.testing.assert_close(a, twin_a, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(b, twin_b, rtol=1e-14, atol=1e-14)
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.3]


@pytest.mark.parametrize("cls", JOINT)
def test_it_has_one_group(cls):
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="give all of them in one list"):
        cls([{"params": [a]}, {"params": [b]}])
    opt = cls([a])
    with pytest.raises(ValueError, match=f"{cls.__name__} takes one parameter group"):
        opt.add_param_group({"params": [b]})
    assert len(opt.param_groups) == 1
    assert opt.status is None


@each
def test_named_parameters(cls):
    net, twin = network(), network()
    named = make(cls, net.named_parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(train(named, net, 2), train(make(cls, twin.parameters()), twin, 2))


@each
def test_maximize(cls):
    up, down = (torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True) for _ in "ab")
    rising, falling = make(cls, [up], maximize=True), make(cls, [down])
    for _ in range(3):
        step(rising, lambda: -up.cosh().sum())
        step(falling, lambda: down.cosh().sum())
        assert torch.equal(up, down)
    assert up.abs().max() < 1.0


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_stays(cls, dtype):
    net = network(dtype)
    opt = make(cls, net.parameters())
    before = F.cross_entropy(net(X.to(dtype)), Y).item()
    assert train(opt, net, 5).dtype == dtype
    assert F.cross_entropy(net(X.to(dtype)), Y).item() < before - 0.01
    tensors = [v for s in opt.state.values() for v in s.values() if torch.is_tensor(v)]
    assert all(v.dtype == dtype for v in tensors)
    assert len(tensors) == {NesterovAGD: 4, NonlinearCG: 3}.get(cls, 0)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("cls", [GD, NesterovAGD])
def test_a_wider_tensor_lr_leaves_a_number_its_dtype(cls, foreach):
    """Two 0-d tensors promote: a float32 number met a float64 learning rate."""
    x, y = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    momentum = {"momentum": 0.9} if cls is NesterovAGD else {}
    opt = cls([x], lr=torch.tensor(0.1, dtype=torch.float64), foreach=foreach, **momentum)
    sgd = torch.optim.SGD([y], lr=0.1, nesterov=bool(momentum), **momentum)
    for _ in range(3):
        for one, z in ((opt, x), (sgd, y)):
            one.zero_grad()
            (z**2 / 2).backward()
            one.step()
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, y)
    assert all(v.dtype == torch.float32 for v in opt.state[x].values())


@each
def test_shapes_and_gradients_of_every_kind(cls):
    def leaf(*shape, grad=True):
        return torch.full(shape, 2.0, dtype=torch.float64, requires_grad=grad)

    scalar, empty, one, matrix = leaf(), leaf(0, 3), leaf(1), leaf(2, 2)
    frozen, unused = leaf(2, grad=False), leaf(3)
    opt = make(cls, [frozen, scalar, empty, one, matrix, unused])
    twin = torch.full((6,), 2.0, dtype=torch.float64, requires_grad=True)
    twin_opt = make(cls, [twin])
    for _ in range(3):
        step(
            opt,
            lambda: (
                scalar.cosh() + sum(q.cosh().sum() for q in (empty, one, matrix * frozen[0] / 2))
            ),
        )
        step(twin_opt, lambda: twin.cosh().sum())
    torch.testing.assert_close(flat([scalar, one, matrix]), twin.detach(), rtol=1e-12, atol=1e-14)
    assert twin.detach().max() < 1.9
    assert frozen.tolist() == [2.0, 2.0]
    assert unused.tolist() == [2.0, 2.0, 2.0]


@each
def test_tied_parameters_move_once(cls):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).double()
    net[1].weight = net[0].weight
    assert len(list(net.parameters())) == 3
    start = flat(net.parameters())
    x = torch.eye(3, dtype=torch.float64)
    settings = {NonlinearCG: {"line_search": FixedStep(0.1)}}
    settings[NewtonCG] = {"line_search": FixedStep(1.0), "linear_solver": CG(max_steps=1)}
    settings[NewtonCG]["damping"] = 9.0
    settings[TrustRegion] = {"cg_steps": 1, "damping": 9.0}
    opt = make(cls, net.parameters(), **settings.get(cls, {}))
    loss = net(x).square().sum() / 2
    grad = flat(torch.autograd.grad(loss, list(net.parameters())))
    step(opt, lambda: net(x).square().sum() / 2)
    moved = flat(net.parameters()) - start
    if cls in JOINT:
        length = moved.norm() / grad.norm()
        assert 0 < length < 1
    else:
        length = 0.2 * (1.9 if cls is NesterovAGD else 1.0)
    torch.testing.assert_close(moved, -length * grad, rtol=1e-10, atol=1e-12)
