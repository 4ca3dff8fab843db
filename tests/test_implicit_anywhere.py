"""attach takes a phi from anywhere: SciPy, early stopping, a line search."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import grad, vmap

import implicit_optim as iopt
from attached import EXACT, logistic, logistic_inputs, solved

pytestmark = pytest.mark.usefixtures("double")


def test_a_solver_outside_torch_gives_the_same_gradient():
    theta, lam, x, y = logistic_inputs()

    def f(p):
        return logistic(torch.from_numpy(p), (theta, lam), x, y).item()

    options = {"xatol": 1e-12, "fatol": 1e-15, "maxiter": 5000}
    found = scipy.optimize.minimize(f, np.zeros(4), method="Nelder-Mead", options=options)
    phi = iopt.attach(torch.from_numpy(found.x), logistic, (theta, lam), x, y, linear_solver=EXACT)
    v = torch.randn(4)
    outside = torch.autograd.grad(phi @ v, (theta, lam, x))
    ours = torch.autograd.grad(solved(theta, lam, x, y) @ v, (theta, lam, x))
    for a, b in zip(outside, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def by_scipy(f, init, tol):
    """BFGS, which knows nothing of torch; stops at `||grad|| <= tol`."""

    def both(p):
        p = torch.from_numpy(p).requires_grad_()
        value = f(p)
        return value.item(), torch.autograd.grad(value, p)[0].numpy()

    options = {"gtol": tol, "norm": 2}
    found = scipy.optimize.minimize(both, init.numpy(), jac=True, method="BFGS", options=options)
    return torch.from_numpy(found.x)


def by_early_stopping(f, init, tol):
    """Somebody's loop: Adam, stopped as soon as it is good enough, after who knows how many steps."""
    phi = init.clone().requires_grad_()
    opt = torch.optim.Adam([phi], lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.999)
    while True:
        opt.zero_grad()
        f(phi).backward()
        if phi.grad.norm() <= tol:
            return phi.detach()
        opt.step()
        schedule.step()


def by_line_search(f, init, tol):
    return iopt.minimize(lambda p, _: f(p), init, (), solver=iopt.newton_cg(tol=tol)).value


@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_solvers_that_cannot_be_differentiated_give_the_same_gradient(tol):
    """A line search, early stopping, a solver outside torch: all within what their tolerance allows."""
    theta, lam, x, y = logistic_inputs()
    v = torch.randn(4)
    (exact,) = torch.autograd.grad(solved(theta, lam, x, y) @ v, theta)
    data = theta.detach(), lam.detach(), x.detach(), y
    inputs = (theta, lam.detach()), data[2], y
    lipschitz = 0.0963 * data[2].norm(dim=1).pow(3).mean()  # of the Hessian: max |sigmoid''|

    def at(phi):
        heard = []
        phi = iopt.attach(
            phi, logistic, *inputs, linear_solver=EXACT, on_solve=lambda _, s: heard.append(s)
        )
        (gradient,) = torch.autograd.grad(phi @ v, theta)
        bound = iopt.error_bound(
            heard[0],
            lam=data[1],
            smoothness=0.0,
            hessian_lipschitz=lipschitz,
            strong_convexity=data[1],
        )
        return gradient, bound

    found = {}
    for solver in (by_scipy, by_early_stopping, by_line_search):
        phi = solver(lambda p: logistic(p, data[:2], *data[2:]), torch.zeros(4), tol)
        gradient, bound = at(phi)
        assert (gradient - exact).norm() <= bound + 1e-11
        assert bound <= 20 * tol
        found[solver] = phi
    points = list(found.values())
    apart = [(a - b).norm().item() for a, b in itertools.combinations(points, 2)]
    assert min(apart) > 1e-3 * tol  # they did not happen to end at one and the same point


def test_no_gradient_flows_into_phi_and_the_value_is_unchanged():
    theta, lam, x, y = logistic_inputs()
    phi = torch.randn(4, requires_grad=True)
    attached = iopt.attach(phi, logistic, (theta, lam), x, y)
    assert torch.equal(attached, phi)
    attached.sum().backward()
    assert phi.grad is None and theta.grad.abs().sum() > 0


def test_stationarity_is_reported():
    theta, lam, x, y = logistic_inputs((3,))
    phi = torch.randn(3, 4)
    heard = []
    attached = iopt.attach(
        phi, logistic, (theta, lam), x, y, batch_ndim=1, on_solve=lambda *a: heard.append(a)
    )
    attached.sum().backward()
    ((name, solution),) = heard
    each = vmap(grad(logistic), in_dims=(0, None, 0, 0))(phi, (theta, lam), x, y)
    assert name == "linear_solve"
    torch.testing.assert_close(solution.stats["stationarity"], each.norm(dim=-1))
