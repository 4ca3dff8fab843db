"""The baselines of the paper: MAML, truncated back-propagation, first-order MAML, Reptile.

Oracles: `higher`, the product of matrices that unrolling a quadratic is, and closed forms.
"""

import higher
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from memory import PeakMemory

LAM, LR, STEPS = 0.5, 0.08, 6


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def episodes(tasks=2):
    return [(torch.randn(tasks, 5, 3), torch.randn(tasks, 5, 1)) for _ in range(2)]


def descent(momentum, steps=STEPS):
    if momentum:
        return iopt.agd(lr=LR, momentum=momentum, max_steps=steps)
    return iopt.gd(lr=LR, max_steps=steps)


def learner(model, rule, solver=None, lam=LAM):
    solver = solver or descent(0.0)
    return iopt.MetaLearner(model, F.mse_loss, solver=solver, lam=lam, meta_gradient=rule)


def gradient(meta, support, query):
    grads = torch.autograd.grad(meta(support, query).mean(), list(meta.model.parameters()))
    return torch.cat([g.reshape(-1) for g in grads])


def by_higher(model, support, query, last, momentum):
    """Mean gradient through the last steps of STEPS, by higher's differentiable SGD."""
    total, tasks = 0, len(support[0])
    for x, y, xq, yq in zip(*support, *query, strict=True):
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, nesterov=momentum > 0)
        with higher.innerloop_ctx(model, sgd, track_higher_grads=True) as (net, inner):
            theta = list(net.parameters(time=0))
            for k in range(STEPS):
                if k == STEPS - last:  # forget the way here: parameters and momentum
                    net.update_params([p.detach().requires_grad_() for p in net.parameters()])
                    for group in inner.state:
                        for entry in group.values():
                            if entry.get("momentum_buffer") is not None:
                                entry["momentum_buffer"] = entry["momentum_buffer"].detach()
                pairs = zip(net.parameters(), theta, strict=True)
                near = sum((p - a).square().sum() for p, a in pairs)
                inner.step(F.mse_loss(net(x), y) + LAM / 2 * near)
            g = torch.autograd.grad(F.mse_loss(net(xq), yq), theta)
        total = total + torch.cat([t.reshape(-1) for t in g]) / tasks
    return total


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_truncated_is_higher_with_a_cut(last, momentum):
    model, (support, query) = network(), episodes()
    ours = gradient(learner(model, iopt.Truncated(last), descent(momentum)), support, query)
    theirs = by_higher(model, support, query, last, momentum)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_unrolled_is_higher(momentum):
    model, (support, query) = network(), episodes()
    ours = gradient(learner(model, iopt.Unrolled(), descent(momentum)), support, query)
    theirs = by_higher(model, support, query, STEPS + 1, momentum)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("last", [STEPS, STEPS + 3])
def test_truncated_at_every_step_is_unrolled(last):
    model, (support, query) = network(), episodes()
    whole = gradient(learner(model, iopt.Truncated(last)), support, query)
    unrolled = gradient(learner(model, iopt.Unrolled()), support, query)
    torch.testing.assert_close(whole, unrolled, rtol=0, atol=0)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x @ self.phi


@pytest.mark.parametrize("last", [1, 3, 8])
def test_truncated_on_a_quadratic_is_a_sum_of_powers(last):
    """phi <- M phi + lr lam theta - ...: the last k steps have d phi / d theta = lr lam sum M^j."""
    rng = np.random.default_rng(0)
    x, y, v = rng.normal(size=(7, 3)), rng.normal(size=7), rng.normal(size=3)
    model = Linear()
    meta = learner(model, iopt.Truncated(last), iopt.gd(lr=0.1, max_steps=20))
    phi = meta.adapt((torch.tensor(x)[None], torch.tensor(y)[None]))["phi"][0]
    (ours,) = torch.autograd.grad(phi @ torch.tensor(v), model.phi)
    M = np.eye(3) - 0.1 * (2 / 7 * x.T @ x + LAM * np.eye(3))
    powers = sum(np.linalg.matrix_power(M, j) for j in range(last))
    np.testing.assert_allclose(ours.numpy(), 0.1 * LAM * powers.T @ v, rtol=1e-12)


def test_the_memory_of_truncated_is_that_of_its_last_steps():
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1))
    support, query = episodes(8)

    def peak(rule, steps):
        meta = learner(model, rule, iopt.gd(lr=0.01, max_steps=steps))
        with PeakMemory() as memory:
            gradient(meta, support, query)
        return memory.peak

    peak(iopt.Truncated(2), 4)
    assert peak(iopt.Truncated(2), 64) == peak(iopt.Truncated(2), 16)
    assert peak(iopt.Unrolled(), 64) > 2 * peak(iopt.Truncated(2), 64)


NAMED = {"0.weight": 0.5, "0.bias": 1.0, "2.weight": 2.0, "2.bias": 0.3}


@pytest.mark.parametrize("lam", [LAM, NAMED])
def test_first_order_is_implicit_with_no_cg_step(lam):
    model, (support, query) = network(), episodes()
    none = gradient(learner(model, iopt.Implicit(iopt.CG(max_steps=0)), lam=lam), support, query)
    first = gradient(learner(model, iopt.FirstOrder(), lam=lam), support, query)
    torch.testing.assert_close(none, first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", [None, iopt.newton_cg(max_steps=3)])
def test_reptile_is_theta_minus_phi(solver):
    model, (support, query) = network(), episodes(3)
    meta = learner(model, iopt.Reptile(), solver)
    weights = torch.tensor([0.5, 2.0, -1.0])
    losses = meta(support, query)
    grads = torch.autograd.grad(losses @ weights, list(model.parameters()))
    phi = meta.adapt(support)
    for g, (name, p) in zip(grads, model.named_parameters(), strict=True):
        by_hand = torch.einsum("t,t...->...", weights, p.detach() - phi[name])
        torch.testing.assert_close(g, by_hand, rtol=1e-12, atol=1e-14)
    for i in range(3):  # the value is that of the query loss
        own = {n: t[i] for n, t in phi.items()}
        loss = F.mse_loss(torch.func.functional_call(model, own, query[0][i]), query[1][i])
        torch.testing.assert_close(losses[i], loss, rtol=1e-12, atol=1e-14)


def test_reptile_at_the_solution_is_the_slope_of_the_support_loss():
    """Appendix A: theta - phi = grad Lhat(phi) / lam there."""
    model, (support, query) = network(), episodes(1)
    meta = learner(model, iopt.Reptile(), iopt.gd(lr=0.3, max_steps=800))
    g = gradient(meta, support, query)
    phi = {n: t[0].requires_grad_() for n, t in meta.adapt(support).items()}
    fit = F.mse_loss(torch.func.functional_call(model, phi, support[0][0]), support[1][0])
    slope = torch.cat([t.reshape(-1) for t in torch.autograd.grad(fit, list(phi.values()))])
    torch.testing.assert_close(g, slope / LAM, rtol=1e-8, atol=1e-10)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.empty(0))

    def forward(self, x):
        return self.scale * x + self.nothing.sum()


def test_reptile_with_scalar_and_empty_parameters():
    model, x = Odd(), torch.ones(2, 3, 1)
    meta = learner(model, iopt.Reptile())
    meta((x, 0 * x), (x, x)).mean().backward()
    expected = (2 - meta.adapt((x, 0 * x))["scale"]).mean()
    torch.testing.assert_close(model.scale.grad, expected, rtol=1e-12, atol=1e-14)


def test_truncated_says_what_it_needs():
    support, query = episodes()
    with pytest.raises(ValueError, match="Invalid steps: 0"):
        iopt.Truncated(0)
    with pytest.raises(TypeError, match=r"Truncated\(steps=2\) needs a solver .* gd or agd"):
        learner(network(), iopt.Truncated(2), iopt.newton_cg(max_steps=2))(support, query)
    with pytest.raises(ValueError, match=r"tol > 0 .* set tol=0 and max_steps"):
        learner(network(), iopt.Truncated(2), iopt.gd(lr=LR, tol=1e-3))(support, query)
