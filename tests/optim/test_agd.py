"""NesterovAGD against SGD(nesterov=True), its own rule in `minimize`, the formula, the theory."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from implicit_optim import agd, minimize
from implicit_optim.optim import GD, NesterovAGD

F64 = torch.float64


def quadratic(seed, n, kappa):
    """A with eigenvalues in [1/kappa, 1], both ends attained, and the minimiser of x.Ax/2 - b.x."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]
    eigenvalues = torch.logspace(0, -math.log10(kappa), n, dtype=F64)
    return basis * eigenvalues @ basis.T, torch.randn(n, dtype=F64)


def descend(opt, x, A, minimiser, steps):
    """Take steps on the quadratic; yield after each."""
    for _ in range(steps):
        opt.zero_grad()
        ((x - minimiser) @ A @ (x - minimiser) / 2).backward()
        opt.step()
        yield


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_equals_sgd_nesterov_at_constant_lr(foreach, maximize, momentum):
    def trajectory(make):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        net.to(F64)
        opt, points = make(net.parameters()), []
        for _ in range(40):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            points.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
        return torch.stack(points)

    x, y = torch.randn(20, 4, dtype=F64), torch.arange(20) % 3
    settings = {"lr": 0.05, "momentum": momentum, "maximize": maximize}
    ours = trajectory(lambda ps: NesterovAGD(ps, **settings, foreach=foreach))
    theirs = trajectory(lambda ps: torch.optim.SGD(ps, nesterov=True, **settings))
    plain = trajectory(lambda ps: torch.optim.SGD(ps, lr=0.05, maximize=maximize))
    assert (theirs - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_equals_the_rule_in_minimize():
    A, minimiser = quadratic(1, 6, 50.0)
    x = torch.zeros(6, dtype=F64, requires_grad=True)
    opt = NesterovAGD([x], strong_convexity=0.02, smoothness=1.0, foreach=False)
    for _ in descend(opt, x, A, minimiser, 15):
        pass
    solution = minimize(
        lambda phi, theta: (phi - theta) @ A @ (phi - theta) / 2,
        torch.zeros(6, dtype=F64),
        minimiser,
        solver=agd(strong_convexity=0.02, smoothness=1.0, max_steps=15),
    )
    torch.testing.assert_close(x.detach(), solution.value, rtol=1e-13, atol=1e-13)


@given(seed=st.integers(0, 99), n=st.integers(2, 8), kappa=st.floats(1.0, 1e3))
def test_falls_as_fast_as_theory_says(seed, n, kappa):
    A, minimiser = quadratic(seed, n, kappa)
    mu = 1 / kappa
    x = torch.zeros(n, dtype=F64, requires_grad=True)
    opt = NesterovAGD([x], strong_convexity=mu, smoothness=1.0)
    start = (minimiser @ A @ minimiser / 2 + mu / 2 * minimiser @ minimiser).item()
    for k, _ in enumerate(descend(opt, x, A, minimiser, 60), start=1):
        error = opt.state[x]["x"] - minimiser
        gap = (error @ A @ error / 2).item()
        assert gap <= (1 - math.sqrt(mu)) ** k * start * (1 + 1e-9) + 1e-14


def test_is_faster_than_gradient_descent():
    A, minimiser = quadratic(0, 10, 400.0)
    x, z = (torch.zeros(10, dtype=F64, requires_grad=True) for _ in range(2))
    for _ in descend(
        NesterovAGD([x], strong_convexity=1 / 400, smoothness=1.0), x, A, minimiser, 200
    ):
        pass
    for _ in descend(GD([z], lr=1.0), z, A, minimiser, 200):
        pass
    assert (x - minimiser).norm() < 1e-3 * (z - minimiser).norm()


@pytest.mark.parametrize("foreach", [True, False])
def test_keeps_to_the_formula_when_lr_and_momentum_change(foreach):
    curvature, target = np.array([1.0, 0.3]), np.array([2.0, -1.0])
    y = x = np.array([0.5, 0.5])
    p = torch.tensor(y, requires_grad=True)
    opt = NesterovAGD([p], lr=0.9, momentum=0.8, foreach=foreach)
    for lr, momentum in [(0.9, 0.8), (0.9, 0.8), (0.3, 0.8), (0.6, 0.2), (0.0, 0.5), (0.5, 0.0)]:
        opt.param_groups[0].update(lr=lr, momentum=momentum)
        opt.zero_grad()
        (torch.tensor(curvature) * (p - torch.tensor(target)) ** 2 / 2).sum().backward()
        opt.step()
        x_next = y - lr * curvature * (y - target)
        y, x = x_next + momentum * (x_next - x), x_next
        np.testing.assert_allclose(p.detach().numpy(), y, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(opt.state[p]["x"].numpy(), x, rtol=1e-14, atol=1e-14)


def test_x_lies_in_memory_as_the_parameter_does():
    p = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    p.grad = torch.ones_like(p)
    opt = NesterovAGD([p], lr=0.5, momentum=0.5)
    opt.step()
    assert opt.state[p]["x"].stride() == p.stride() == (60, 1, 15, 3)
    assert opt.state[p]["x"].unique().item() == 0.5


def test_the_pair_sets_lr_and_momentum():
    a, b, c = (torch.zeros(1, requires_grad=True) for _ in range(3))
    groups = [
        {"params": [a]},
        {"params": [b], "strong_convexity": 4.0, "smoothness": 100.0},
        {"params": [c], "lr": 0.5},
    ]
    opt = NesterovAGD(groups, strong_convexity=1.0, smoothness=9.0)
    assert [g["lr"] for g in opt.param_groups] == [1 / 9, 1 / 100, 0.5]
    assert [g["momentum"] for g in opt.param_groups] == pytest.approx([0.5, 8 / 12, 0.5])
    assert all("smoothness" not in g for g in opt.param_groups)
    assert "smoothness" in groups[1]  # the caller's own dict is left alone
    assert NesterovAGD([a], lr=0.1).param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "give lr"),
        ({"lr": -1.0}, "Invalid lr: -1.0"),
        ({"lr": 0.1, "momentum": 1.0}, "Invalid momentum: 1.0"),
        ({"lr": 0.1, "strong_convexity": 1.0, "smoothness": 2.0}, "not both"),
        ({"strong_convexity": 1.0}, "belong together"),
        ({"strong_convexity": 3.0, "smoothness": 2.0}, "strong_convexity <= smoothness"),
    ],
)
def test_settings_that_do_not_fit(settings, match):
    p = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match=match):
        NesterovAGD([p], **settings)
    if settings:
        opt = NesterovAGD([torch.zeros(1)], lr=0.1)
        with pytest.raises(ValueError, match=match):
            opt.add_param_group({"params": [p], **settings})
        assert len(opt.param_groups) == 1


def test_trains_a_classifier():
    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    opt = NesterovAGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)
    for _ in range(10):
        for rows in torch.randperm(1500).split(50):
            opt.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            opt.step()
        scheduler.step()
    accuracy = (net(x[1500:]).argmax(-1) == y[1500:]).float().mean().item()
    assert accuracy > 0.9
