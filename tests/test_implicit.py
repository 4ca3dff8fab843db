"""attach: the implicit gradient against closed forms, finite differences and long unrolls."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

import implicit_optim as iopt
from attached import EXACT, logistic, logistic_inputs, solved
from implicit_optim._vectors import Layout

pytestmark = pytest.mark.usefixtures("double")


def quadratic(n=50, kappa=50.0, lam=5.0):
    """The paper's F.1: phi^T A phi / 2 + phi^T b with condition number kappa of A + lam I."""
    q, _ = torch.linalg.qr(torch.randn(n, n))
    low = 1.0
    high = kappa * (low + lam) - lam
    A = q @ torch.diag(torch.linspace(low, high, n)) @ q.T
    return (A + A.T) / 2, torch.randn(n), torch.tensor(lam), low + lam, high + lam


def quadratic_objective(phi, theta, A, b):
    anchor, lam = theta
    return phi @ A @ phi / 2 + phi @ b + lam / 2 * (phi - anchor) @ (phi - anchor)


SOLVERS = {
    "gd": lambda mu, L: iopt.gd(lr=1 / L, max_steps=5000, tol=1e-11),
    "agd": lambda mu, L: iopt.agd(strong_convexity=mu, smoothness=L, max_steps=1000, tol=1e-11),
    "newton_cg": lambda mu, L: iopt.newton_cg(linear_solver=EXACT, tol=1e-11),
    "lbfgs": lambda mu, L: iopt.from_torch(
        torch.optim.LBFGS, max_steps=20, tolerance_grad=1e-12, tolerance_change=0.0, max_iter=50
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("tasks", [None, 3])
def test_quadratic_is_the_papers_closed_form(name, tasks):
    A, b, lam, mu, L = quadratic()
    n = len(b)
    theta, v = torch.randn(n, requires_grad=True), torch.randn(n)
    batch = () if tasks is None else (tasks,)
    bs = b + torch.randn(*batch, n)
    data = (A.expand(*batch, n, n), bs)
    solution = iopt.minimize(
        quadratic_objective, torch.zeros(*batch, n), (theta, lam), *data,
        solver=SOLVERS[name](mu, L), batch_ndim=len(batch),
    )  # fmt: skip
    damped = A + lam * torch.eye(n)
    exact = (torch.linalg.inv(damped) @ (lam * theta - bs).unsqueeze(-1)).squeeze(-1).detach()
    assert torch.linalg.vector_norm(solution.value - exact) <= 1e-8 * torch.linalg.vector_norm(
        exact
    )

    phi = iopt.attach(
        solution.value, quadratic_objective, (theta, lam), *data,
        linear_solver=EXACT, batch_ndim=len(batch),
    )  # fmt: skip
    (g,) = torch.autograd.grad((phi * v).sum(), theta)
    expected = lam * torch.linalg.solve(damped, v) * max(1, tasks or 1)
    assert torch.linalg.vector_norm(g - expected) <= 1e-10 * torch.linalg.vector_norm(expected)


def test_newton_cg_reaches_the_minimiser_of_a_quadratic_in_one_step():
    A, b, lam, *_ = quadratic()
    theta = torch.randn(50)
    solver = iopt.newton_cg(linear_solver=EXACT, max_steps=1)
    solution = iopt.minimize(
        quadratic_objective, torch.zeros(50), (theta, lam), A, b, solver=solver
    )
    exact = torch.linalg.solve(A + lam * torch.eye(50), lam * theta - b)
    assert torch.linalg.vector_norm(solution.value - exact) <= 1e-10 * torch.linalg.vector_norm(
        exact
    )


def test_gradient_equals_a_long_unroll():
    theta, lam, x, y = logistic_inputs()
    phi = torch.zeros(4)
    for _ in range(400):  # plain autograd through gradient descent; contracts by ~0.6 a step
        (g,) = torch.autograd.grad(
            logistic(phi if phi.requires_grad else phi.requires_grad_(), (theta, lam), x, y),
            phi, create_graph=True,
        )  # fmt: skip
        phi = phi - 0.5 * g
    v = torch.randn(4)
    unrolled = torch.autograd.grad(phi @ v, (theta, lam, x))
    implicit = torch.autograd.grad(solved(theta, lam, x, y) @ v, (theta, lam, x))
    for ours, theirs in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 2)])
def test_gradcheck_and_gradgradcheck_for_theta_lam_and_data(structured, batch):
    theta, lam, x, y = logistic_inputs(batch, n=3, examples=4)
    objective = logistic
    if structured:
        objective = iopt.Objective(
            lambda phi, x: x @ phi, lambda z, y: F.softplus(-y * z).mean(), iopt.proximal
        )

    def f(theta, lam, x):
        return solved(theta, lam, x, y, objective, batch_ndim=len(batch))

    fast = batch != ()  # one random direction instead of every entry
    assert gradcheck(f, (theta, lam, x), fast_mode=fast)
    assert gradgradcheck(f, (theta, lam, x), atol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("shape", ["scalar", "vector", "matrix"])
def test_gradient_with_respect_to_every_kind_of_lam(shape):
    theta, _, x, y = logistic_inputs(n=3)
    root = torch.randn(3, 3)
    lam = {
        "scalar": torch.tensor(0.5),
        "vector": torch.tensor([0.5, 1.0, 2.0]),
        "matrix": root @ root.T + torch.eye(3),
    }[shape].requires_grad_()

    def f(lam):
        lam = (lam + lam.mT) / 2 if lam.ndim == 2 else lam
        return solved(theta, lam, x, y)

    assert gradcheck(f, (lam,))


@pytest.mark.parametrize("shape", ["scalar", "vector", "matrix", "by name"])
def test_inverse_proximal_inverts_the_hessian_of_proximal(shape):
    phi = {"w": torch.randn(2), "b": torch.randn(())}
    layout, root = Layout.of(phi), torch.randn(3, 3)
    lam = {
        "scalar": torch.tensor(0.5),
        "vector": torch.tensor([0.5, 1.0, 2.0]),
        "matrix": root @ root.T + torch.eye(3),
        "by name": {"w": torch.tensor(0.5), "b": torch.tensor(2.0)},
    }[shape]
    theta, r = (phi, lam), torch.randn(3)
    hessian = torch.autograd.functional.hessian(
        lambda flat: iopt.proximal(layout.unravel(flat), theta), torch.randn(3)
    )
    solved = layout.ravel(iopt.inverse_proximal(layout.unravel(r), theta))
    torch.testing.assert_close(hessian @ solved, r, rtol=1e-12, atol=1e-12)


def test_vmap_of_grad_equals_a_loop():
    theta, lam, x, y = logistic_inputs((5,))
    theta, lam, x = theta.detach(), lam.detach(), x.detach()
    w = torch.randn(4)

    def loss(theta, lam, x, y):
        return torch.sin(solved(theta, lam, x, y)) @ w

    g = grad(loss, argnums=(0, 1, 2))
    for dims, args in {
        "data": ((None, None, 0, 0), (theta, lam, x, y)),
        "theta": ((0, 0, None, None), (torch.randn(5, 4), torch.rand(5) + 0.5, x[0], y[0])),
        "all": ((0, None, 0, 0), (torch.randn(5, 4), lam, x, y)),
    }.values():
        batched = vmap(g, in_dims=dims)(*args)
        rows = [
            [a if d is None else a[i] for a, d in zip(args, dims, strict=True)] for i in range(5)
        ]
        outside = grad(lambda *a: vmap(loss, in_dims=dims)(*a).sum(), argnums=(0, 1, 2))(*args)  # noqa: B023
        for k, (together, dim) in enumerate(zip(outside, dims, strict=False)):
            expected = batched[k] if dim == 0 else batched[k].sum(0)
            torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)
        for k, together in enumerate(batched):
            one_by_one = torch.stack([g(*row)[k] for row in rows])
            torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=1e-12)


def test_nested_vmap_and_batch_dimension_under_vmap():
    theta, lam, x, y = (t.detach() for t in logistic_inputs((2, 3)))
    thetas = torch.randn(2, 4)

    def loss(theta, x, y):
        return solved(theta, lam, x, y).square().sum()

    nested = vmap(vmap(grad(loss), in_dims=(None, 0, 0)))(thetas, x, y)
    loop = torch.stack(
        [torch.stack([grad(loss)(thetas[i], x[i, j], y[i, j]) for j in range(3)]) for i in range(2)]
    )
    torch.testing.assert_close(nested, loop, rtol=1e-10, atol=1e-12)

    def batched_loss(theta, x, y):
        return solved(theta, lam, x, y, batch_ndim=1).square().sum()

    torch.testing.assert_close(
        vmap(grad(batched_loss))(thetas, x, y), loop.sum(1), rtol=1e-10, atol=1e-12
    )


def test_jacrev_is_the_papers_jacobian():
    A, b, lam, *_ = quadratic(n=6)
    star = torch.linalg.solve(A + lam * torch.eye(6), lam * torch.ones(6) - b)

    def f(theta):
        return iopt.attach(star, quadratic_objective, (theta, lam), A, b, linear_solver=EXACT)

    expected = torch.linalg.inv(torch.eye(6) + A / lam)
    torch.testing.assert_close(jacrev(f)(torch.ones(6)), expected, rtol=1e-10, atol=1e-12)
