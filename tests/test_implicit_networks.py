"""attach for networks with batch norm, to the second derivative, against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

import implicit_optim as iopt
from attached import EXACT
from implicit_optim._vectors import Layout

pytestmark = pytest.mark.usefixtures("double")


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


def test_conv_net_with_batch_norm_against_finite_differences():
    net = small_net()
    anchor = {k: p.detach() for k, p in net.named_parameters()}
    layout = Layout.of(anchor)
    x, y = torch.randn(2, 4, 1, 4, 4), torch.randint(0, 3, (2, 4))
    lam = torch.tensor(10.0)
    objective = iopt.Objective(
        lambda phi, x: functional_call(net, phi, (x,)), F.cross_entropy, iopt.proximal
    )

    def f(theta, lam, x):
        hyper = (layout.unravel(theta), lam)
        init = {k: p.expand(2, *p.shape) for k, p in anchor.items()}
        solver = iopt.newton_cg(linear_solver=EXACT, tol=1e-12, max_steps=40)
        solution = iopt.minimize(objective, init, hyper, x, y, solver=solver, batch_ndim=1)
        assert solution.status.tolist() == [0, 0]
        phi = iopt.attach(solution.value, objective, hyper, x, y, linear_solver=EXACT, batch_ndim=1)
        return layout.ravel(phi)

    theta = layout.ravel(anchor)
    v = torch.randn(2, layout.n)
    g, g_lam, g_x = grad(lambda *args: (f(*args) * v).sum(), argnums=(0, 1, 2))(theta, lam, x)
    for point, gradient, k in ((theta, g, 0), (lam, g_lam, 1), (x, g_x, 2)):
        direction = torch.randn_like(point)
        args = [theta, lam, x]
        ends = []
        for sign in (1, -1):
            args[k] = point + sign * 1e-5 * direction
            ends.append((f(*args) * v).sum())
        difference = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)


class WrittenOutBatchNorm(nn.Module):
    def forward(self, x):
        centred = x - x.mean(0)
        return centred / (centred.square().mean(0) + 1e-5).sqrt()


@pytest.mark.parametrize(
    "norm",
    [WrittenOutBatchNorm(), nn.BatchNorm1d(2, affine=False, track_running_stats=False)],
)
def test_second_derivatives_of_the_solution_through_batch_norm(norm):
    """A gradient of the meta-gradient needs third derivatives, which torch's batch norm lacks."""
    net = nn.Sequential(nn.Linear(3, 2), norm, nn.Tanh(), nn.Linear(2, 1))
    anchor = {k: p.detach() for k, p in net.named_parameters()}
    layout = Layout.of(anchor)
    x, y, lam = torch.randn(5, 3), torch.randn(5, 1), torch.tensor(10.0)
    objective = iopt.Objective(
        lambda phi, x: functional_call(net, phi, (x,)), F.mse_loss, iopt.proximal
    )
    theta, u, w = layout.ravel(anchor), torch.randn(layout.n), torch.randn(layout.n)

    def first(theta):
        def f(theta):
            hyper = (layout.unravel(theta), lam)
            solver = iopt.newton_cg(linear_solver=EXACT, tol=1e-12, max_steps=40)
            phi = iopt.minimize(objective, anchor, hyper, x, y, solver=solver).value
            return layout.ravel(iopt.attach(phi, objective, hyper, x, y, linear_solver=EXACT)) @ w

        return grad(f)(theta) @ u

    second = grad(first)(theta)
    direction = torch.randn(layout.n)
    difference = (first(theta + 1e-5 * direction) - first(theta - 1e-5 * direction)) / 2e-5
    error = ((second @ direction - difference) / difference).abs().item()
    assert error < 1e-5
