"""ProximalGradient: the steps of the rule, per-group strengths, exact zeros."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Lasso

from implicit_optim import L1, minimize, proximal_gradient
from implicit_optim.optim import GD, ProximalGradient

F64 = torch.float64
RNG = np.random.default_rng(0)
X = torch.from_numpy(RNG.standard_normal((20, 6)))
Y = X @ torch.tensor([2.0, -1.0, 0, 0, 0, 0], dtype=F64) + torch.from_numpy(
    0.3 * RNG.standard_normal(20)
)
LR = 1 / torch.linalg.eigvalsh(X.T @ X / 20).max().item()


def fit(phi, theta=None):
    return ((X @ phi - Y) ** 2).mean() / 2


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("lr", [LR, torch.tensor(LR, dtype=F64)])
def test_equals_the_rule_step_by_step(foreach, lr):
    w = torch.ones(6, dtype=F64, requires_grad=True)
    opt = ProximalGradient([w], lr=lr, l1=0.2, foreach=foreach)
    for k in range(1, 30):
        opt.zero_grad()
        fit(w).backward()
        opt.step()
        rule = proximal_gradient(lr=LR, max_steps=k)
        expected = minimize(L1(fit, 0.2), torch.ones(6, dtype=F64), (), solver=rule).value
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(w == 0, expected == 0)
    assert (w == 0).any()


def test_a_plain_loop_comes_to_scikit_learns_lasso():
    w = torch.zeros(6, dtype=F64, requires_grad=True)
    opt = ProximalGradient([w], lr=LR, l1=0.1)

    def closure():
        opt.zero_grad()
        value = fit(w)
        value.backward()
        return value

    for _ in range(300):
        opt.step(closure)
    exact = Lasso(alpha=0.1, fit_intercept=False, tol=1e-15).fit(X.numpy(), Y.numpy()).coef_
    np.testing.assert_allclose(w.detach(), exact, rtol=0, atol=1e-8)
    assert ((w == 0).numpy() == (exact == 0)).all()


@pytest.mark.parametrize("foreach", [True, False])
def test_groups_have_strengths_of_their_own(foreach):
    w, b, frozen, unused = (torch.full((2,), 1.0, dtype=F64, requires_grad=True) for _ in "wbfu")
    frozen.requires_grad_(False)
    groups = [{"params": [w, frozen, unused]}, {"params": [b], "l1": 0.0}]
    opt = ProximalGradient(groups, lr=0.5, l1=1.0, foreach=foreach)
    opt.add_param_group({"params": [extra := torch.ones(1, dtype=F64)], "l1": 0.5})
    for p in (w, b, extra):
        p.grad = torch.full_like(p, 0.2)
    opt.step()
    assert [p.tolist() for p in (w, b)] == [pytest.approx([0.4] * 2), pytest.approx([0.9] * 2)]
    assert extra.item() == pytest.approx(0.65)
    assert frozen.tolist() == unused.tolist() == [1.0, 1.0]


@given(
    seed=st.integers(0, 999),
    l1=st.floats(0, 3),
    lr=st.floats(1e-3, 2),
    foreach=st.booleans(),
    maximize=st.booleans(),
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_the_step_minimises_its_model(seed, l1, lr, foreach, maximize, dtype):
    """Of `g.p + ||p||^2 / (2 lr) + l1 |w + p|_1` zero is in the subgradient, number by number."""
    torch.manual_seed(seed)
    w, g = torch.randn(20, dtype=dtype, requires_grad=True), torch.randn(20, dtype=dtype)
    before, w.grad = w.detach().clone(), -g if maximize else g
    ProximalGradient([w], lr=lr, l1=l1, foreach=foreach, maximize=maximize).step()
    rest = -(g + (w.detach() - before) / lr)
    tolerance = 100 * torch.finfo(dtype).eps * (1 + 1 / lr) * 4
    on = w.detach() != 0
    assert ((rest - l1 * w.detach().sign())[on].abs() <= tolerance).all()
    assert (rest[~on].abs() <= l1 + tolerance).all()


def test_resumed_in_the_middle_of_a_schedule():
    def run(w, opt, schedule, steps):
        for _ in range(steps):
            opt.zero_grad()
            fit(w).backward()
            opt.step()
            schedule.step()

    def make(w):
        opt = ProximalGradient([w], lr=LR, l1=0.1)
        return opt, torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)

    whole = torch.ones(6, dtype=F64, requires_grad=True)
    run(whole, *make(whole), 6)
    w = torch.ones(6, dtype=F64, requires_grad=True)
    opt, schedule = make(w)
    run(w, opt, schedule, 3)
    again = w.detach().clone().requires_grad_()
    fresh, later = make(again)
    fresh.load_state_dict(opt.state_dict())
    later.load_state_dict(schedule.state_dict())
    run(again, fresh, later, 3)
    assert torch.equal(again, whole)


def test_without_a_norm_it_is_gradient_descent():
    w, v = (torch.ones(6, dtype=F64, requires_grad=True) for _ in "wv")
    one, two = ProximalGradient([w], lr=LR, l1=0.0), GD([v], lr=LR)
    for _ in range(5):
        for p, opt in ((w, one), (v, two)):
            opt.zero_grad()
            fit(p).backward()
            opt.step()
    assert torch.equal(w, v)
