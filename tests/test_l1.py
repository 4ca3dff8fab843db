"""Sparse models: the lasso against scikit-learn, its gradients against finite differences of it."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from torch.func import grad, jvp, vmap

import implicit_optim as iopt
from implicit_optim._problem.l1 import soft_threshold
from problems import BATCHES

F64 = torch.float64
EXACT = iopt.CG(rtol=1e-12, max_steps=200)


def fit(phi, theta, x, y):
    return ((x @ phi - y) ** 2).mean() / 2


LASSO = iopt.L1(fit, strength=lambda theta: theta)


def data(batch=(), count=40, n=8, seed=0):
    """A regression in which three of the numbers matter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*batch, count, n))
    truth = np.r_[2.0, -1.0, 1.5, np.zeros(n - 3)]
    y = x @ truth + 0.5 * rng.standard_normal((*batch, count))
    return torch.from_numpy(x), torch.from_numpy(y)


def smoothness(x):
    return torch.linalg.eigvalsh(x.mT @ x / x.shape[-2]).max().item()


def oracle(x, y, s):
    """Coordinate descent by scikit-learn, to the last digits."""
    model = Lasso(alpha=float(s), fit_intercept=False, tol=1e-15, max_iter=100_000)
    return model.fit(np.asarray(x), np.asarray(y)).coef_


def solve(x, y, s, init=None, batch_ndim=0, objective=LASSO, **settings):
    settings = {"accelerated": True, "tol": 1e-11, "max_steps": 3000, **settings}
    solver = iopt.proximal_gradient(lr=1 / smoothness(x), **settings)
    init = torch.zeros(*x.shape[:-2], x.shape[-1], dtype=x.dtype) if init is None else init
    return iopt.minimize(objective, init, s, x, y, solver=solver, batch_ndim=batch_ndim)


def number(s, **settings):
    return torch.tensor(s, dtype=F64, **settings)


# -- the solution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("s", [0.02, 0.3])
def test_is_scikit_learns_lasso(s, batch, accelerated):
    x, y = data(batch)
    solution = solve(x, y, number(s), batch_ndim=len(batch), accelerated=accelerated)
    assert (solution.status == 0).all()
    assert (solution.stats["grad_norm"] <= 1e-11).all()
    for i in np.ndindex(batch):
        exact = oracle(x[i], y[i], s)
        np.testing.assert_allclose(solution.value[i], exact, rtol=0, atol=1e-8)
        assert ((solution.value[i] == 0).numpy() == (exact == 0)).all()
    if s == 0.3:
        assert (solution.value == 0).any()


@given(seed=st.integers(0, 9999), n=st.integers(1, 8), share=st.floats(0.05, 1.2))
def test_optimality_conditions(seed, n, share):
    """Of the subgradient: `grad = -s sign` on the support, `|grad| <= s` beside it."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((4 * n, n)))
    y = torch.from_numpy(rng.standard_normal(4 * n))
    largest = (x.T @ y / (4 * n)).abs().max()
    s = share * largest
    phi = solve(x, y, s, tol=1e-10, max_steps=3000).value
    slope = x.T @ (x @ phi - y) / (4 * n)
    support = phi != 0
    torch.testing.assert_close(slope[support], -s * phi.sign()[support], rtol=0, atol=1e-9)
    assert (slope[~support].abs() <= s + 1e-9).all()
    if share >= 1:
        assert not support.any()


def test_acceleration_takes_fewer_steps():
    x, y = data(seed=1, count=16)
    plain, fast = (solve(x, y, number(0.01), accelerated=a, tol=1e-6) for a in (False, True))
    assert fast.stats["steps"] < plain.stats["steps"] / 2


@pytest.mark.parametrize("accelerated", [False, True])
def test_steps_are_those_of_the_papers_formula(accelerated):
    """ISTA and FISTA with restart, in NumPy."""
    x, y = (t.numpy() for t in data(seed=2))
    lr, s, count = 1 / smoothness(torch.from_numpy(x)), 0.05, len(y)
    z = last = np.ones(8)
    t = 1.0
    for k in range(1, 31):
        u = z - lr * x.T @ (x @ z - y) / count
        point = np.sign(u) * np.maximum(np.abs(u) - lr * s, 0)
        if k in (1, 2, 3, 9, 20, 30):
            solver = iopt.proximal_gradient(lr=lr, accelerated=accelerated, max_steps=k)
            tensors = (torch.ones(8, dtype=F64), number(s), *map(torch.from_numpy, (x, y)))
            ours = iopt.minimize(LASSO, *tensors, solver=solver)
            np.testing.assert_allclose(ours.value, point, rtol=1e-11, atol=1e-13)
            mapping = np.linalg.norm(z - point) / lr
            assert ours.stats["grad_norm"].item() == pytest.approx(mapping, rel=1e-8)
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        momentum = (t - 1) / t_next
        if (z - point) @ (point - last) > 0:
            t_next, momentum = 1.0, 0.0
        z = point + momentum * (point - last) if accelerated else point
        last, t = point, t_next


def test_batch_equals_loop_and_nan_stays_in_its_task():
    x, y = data((3,))
    whole = solve(x, y, number(0.1), batch_ndim=1)
    for i in range(3):
        lr = {"lr": 1 / smoothness(x)}
        solver = iopt.proximal_gradient(**lr, accelerated=True, tol=1e-11, max_steps=3000)
        init = torch.zeros(8, dtype=F64)
        alone = iopt.minimize(LASSO, init, number(0.1), x[i], y[i], solver=solver)
        torch.testing.assert_close(whole.value[i], alone.value, rtol=1e-9, atol=1e-11)
        assert whole.stats["steps"][i] == alone.stats["steps"]
    y = y.clone()
    y[1, 0] = torch.nan
    for tol in (0.0, 1e-11):
        settings = {"tol": tol, "max_steps": 150, "accelerated": True}
        solver = iopt.proximal_gradient(lr=1 / smoothness(x), **settings)
        init = torch.ones(3, 8, dtype=F64)
        solution = iopt.minimize(LASSO, init, number(0.1), x, y, solver=solver, batch_ndim=1)
        assert solution.status.tolist() == [0, iopt.Status.NONFINITE.value, 0]
        assert torch.equal(solution.value[1], init[1])
        torch.testing.assert_close(solution.value[::2], whole.value[::2], rtol=0, atol=1e-9)


def test_strengths_by_name_and_by_number():
    """An intercept without a penalty, and another strength for each number."""
    x, y = data()
    each = torch.linspace(0.05, 0.4, 8, dtype=F64)

    def affine(phi, theta, x, y):
        return ((x @ phi["w"] + phi["b"] - y) ** 2).mean() / 2

    penalised = iopt.L1(affine, strength=lambda theta: {"b": 0.0, "w": theta})
    init = {"w": torch.zeros(8, dtype=F64), "b": torch.zeros((), dtype=F64)}  # in another order
    solver = iopt.proximal_gradient(lr=0.2, accelerated=True, tol=1e-12, max_steps=3000)
    phi = iopt.minimize(penalised, init, each, x, y, solver=solver).value
    model = Lasso(alpha=1.0, tol=1e-15, max_iter=100_000).fit((x / each).numpy(), y.numpy())
    np.testing.assert_allclose(phi["w"], model.coef_ / each.numpy(), rtol=0, atol=1e-8)
    assert phi["b"].item() == pytest.approx(model.intercept_, abs=1e-8)


def test_the_value_of_the_objective():
    x, y = data()
    phi = torch.linspace(-1, 1, 8, dtype=F64)
    expected = fit(phi, None, x, y) + 0.3 * phi.abs().sum()
    torch.testing.assert_close(LASSO(phi, number(0.3), x, y), expected)


# -- its gradient ----------------------------------------------------------------------------------


def loss(phi):
    """Something to differentiate that treats no two numbers alike."""
    return (phi.sin() * torch.arange(1, phi.shape[-1] + 1, dtype=phi.dtype)).sum()


def attached(x, y, s, objective=LASSO, phi=None, batch_ndim=0, **settings):
    if phi is None:
        phi = solve(x.detach(), y.detach(), s.detach(), batch_ndim=batch_ndim).value
    settings = {"linear_solver": EXACT, **settings}
    return iopt.attach(phi, objective, s, x, y, batch_ndim=batch_ndim, **settings)


def closed_form(x, y, s, v):
    """`d loss / d s` and `d loss / d y` by the formula on the support, in NumPy."""
    phi = oracle(x, y, s)
    S = phi != 0
    xs = np.asarray(x)[:, S]
    w = np.linalg.solve(xs.T @ xs / len(y), v(phi)[S])
    return -w @ np.sign(phi[S]), xs @ w / len(y)


def slope(phi):
    return np.cos(phi) * np.arange(1, len(phi) + 1)


@pytest.mark.parametrize("s", [0.03, 0.2])
def test_gradients_against_scikit_learn_and_the_closed_form(s):
    x, y = (t.requires_grad_() for t in data(seed=3))
    strength = number(s, requires_grad=True)
    phi = attached(x, y, strength)
    assert (phi == 0).any()
    loss(phi).backward()
    of_s, of_y = closed_form(x.detach(), y.detach(), s, slope)
    assert strength.grad.item() == pytest.approx(of_s, rel=1e-8)
    np.testing.assert_allclose(y.grad, of_y, rtol=1e-8, atol=1e-10)

    def outer(x, y, s):
        return loss(torch.from_numpy(oracle(x, y, s))).item()

    xd, yd, eps = x.detach(), y.detach(), 1e-5
    numeric = (outer(xd, yd, s + eps) - outer(xd, yd, s - eps)) / (2 * eps)
    assert strength.grad.item() == pytest.approx(numeric, rel=1e-6)
    dx = torch.from_numpy(np.random.default_rng(0).standard_normal(x.shape))
    numeric = (outer(xd + eps * dx, yd, s) - outer(xd - eps * dx, yd, s)) / (2 * eps)
    assert (x.grad * dx).sum().item() == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_gradients_of_a_batch_are_those_of_its_tasks(batch):
    x, y = data(batch)
    y.requires_grad_()
    strength = number(0.2, requires_grad=True)
    told = []
    phi = attached(x, y, strength, batch_ndim=len(batch), on_solve=lambda _, s: told.append(s))
    sum(loss(phi[i]) for i in np.ndindex(batch)).backward()
    total = 0.0
    for i in np.ndindex(batch):
        of_s, of_y = closed_form(x[i], y[i].detach(), 0.2, slope)
        np.testing.assert_allclose(y.grad[i], of_y, rtol=1e-7, atol=1e-10)
        total += of_s
    assert strength.grad.item() == pytest.approx(total, rel=1e-7)
    (solve,) = told
    assert solve.status.shape == batch
    assert (solve.status == 0).all()
    assert (solve.stats["stationarity"] < 1e-10).all()


@pytest.mark.parametrize("batching", [{"chunk_size": 1}, {"threads": 2}])
def test_in_chunks_and_threads(batching):
    x, y = data((3,))
    expected, grads = solve(x, y, number(0.2), batch_ndim=1).value, []
    solver = iopt.proximal_gradient(
        lr=1 / smoothness(x), accelerated=True, tol=1e-11, max_steps=300
    )
    for settings in ({}, {"batching": iopt.Batching(**batching)}):
        s, settings = number(0.2, requires_grad=True), {**settings, "batch_ndim": 1}
        init = torch.zeros(3, 8, dtype=F64)
        phi = iopt.minimize(LASSO, init, s.detach(), x, y, solver=solver, **settings).value
        torch.testing.assert_close(phi, expected, rtol=1e-9, atol=1e-10)
        iopt.attach(phi, LASSO, s, x, y, linear_solver=EXACT, **settings).square().sum().backward()
        grads.append(s.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_where_everything_is_zero_so_is_the_gradient(share):
    x, y = data()
    s = (share * (x.T @ y / 40).abs().max()).requires_grad_()
    y = y.clone().requires_grad_()
    phi = attached(x, y, s)
    assert (phi == 0).all()
    told = []
    phi = attached(x, y, s, on_solve=lambda _, solution: told.append(solution.status.item()))
    loss(phi).backward()
    assert s.grad == 0
    assert (y.grad == 0).all()
    assert told == [0]


def test_one_strength_for_each_number():
    x, y = data(seed=4)
    each = torch.linspace(0.05, 0.4, 8, dtype=F64).requires_grad_()
    phi = attached(x, y, each)
    loss(phi).backward()
    S = phi.detach() != 0
    xs = x[:, S]
    w = torch.linalg.solve(xs.T @ xs / 40, torch.from_numpy(slope(phi.detach().numpy()))[S])
    expected = torch.zeros(8, dtype=F64).masked_scatter(S, -w * phi.detach().sign()[S])
    torch.testing.assert_close(each.grad, expected, rtol=1e-8, atol=1e-10)
    assert (each.grad[~S] == 0).all()


def test_the_stationarity_is_that_of_the_smallest_subgradient():
    x, y = data()
    phi = torch.tensor([1.0, 0, -1, 0, 0, 0, 0, 0], dtype=F64)
    s, told = number(0.3, requires_grad=True), []
    loss(attached(x, y, s, phi=phi, on_solve=lambda _, a: told.append(a))).backward()
    g = (x.T @ (x @ phi - y) / 40).numpy()
    phi = phi.numpy()
    smallest = np.where(
        phi != 0, g + 0.3 * np.sign(phi), np.sign(g) * np.maximum(np.abs(g) - 0.3, 0)
    )
    assert told[0].stats["stationarity"].item() == pytest.approx(np.linalg.norm(smallest))


def logistic(phi, x):
    return x @ phi


PROXIMAL = iopt.L1(
    iopt.Objective(logistic, F.binary_cross_entropy_with_logits, iopt.proximal),
    strength=lambda theta: theta[1] / 4,
)


def anchored(lam):
    return torch.full((8,), 0.3, dtype=F64), lam


@functools.cache
def elastic_net(lam):
    x, y = data(seed=5)
    solver = iopt.proximal_gradient(lr=0.5, accelerated=True, tol=1e-13, max_steps=2000)
    tensors = (torch.zeros(8, dtype=F64), anchored(number(lam)), x, (y > 0).to(F64))
    return iopt.minimize(PROXIMAL, *tensors, solver=solver).value


@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton, iopt.SafeguardedHessian])
@pytest.mark.parametrize("linear_solver", [EXACT, iopt.MINRES(rtol=1e-12), iopt.Cholesky()])
def test_an_elastic_net_of_a_structured_objective(curvature, linear_solver):
    """Logistic regression; theta is in the quadratic term and in the strength: by differences."""
    x, y = data(seed=5)
    y = (y > 0).to(F64)

    lam = number(0.3, requires_grad=True)
    phi = elastic_net(0.3)
    assert 0 < (phi == 0).sum() < 8
    settings = {"curvature": curvature, "linear_solver": linear_solver}
    loss(iopt.attach(phi, PROXIMAL, anchored(lam), x, y, **settings)).backward()
    up, down = (loss(elastic_net(0.3 + e)) for e in (1e-5, -1e-5))
    assert lam.grad.item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-6)


def test_any_function_as_curvature():
    x, y = data()
    grads = []
    for curvature in (iopt.Hessian, lambda problem, phi: iopt.Hessian(problem, phi) + 0.0):
        s = number(0.2, requires_grad=True)
        loss(attached(x, y, s, curvature=curvature)).backward()
        grads.append(s.grad)
    torch.testing.assert_close(*grads)
    with pytest.raises(TypeError, match="curvature must return an Operator"):
        s = number(0.2, requires_grad=True)
        loss(attached(x, y, s, curvature=lambda problem, phi: None)).backward()


def test_it_composes_with_the_transforms():
    """Forward mode, vmap of grad, and second derivatives, against the gradient and its differences."""
    x, y = data(seed=6)
    phi = solve(x, y, number(0.2)).value
    here = number(0.2)

    def outer(s):
        return loss(attached(x, y, s, phi=phi))

    derivative = grad(outer)(here)
    forward = jvp(outer, (here,), (torch.ones_like(here),))[1]
    torch.testing.assert_close(forward, derivative)
    several = vmap(grad(outer))(here.repeat(3))
    torch.testing.assert_close(several, derivative.repeat(3))

    def first(s):
        p = solve(x, y, s).value
        return grad(lambda s: loss(attached(x, y, s, phi=p)))(s)

    numeric = (first(here + 1e-5) - first(here - 1e-5)) / 2e-5
    torch.testing.assert_close(grad(grad(outer))(here), numeric, rtol=1e-5, atol=1e-5)


def test_the_strength_chosen_by_gradient_descent():
    """Hold-out loss as a function of log s: no point of a grid is better than where it comes to."""
    x, y = data(count=12, n=6, seed=7)
    new_x, new_y = data(count=200, n=6, seed=8)
    objective = iopt.L1(fit, strength=lambda t: t.exp())
    phi = torch.zeros(6, dtype=F64)

    def held_out(log_s):
        nonlocal phi
        phi = solve(x, y, log_s.detach(), init=phi, objective=objective, tol=1e-8).value
        return fit(iopt.attach(phi, objective, log_s, x, y), None, new_x, new_y)

    log_s = number(-1.0, requires_grad=True)
    opt = torch.optim.SGD([log_s], lr=4.0)
    for _ in range(15):
        opt.zero_grad()
        held_out(log_s).backward()
        opt.step()
    assert abs(log_s.grad) < 1e-2
    best = min(held_out(g).item() for g in torch.linspace(-5, 1, 25, dtype=F64))
    assert held_out(log_s).item() <= best + 1e-4


def test_unrolled_steps_have_the_same_gradient():
    """The oracle of oracles: back-propagation through the steps themselves."""
    x, y = data(seed=9)
    s = number(0.2, requires_grad=True)
    lr, phi = 1 / smoothness(x), torch.zeros(8, dtype=F64)
    for _ in range(200):
        phi = soft_threshold(phi - lr * x.T @ (x @ phi - y) / 40, lr * s)
    loss(phi).backward()
    other = number(0.2, requires_grad=True)
    loss(attached(x, y, other)).backward()
    torch.testing.assert_close(other.grad, s.grad, rtol=1e-8, atol=0)


# -- messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        iopt.gd(lr=0.1),
        iopt.agd(lr=0.1),
        iopt.newton_cg(),
        iopt.trust_region(),
        iopt.from_torch(torch.optim.Adam, max_steps=1),
    ],
)
def test_other_solvers_name_the_right_one(solver):
    x, y = data()
    with pytest.raises(TypeError, match=r"use solver=proximal_gradient\(lr=...\)"):
        iopt.minimize(LASSO, torch.zeros(8, dtype=F64), number(0.1), x, y, solver=solver)


def test_proximal_gradient_wants_an_l1_norm():
    solver = iopt.proximal_gradient(lr=0.1)
    with pytest.raises(TypeError, match=r"needs an L1\(objective, strength\), got function"):
        iopt.minimize(lambda phi, _: phi @ phi, torch.ones(2), (), solver=solver)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: iopt.L1(None, 1.0), TypeError, "objective must be a smooth function"),
        (lambda: iopt.L1(LASSO, 1.0), TypeError, "got L1"),
        (lambda: iopt.L1(iopt.Root(fit), 1.0), TypeError, "got Root"),
        (lambda: iopt.L1(fit, -1.0), ValueError, "Invalid strength: -1.0: it must be finite"),
        (lambda: iopt.L1(fit, {"w": math.inf}), ValueError, "Invalid strength: inf"),
        (lambda: iopt.L1(fit, number(1.0, requires_grad=True)), ValueError, "put it into theta"),
        (lambda: iopt.proximal_gradient(lr=0.0), ValueError, "Invalid lr: 0.0"),
        (lambda: iopt.proximal_gradient(lr=0.1, tol=-1.0), ValueError, "Invalid tol"),
    ],
)
def test_wrong_settings(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("strength", "match"),
    [
        ({"w": 1.0}, "a number or a pytree like phi, got dict"),
        (torch.ones(3), "does not broadcast"),
    ],
)
def test_a_strength_that_is_not_like_phi(strength, match):
    x, y = data()
    with pytest.raises(ValueError, match=match):
        solve(x, y, (), objective=iopt.L1(fit, strength))


def test_a_negative_strength_is_not_passed_over():
    x, y = data()
    assert solve(x, y, number(-0.1)).status == iopt.Status.NONFINITE.value
