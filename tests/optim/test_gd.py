"""GD against torch.optim.SGD, its own rule in `minimize`, and the theory of quadratics."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from implicit_optim import gd, minimize
from implicit_optim.optim import GD

F64 = torch.float64


def mlp(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return net.to(F64)


def quadratic(seed, n, kappa):
    """A with eigenvalues in [1/kappa, 1], both ends attained, and the minimiser of x.Ax/2 - b.x."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]
    eigenvalues = torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), n, dtype=F64)
    minimiser = torch.randn(n, dtype=F64)
    return basis * eigenvalues @ basis.T, minimiser


def run(opt, net, x, y, steps):
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("maximize", [False, True])
def test_equals_sgd(foreach, maximize):
    x, y = torch.randn(20, 4, dtype=F64), torch.arange(20) % 3
    ours, theirs = mlp(), mlp()
    settings = {"lr": 0.3, "maximize": maximize}
    a = run(GD(ours.parameters(), **settings, foreach=foreach), ours, x, y, 25)
    b = run(torch.optim.SGD(theirs.parameters(), **settings), theirs, x, y, 25)
    assert (b - torch.cat([p.reshape(-1) for p in mlp().parameters()])).norm() > 0.1
    if foreach:  # one fused multiply-add, as torch has it
        assert torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_equals_the_rule_in_minimize():
    A, minimiser = quadratic(1, 6, 10.0)
    x = torch.zeros(6, dtype=F64, requires_grad=True)
    opt = GD([x], lr=0.7, foreach=False)
    for _ in range(12):
        opt.zero_grad()
        ((x - minimiser) @ A @ (x - minimiser) / 2).backward()
        opt.step()
    solution = minimize(
        lambda phi, theta: (phi - theta) @ A @ (phi - theta) / 2,
        torch.zeros(6, dtype=F64),
        minimiser,
        solver=gd(lr=0.7, max_steps=12),
    )
    torch.testing.assert_close(x.detach(), solution.value, rtol=1e-14, atol=1e-14)


@given(seed=st.integers(0, 99), n=st.integers(2, 8), kappa=st.floats(1.5, 200.0))
def test_contracts_as_fast_as_theory_says(seed, n, kappa):
    A, minimiser = quadratic(seed, n, kappa)
    x = torch.zeros(n, dtype=F64, requires_grad=True)
    opt = GD([x], lr=1.0)  # 1 / L
    start = minimiser.norm()
    for k in range(1, 31):
        opt.zero_grad()
        ((x - minimiser) @ A @ (x - minimiser) / 2).backward()
        opt.step()
        error = (x.detach() - minimiser).norm()
        assert error <= (1 - 1 / kappa) ** k * start * (1 + 1e-10) + 1e-12


@pytest.mark.parametrize("foreach", [True, False])
def test_a_tensor_lr_is_read_anew_each_step(foreach):
    lr = torch.tensor(0.5, dtype=F64)
    x = torch.tensor([8.0, -4.0], dtype=F64, requires_grad=True)
    opt = GD([x], lr=lr, foreach=foreach)
    for value, expected in [(0.5, [4.0, -2.0]), (0.25, [3.0, -1.5]), (0.0, [3.0, -1.5])]:
        lr.fill_(value)
        opt.zero_grad()
        (x**2 / 2).sum().backward()
        opt.step()
        assert x.tolist() == expected


def test_groups_have_their_own_lr():
    a, b = (torch.ones(2, dtype=F64, requires_grad=True) for _ in range(2))
    opt = GD([{"params": [a]}, {"params": [b], "lr": 0.125, "maximize": True}], lr=0.5)
    (a.sum() + b.sum()).backward()
    opt.step()
    assert (a.tolist(), b.tolist()) == ([0.5, 0.5], [1.125, 1.125])
    opt.param_groups[0]["lr"] = 0.25
    opt.step()
    assert (a.tolist(), b.tolist()) == ([0.25, 0.25], [1.25, 1.25])


def test_mixed_dtypes_and_layouts():
    params = [
        torch.ones(3, dtype=torch.float32, requires_grad=True),
        torch.ones(2, 3, dtype=F64).T.contiguous().T.requires_grad_(),  # not contiguous
        torch.ones((), dtype=torch.float32, requires_grad=True),
    ]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, i + 1.0)
    GD(params, lr=0.25, foreach=True).step()
    for i, p in enumerate(params):
        assert torch.equal(p.detach(), torch.full_like(p, 1 - 0.25 * (i + 1)))
    assert [p.dtype for p in params] == [torch.float32, F64, torch.float32]


def test_trains_a_classifier():
    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    opt = GD(net.parameters(), lr=0.5)
    for _ in range(15):
        for rows in torch.randperm(1500).split(50):
            opt.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            opt.step()
    accuracy = (net(x[1500:]).argmax(-1) == y[1500:]).float().mean().item()
    assert accuracy > 0.9
