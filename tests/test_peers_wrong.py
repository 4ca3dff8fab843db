"""Ours against TorchOpt where it is wrong or refuses; dense algebra is the arbiter.

Its answer is written down next to the dense one: the test fails on the day they mend it, and then
`docs/peers.md`, which names these tests, has a row to correct.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian, jacobian

import implicit_optim as iopt
from peers import (
    EXACT,
    NEWTON,
    THEIR_CG,
    custom_root,
    error_of,
    flat,
    fresh,
    old_names,
    our_gradient,
    our_phi,
    random,
    torchopt,
    torchopt_gradient,
    torchopt_phi,
    written_out,
)
from problems import indefinite, logistic, ridge, spd, tanh_mlp

OUR_DEFAULT = iopt.CG()
THEIR_INVERSE = torchopt.linear_solve.solve_inv()
THEIR_DEFAULT = None  # CG on the normal equations to a relative residual of 1e-5

pytestmark = pytest.mark.usefixtures("double")


def test_torchopts_default_solve_is_far_off_where_ours_is_not():
    """CG on the normal equations squares the condition number; its 1e-5 is of that residual."""
    problem = ridge(1e4, n=100)
    v = random(100)
    args = (written_out(problem), problem.minimiser, problem.theta, v)
    exact = problem.meta_gradient(v)
    assert error_of(our_gradient(*args, OUR_DEFAULT), exact) <= 1e-5
    assert error_of(torchopt_gradient(*args), exact) <= 1e-11
    assert error_of(torchopt_gradient(*args, THEIR_DEFAULT), exact) > 0.1


def test_torchopts_solve_inv_keeps_only_the_diagonal_blocks():
    """Two unknowns in two tensors, `phi.A phi / 2 - theta.phi`: the gradient is `A^-1 v`."""
    matrix, v = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 0.0])

    def joined(phi, theta):
        return phi @ matrix @ phi / 2 - theta @ phi

    def split(phi, theta):
        return joined(torch.cat(phi), theta)

    zero, theta = torch.zeros(2), (torch.zeros(2),)
    exact = torch.tensor([2.0, -1.0]) / 3
    apart = split, zero.split(1), theta, v.split(1)
    torch.testing.assert_close(our_gradient(joined, zero, theta, v)[0], exact)
    torch.testing.assert_close(torchopt_gradient(*apart)[0], exact)
    torch.testing.assert_close(torchopt_gradient(joined, zero, theta, v, THEIR_INVERSE)[0], exact)
    wrong = torch.tensor([0.5, 0.0])  # 1 / A[0, 0]
    torch.testing.assert_close(torchopt_gradient(*apart, THEIR_INVERSE)[0], wrong)


def test_torchopts_solve_inv_on_a_network():
    """The dense Hessian without what couples its four tensors, to the last digits."""
    lam = 0.5
    problem = tanh_mlp(lam=lam)
    sizes = [t.numel() for t in problem.init.values()]
    shapes = [t.shape for t in problem.init.values()]
    x, y = problem.data
    anchor, v = problem.flat(problem.theta[0]), random(sum(sizes))

    def split(flat):
        return tuple(p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True))

    def objective(phi, anchor):
        b1, b2, w1, w2 = phi
        fit = F.cross_entropy(torch.tanh(x @ w1 + b1) @ w2 + b2, y)
        return fit + lam / 2 * (flat(phi) - anchor).square().sum()

    phi = anchor
    for _ in range(12):
        value = lambda p: objective(split(p), anchor)  # noqa: E731
        phi = phi - torch.linalg.solve(hessian(value, phi), jacobian(value, phi))
    A = hessian(value, phi)
    blocks = torch.block_diag(*(torch.ones(n, n) for n in sizes))
    exact, wrong = (lam * torch.linalg.solve(m, v) for m in (A, A * blocks))

    theta = {k: p.detach().clone().requires_grad_() for k, p in problem.theta[0].items()}
    args = (problem.objective, (theta, problem.theta[1]), x, y)
    found = iopt.minimize(args[0], theta, *args[1:], solver=NEWTON)
    attached = iopt.attach(found.value, *args, linear_solver=EXACT)
    ours = torch.autograd.grad(problem.flat(attached) @ v, list(theta.values()))
    theirs = [
        torchopt_gradient(objective, split(phi), (anchor,), split(v), solve)[0]
        for solve in (THEIR_CG, THEIR_INVERSE)
    ]
    assert error_of([flat(ours)], [exact]) <= 1e-11
    assert error_of([theirs[0]], [exact]) <= 1e-11
    assert error_of([theirs[1]], [wrong]) <= 1e-11
    assert error_of([wrong], [exact]) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("solve", [THEIR_CG, THEIR_DEFAULT])
def test_torchopts_gradient_of_a_scalar_unknown_is_zero(solve):
    """`phi^2 / 2 + (phi - theta)^2 / 2` has phi = theta / 2; a 0-d phi gets no CG iteration."""

    def objective(phi, theta):
        return (phi.square() + (phi - theta).square()).sum() / 2

    for shape, theirs in (((1,), 0.5), ((), 0.0)):
        args = (objective, torch.full(shape, 1.5), (torch.full(shape, 3.0),), torch.ones(shape))
        for solver in (EXACT, OUR_DEFAULT):
            torch.testing.assert_close(our_gradient(*args, solver)[0], torch.full(shape, 0.5))
        torch.testing.assert_close(torchopt_gradient(*args, solve)[0], torch.full(shape, theirs))
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        torchopt_gradient(*args, THEIR_INVERSE)


def pulled_to_two(phi, lam):
    """`phi = 2 lam / (1 + lam)`; `phi^2 / 2` has the second derivative `4 (1 - 2 lam) / (1 + lam)^4`."""
    return phi.square().sum() / 2 + lam / 2 * (phi - 2).square().sum()


def second_derivative(phi_of, lam, minimiser):
    lam = torch.tensor(lam, requires_grad=True)
    loss = phi_of(pulled_to_two, torch.tensor([minimiser]), (lam,)).square().sum() / 2
    (g,) = torch.autograd.grad(loss, lam, create_graph=True)
    return g.item(), torch.autograd.grad(g, lam)[0].item()


@old_names()
def test_torchopts_second_derivative_is_wrong_without_a_word():
    """Theta is detached inside its backward: the first derivative is right, the second is not."""
    ours = second_derivative(our_phi, 3.0, 1.5)
    assert ours == pytest.approx((12 / 64, -5 / 64), rel=1e-12)
    theirs = second_derivative(torchopt_phi, 3.0, 1.5)
    assert theirs == pytest.approx((12 / 64, -2 / 64), rel=1e-12)


@old_names()
def test_torchopts_second_derivative_takes_the_cg_coefficients_for_constants():
    """One CG step solves for this v; as a function of v that step is another matrix than A^-1."""
    scale, target = torch.tensor([1.0, 3.0]), torch.tensor([-0.5, 0.5])

    def objective(phi, theta):  # phi = theta / (1 + scale)
        return (scale * phi.square()).sum() / 2 + (phi - theta).square().sum() / 2

    def loss_hessian(phi_of):
        theta = torch.tensor([1.0, 2.0], requires_grad=True)
        phi = phi_of(objective, theta.detach() / (1 + scale), (theta,))
        (g,) = torch.autograd.grad((phi - target).square().sum() / 2, theta, create_graph=True)
        return torch.stack([torch.autograd.grad(k, theta, retain_graph=True)[0] for k in g])

    diagonal = lambda *d: torch.diag(torch.tensor(d))  # noqa: E731
    torch.testing.assert_close(loss_hessian(our_phi), diagonal(1 / 4, 1 / 16))
    torch.testing.assert_close(loss_hessian(torchopt_phi), diagonal(1 / 4, 1 / 8))


def logistic_second_derivative(phi_of, lam):
    problem = logistic(lam=lam)
    anchor, lam = problem.theta[0], fresh([problem.theta[1]])[0]
    objective = lambda phi, lam: written_out(problem)(phi, anchor, lam)  # noqa: E731
    loss = phi_of(objective, problem.minimiser, (lam,)).square().sum() / 2
    (g,) = torch.autograd.grad(loss, lam, create_graph=True)
    return torch.autograd.grad(g, lam)[0].item()


@old_names()
def test_torchopts_second_derivative_on_logistic_regression():
    """Against differences of NumPy's exact first derivative."""

    def first(lam):
        problem = logistic(lam=lam)
        return problem.meta_gradient(problem.minimiser)[1].item()

    h = 1e-4
    numeric = (8 * (first(0.2 + h) - first(0.2 - h)) - first(0.2 + 2 * h) + first(0.2 - 2 * h)) / (
        12 * h
    )
    assert logistic_second_derivative(our_phi, 0.2) == pytest.approx(numeric, rel=1e-7)
    wrong = logistic_second_derivative(torchopt_phi, 0.2)
    assert abs(wrong - numeric) > 0.1 * abs(numeric)


@pytest.mark.parametrize("solve", [THEIR_CG, THEIR_DEFAULT])
def test_torchopts_gradient_of_a_nan_loss_is_zero(solve):
    """A NaN right-hand side ends its CG before the first step."""
    problem = ridge(1e2)
    args = (written_out(problem), problem.minimiser, problem.theta)
    v = torch.full((5,), math.nan)
    assert all(g.isnan().all() for g in problem.meta_gradient(v))
    assert all(g.isnan().all() for g in our_gradient(*args, v))
    for g in torchopt_gradient(*args, v, solve):
        assert torch.equal(g, torch.zeros_like(g))  # of either sign


def test_torchopts_cg_meets_negative_curvature_in_silence():
    """`A = diag(1, -1.001)`, `b = (1, 1)`: the exact solution is `(1, -1 / 1.001)`."""
    matrix, b = torch.diag(torch.tensor([1.0, -1.001])), torch.ones(2)
    first = torchopt.linear_solve.solve_cg(rtol=1e-14, maxiter=1)(lambda x: matrix @ x, b)
    torch.testing.assert_close(first, -2000 * b, rtol=1e-9, atol=0)  # b.b / b.Ab = 2 / -0.001
    ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(max_steps=1))
    assert ours.status == iopt.Status.NEGATIVE_CURVATURE
    assert torch.equal(ours.value, b)

    matrix[1, 1] = -1.0  # b.Ab = 0
    with pytest.raises(ZeroDivisionError):
        torchopt.linear_solve.solve_cg()(lambda x: matrix @ x, b)
    ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(rtol=1e-12))
    assert ours.status == iopt.Status.NEGATIVE_CURVATURE
    assert torch.equal(ours.value, b)


@old_names()
def test_torchopts_normal_equations_solve_an_indefinite_system_and_our_cg_does_not():
    """There is no minimum and so no meta-gradient; but as a linear system it has a solution."""
    matrix, b = spd(0, 6, eigenvalues=np.linspace(-1.5, 3, 6))
    dense = scipy.linalg.solve(matrix.numpy(), b.numpy(), assume_a="sym")
    theirs = torchopt.linear_solve.solve_normal_cg(rtol=1e-13)(lambda x: matrix @ x, b)
    assert np.linalg.norm(theirs.numpy() - dense) <= 1e-9 * np.linalg.norm(dense)
    ours = iopt.linear_solve(iopt.Dense(matrix), b, EXACT)
    assert ours.status == iopt.Status.NEGATIVE_CURVATURE
    assert np.linalg.norm(ours.value.numpy() - dense) > 0.1 * np.linalg.norm(dense)


def test_our_floor_under_the_curvature_would_lose_what_torchopt_keeps():
    """A smallest eigenvalue of 0.05 beside lam = 1.55: definite, but below `min_curvature = 0.1`.

    That floor is the default of a few steps; with a tolerance there is none.
    """
    problem = indefinite(lam=1.55)
    (matrix, _), (anchor, lam) = problem.data[0], problem.theta
    v = random(6)
    exact = lam * torch.linalg.solve(matrix + lam * torch.eye(6), v)
    theirs = torchopt_gradient(
        lambda phi, anchor: written_out(problem)(phi, anchor, lam), problem.minimiser, (anchor,), v
    )
    assert error_of(theirs, [exact]) <= 1e-10

    ours = {}
    for floor in (0.1, None):
        (theta,), heard = fresh([anchor]), []
        attached = iopt.attach(
            problem.minimiser,
            problem.objective,
            (theta, lam),
            *problem.data,
            linear_solver=iopt.CG(rtol=1e-13, max_steps=500, min_curvature=floor),
            on_solve=lambda name, solution: heard.append(solution.status.item()),  # noqa: B023
        )
        ours[floor] = torch.autograd.grad(attached @ v, theta), heard
    assert ours[None][1] == [iopt.Status.SUCCESS] and error_of(ours[None][0], [exact]) <= 1e-10
    assert ours[0.1][1] == [iopt.Status.NEGATIVE_CURVATURE]
    assert error_of(ours[0.1][0], [exact]) > 0.1


TRANSFORMS = {
    "grad": lambda f, theta: torch.func.grad(lambda t: f(t).sum())(theta),
    "jacrev": lambda f, theta: torch.func.jacrev(f)(theta).diagonal(),
    "vmap": lambda f, theta: torch.func.vmap(f)(theta.expand(3, 2))[1] / theta,
    "vmap of grad": lambda f, theta: torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(
        theta.expand(3, 2)
    )[1],
    "jvp": lambda f, theta: torch.func.jvp(f, (theta,), (torch.ones(2),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torchopt_under_the_transforms_of_torch_func(transform):
    """It refuses them all; ours agree with the inverse."""
    scale, theta = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])

    def objective(phi, theta):  # phi = theta / (1 + scale)
        return (scale * phi.square()).sum() / 2 + (phi - theta).square().sum() / 2

    apply = TRANSFORMS[transform]
    with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
        apply(lambda t: torchopt_phi(objective, t.detach() / (1 + scale), (t,)), theta)

    def ours(theta):
        return our_phi(objective, theta.detach() / (1 + scale), (theta,))

    torch.testing.assert_close(apply(ours, theta), 1 / (1 + scale), rtol=1e-12, atol=0)


@old_names()
def test_torchopts_argnums_must_start_at_one():
    """`argnums=2` alone, which its documentation allows, raises in backward."""

    def slope(phi, scale, theta):
        return scale * phi - theta

    @custom_root(slope, argnums=2, solve=THEIR_CG)
    def solver(init, scale, theta):
        return theta.detach() / scale

    scale, theta = torch.tensor([2.0, 4.0]), torch.ones(2, requires_grad=True)
    with pytest.raises(IndexError, match="tuple index out of range"):
        solver(torch.zeros(2), scale, theta).sum().backward()

    def objective(phi, t, scale):
        return (scale * phi.square()).sum() / 2 - (t * phi).sum()

    iopt.attach(theta.detach() / scale, objective, theta, scale).sum().backward()
    torch.testing.assert_close(theta.grad, 1 / scale)
