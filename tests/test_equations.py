"""attach to solutions of equations and to fixed points: closed forms, long iterations, transforms."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

import implicit_optim as iopt

EXACT = iopt.GMRES(rtol=1e-13)

pytestmark = pytest.mark.usefixtures("double")


def swirl(phi, theta, x):
    """A system that is no gradient: its Jacobian has a skew part, and moves with phi and theta."""
    turned = torch.stack([phi[1], -phi[0], phi[2] - phi[0]])
    return 2 * phi + theta["turn"] * turned + 0.1 * phi**3 - theta["push"] * x


def solved(theta, x, steps=12):
    """By Newton's method with dense Jacobians, differentiable by plain autograd if it is wanted."""
    phi = torch.zeros(3)
    for _ in range(steps):
        J = jacrev(swirl)(phi, theta, x)
        phi = phi - torch.linalg.solve(J, swirl(phi, theta, x))
    return phi


def inputs(batch=()):
    theta = {"turn": torch.tensor(0.7), "push": torch.tensor([1.0, -0.5, 2.0])}
    return theta, torch.randn(*batch, 3)


def attached(theta, x, batch_ndim=0, **kwargs):
    with torch.no_grad():
        plain = {name: t.detach() for name, t in theta.items()}
        flat = x.detach().reshape(-1, 3)
        phi = torch.stack([solved(plain, row) for row in flat]).reshape(x.shape)
    settings = {"linear_solver": EXACT, "batch_ndim": batch_ndim} | kwargs
    return iopt.attach(phi, iopt.Root(swirl), theta, x, **settings)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_root_is_the_derivative_of_a_differentiable_newton_iteration(batch):
    theta, x = inputs(batch)
    theta = {name: t.requires_grad_() for name, t in theta.items()}
    x.requires_grad_()
    v = torch.randn(*batch, 3)
    leaves = (*theta.values(), x)
    ours = torch.autograd.grad((attached(theta, x, len(batch)) * v).sum(), leaves)
    rows = [solved(theta, row) for row in x.reshape(-1, 3)]
    unrolled = torch.autograd.grad((torch.stack(rows).reshape(x.shape) * v).sum(), leaves)
    for one, other in zip(ours, unrolled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_root_gradcheck(batch):
    def f(turn, push, x):
        return attached({"turn": turn, "push": push}, x, len(batch))

    theta, x = inputs(batch)
    leaves = [t.requires_grad_() for t in (*theta.values(), x)]
    # gradcheck perturbs the leaves, and `attached` solves anew: finite differences of the solution.
    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves)


def test_root_under_transforms():
    theta, x = inputs((4,))
    phi = torch.stack([solved(theta, row) for row in x])

    def loss(theta, phi, x):
        solution = iopt.attach(phi, iopt.Root(swirl), theta, x, linear_solver=EXACT)
        return solution.square().sum()

    def oracle(theta, x):
        return solved(theta, x).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(theta, phi, x)
    expected = [grad(oracle)(theta, row) for row in x]
    for name, values in each.items():
        rows = torch.stack([e[name] for e in expected])
        torch.testing.assert_close(values, rows, rtol=1e-9, atol=1e-10)

    def solution(theta):
        return iopt.attach(phi[0], iopt.Root(swirl), theta, x[0], linear_solver=EXACT)

    forward, reverse = jacfwd(solution)(theta), jacrev(solution)(theta)
    dense = jacrev(lambda theta: solved(theta, x[0]))(theta)
    for name in theta:
        torch.testing.assert_close(forward[name], dense[name], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(reverse[name], dense[name], rtol=1e-9, atol=1e-10)


def test_stationarity_as_equations_is_the_minimum():
    """R = grad F: the same gradient as that of the minimum, with a solver for either."""

    def F(phi, theta, x):
        return (phi.cosh() - x * phi).sum() + theta * phi.prod() / 5

    theta, x = torch.tensor(0.3, requires_grad=True), torch.randn(4, requires_grad=True)
    data = (theta.detach(), x.detach())
    solver = iopt.newton_cg(linear_solver=iopt.CG(rtol=1e-12), tol=1e-13)
    phi = iopt.minimize(F, torch.zeros(4), *data, solver=solver).value
    minimum = iopt.attach(phi, F, theta, x, linear_solver=iopt.CG(rtol=1e-13))
    root = iopt.attach(phi, iopt.Root(grad(F)), theta, x, linear_solver=EXACT)
    v = torch.randn(4)
    for one, other in zip(
        torch.autograd.grad(minimum @ v, (theta, x)),
        torch.autograd.grad(root @ v, (theta, x)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_deep_equilibrium_against_a_long_iteration():
    """A layer that is iterated to its fixed point, as a pytree, for a batch of inputs."""

    def layer(phi, theta, x):
        h, s = phi["h"], phi["s"]
        return {"h": torch.tanh(theta["W"] @ h + x + s), "s": 0.3 * h.sum() * theta["a"]}

    W = torch.randn(5, 5)
    theta = {"W": 0.5 * W / torch.linalg.matrix_norm(W, 2), "a": torch.tensor(0.2)}
    theta = {name: t.detach().requires_grad_() for name, t in theta.items()}
    x = torch.randn(3, 5, requires_grad=True)

    def iterate(theta, x):
        phi = {"h": torch.zeros(3, 5), "s": torch.zeros(3)}
        for _ in range(300):
            phi = vmap(layer, in_dims=(0, None, 0))(phi, theta, x)
        return phi

    unrolled = iterate(theta, x)
    phi = {name: t.detach() for name, t in unrolled.items()}
    fixed = iopt.attach(phi, iopt.FixedPoint(layer), theta, x, linear_solver=EXACT, batch_ndim=1)
    leaves = (theta["W"], theta["a"], x)
    total = lambda phi: phi["h"].sin().sum() + phi["s"].square().sum()  # noqa: E731
    for one, other in zip(
        torch.autograd.grad(total(fixed), leaves),
        torch.autograd.grad(total(unrolled), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_root_from_scipy():
    theta, x = inputs()
    plain = lambda p: swirl(torch.from_numpy(p), theta, x).numpy()  # noqa: E731
    found = scipy.optimize.root(plain, np.zeros(3), method="hybr", tol=1e-13)
    push = theta["push"].clone().requires_grad_()
    phi = iopt.attach(torch.from_numpy(found.x), iopt.Root(swirl), theta | {"push": push}, x)
    phi.sum().backward()
    expected = jacrev(lambda push: solved(theta | {"push": push}, x).sum())(theta["push"])
    torch.testing.assert_close(push.grad, expected, rtol=1e-5, atol=1e-6)  # GMRES to 1e-6


def test_the_solve_is_heard_and_says_how_well_the_equations_are_met():
    theta, x = inputs((3,))
    push = theta["push"].requires_grad_()
    heard = []
    phi = torch.stack([solved(theta, row) for row in x]).detach() + torch.tensor(
        [[0.0], [0.1], [0]]
    )
    iopt.attach(
        phi,
        iopt.Root(swirl),
        theta,
        x,
        batch_ndim=1,
        on_solve=lambda name, solution: heard.append(solution),
    ).sum().backward()
    (solution,) = heard
    residual = torch.stack([swirl(p, theta, row) for p, row in zip(phi, x, strict=True)])
    torch.testing.assert_close(solution.stats["stationarity"], residual.norm(dim=-1).detach())
    assert solution.stats["stationarity"][1] > 0.1 and push.grad is not None


def test_errors_say_what_to_do():
    theta, x = inputs()
    root = iopt.Root(swirl)
    with pytest.raises(TypeError, match="Root has no value to minimise: .* attach the gradient"):
        iopt.minimize(root, torch.zeros(3), theta, x, solver=iopt.gd(lr=0.1))
    for solver in (iopt.CG(), iopt.MINRES(), iopt.Cholesky()):
        with pytest.raises(TypeError, match=r"needs a symmetric matrix.*use GMRES\(\)"):
            iopt.attach(torch.zeros(3), root, theta, x, linear_solver=solver)
    with pytest.raises(TypeError, match="GaussNewton needs the structure"):
        iopt.attach(torch.zeros(3), root, theta, x, curvature=iopt.GaussNewton)
    push = {"push": theta["push"].clone().requires_grad_()}
    short = iopt.Root(lambda phi, theta, x: swirl(phi, theta, x)[:2])
    with pytest.raises(ValueError, match=r"has shape \(2,\), expected"):
        iopt.attach(torch.zeros(3), short, theta | push, x).sum().backward()
    with pytest.raises(TypeError, match="objective must be callable"):
        iopt.attach(torch.zeros(3), 3.0, theta, x)


def test_equations_that_do_not_determine_the_solution_are_reported():
    line = iopt.Root(lambda phi, theta: torch.stack([phi.sum() - theta, phi.sum() - theta]))
    theta, heard = torch.tensor(1.0, requires_grad=True), []
    phi = iopt.attach(
        torch.tensor([0.5, 0.5]), line, theta, on_solve=lambda _, solution: heard.append(solution)
    )
    (phi @ torch.tensor([1.0, -1.0])).backward()
    assert heard[0].status.item() == iopt.Status.SINGULAR
    assert "do not determine" in heard[0].summary()
