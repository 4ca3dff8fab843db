"""Methods published since the paper are settings of what is here: docs/since.md, line by line."""

import dataclasses

import numpy as np
import pytest
import torch

import implicit_optim as iopt
from benchmarks import approximations
from benchmarks.paper.quadratics import Quadratics, half_mse
from benchmarks.shine import Shine
from test_docs import DOCS, run

LAM, K = 2.0, 4


@pytest.fixture(scope="module")
def quadratics():
    return Quadratics.make(2, torch.linspace(0.5, 6, 5, dtype=torch.float64), LAM, seed=0)


def dense(q):
    """A, phi* and v of every task, in NumPy."""
    (x, y), (asked, target) = (tuple(t.numpy() for t in pair) for pair in (q.support, q.query))
    n = x.shape[-1]
    A = np.swapaxes(x, 1, 2) @ x / n + q.lam * np.eye(n)
    right = np.swapaxes(x, 1, 2) @ y / n + q.lam * q.theta.numpy()[:, None]
    phi = np.linalg.solve(A, right)
    return A, phi[..., 0], (np.swapaxes(asked, 1, 2) @ (asked @ phi - target) / n)[..., 0]


def series(A, v, step, terms):
    """``step sum_{j < terms} (I - step A)^j v`` of every task."""
    total = 0 * v
    for _ in range(terms):
        total, v = total + step * v, v - step * (A @ v[..., None])[..., 0]
    return total


def conjugate(A, b, steps):
    """CG from zero, of one task."""
    x, r, p = 0 * b, b, b
    for _ in range(steps):
        a = r @ r / (p @ A @ p)
        x, new = x + a * p, r - a * A @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


def held(q, A, solver):
    """Task by task the inverse that L-BFGS holds after all its steps: a matrix of updates."""
    anchor, (x, y) = q.theta.expand(len(A), -1), q.support

    def ridge(phi, theta, x, y):
        fit = ((x @ phi - y[:, 0]) ** 2).mean() / 2
        return fit + q.lam / 2 * ((phi - theta) ** 2).sum()

    def after(steps):
        cut = dataclasses.replace(solver, max_steps=steps)
        return iopt.minimize(ridge, anchor, q.theta, x, y, solver=cut, batch_ndim=1).value.numpy()

    path = np.stack([after(steps) for steps in range(solver.max_steps + 1)])
    for matrix, way in zip(A, np.swapaxes(path, 0, 1), strict=True):
        moves, eye = np.diff(way, axis=0), np.eye(len(matrix))
        changes = moves @ matrix  # of the gradient
        B = eye * (moves[-1] @ changes[-1]) / (changes[-1] @ changes[-1])
        for s, y in zip(moves, changes, strict=True):
            rho = 1 / (s @ y)
            left = eye - rho * np.outer(s, y)
            B = left @ B @ left.T + rho * np.outer(s, s)
        yield B


def same(ours, theirs):
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)


def test_one_step_truncated_and_neumann_are_one_series(quadratics):
    A, _, v = dense(quadratics)
    step = 1 / quadratics.bounds[1]
    solved = quadratics.gd(400)
    for terms in (1, K):
        expected = LAM * series(A, v, step, terms).mean(0)
        same(quadratics.meta_gradient(solved, iopt.Truncated(terms)), expected)
        neumann = iopt.Implicit(iopt.Neumann(max_steps=terms, step=LAM * step))  # in units of 1 / M
        same(quadratics.meta_gradient(solved, neumann), expected)
    same(
        quadratics.meta_gradient(solved, iopt.Truncated(1)), LAM * step * v.mean(0)
    )  # the table's formula


def test_first_order_is_no_product_and_moreau_is_reptile(quadratics):
    _, phi, v = dense(quadratics)
    solved = quadratics.gd(400)
    for rule in (iopt.FirstOrder(), iopt.Implicit(iopt.CG(max_steps=0))):
        same(quadratics.meta_gradient(solved, rule), v.mean(0))
    # The envelope's gradient by finite differences of min_phi Lhat + lam / 2 ||phi - theta||^2.
    x, y = (t.numpy() for t in quadratics.support)

    def envelope(theta):
        A, b = np.swapaxes(x, 1, 2) @ x / 5, np.swapaxes(x, 1, 2) @ y / 5
        phi = np.linalg.solve(A + LAM * np.eye(5), b + LAM * theta[:, None])
        fit = ((x @ phi - y) ** 2).mean((1, 2)) / 2
        return (fit + LAM / 2 * ((phi[..., 0] - theta) ** 2).sum(1)).mean()

    theta = quadratics.theta.numpy()
    slope = [(envelope(theta + e) - envelope(theta - e)) / 2e-4 for e in 1e-4 * np.eye(5)]
    ours = LAM * quadratics.meta_gradient(solved, iopt.Reptile()).numpy()
    np.testing.assert_allclose(ours, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "solver", [iopt.GMRES(max_steps=0), iopt.Neumann(max_steps=1, step=1.0)], ids=str
)
def test_jacobian_free(solver):
    """``v^T dT/dtheta`` at the fixed point of a contraction, by hand."""
    rng = torch.Generator().manual_seed(0)
    W = 0.1 * torch.randn(3, 3, generator=rng, dtype=torch.float64)
    theta = torch.randn(3, generator=rng, dtype=torch.float64).requires_grad_()
    v = torch.randn(3, generator=rng, dtype=torch.float64)
    phi = torch.zeros(3, dtype=torch.float64)
    for _ in range(100):
        phi = torch.tanh(W @ phi + theta.detach())
    T = iopt.FixedPoint(lambda phi, theta: torch.tanh(W @ phi + theta))
    ours = iopt.attach(phi, T, theta, linear_solver=solver)
    (slope,) = torch.autograd.grad(ours @ v, theta)
    same(slope, (v * (1 - phi**2)).numpy())


def test_shine_is_the_matrix_of_the_inner_solver_and_refined_it_is_cg_from_there(quadratics):
    """BFGS updates as dense matrices, from iterates alone; CG by its recurrence."""
    A, phi, _ = dense(quadratics)
    solver = iopt.lbfgs(max_steps=4, memory=4)  # of five dimensions, so that phi is not yet solved
    B = list(held(quadratics, A, solver))
    asked, target = (t.numpy() for t in quadratics.query)
    plain, refined, preconditioned = [], [], []
    model = torch.nn.Linear(5, 1, bias=False, dtype=torch.float64)
    model.weight.data.copy_(quadratics.theta)
    meta = iopt.MetaLearner(
        model, half_mse, solver=solver, lam=LAM, meta_gradient=Shine(), on_solve=iopt.Ignore()
    )
    found = meta.adapt(quadratics.support)["weight"].detach().numpy()[:, 0]
    assert np.abs(found - phi).max() > 1e-4
    for i, (matrix, inverse) in enumerate(zip(A, B, strict=True)):
        v = asked[i].T @ (asked[i] @ found[i] - target[i][:, 0]) / 5
        guess = inverse @ v
        plain.append(guess)
        refined.append(guess + conjugate(matrix, v - matrix @ guess, 2))
        root = np.linalg.cholesky(inverse)
        preconditioned.append(root @ conjugate(root.T @ matrix @ root, root.T @ v, 2))
    rules = (Shine(), Shine(3), Shine(2, preconditioner=True))
    for rule, each in zip(rules, (plain, refined, preconditioned), strict=True):
        ours = quadratics.meta_gradient(solver, rule)
        np.testing.assert_allclose(ours, LAM * np.mean(each, 0), rtol=1e-7)


def test_hoag_and_soba_come_to_the_weight_decay_of_dense_algebra():
    """The blocks of the page; the same gradient descent with autograd through a dense solve."""
    names = run(DOCS / "since.md", {})
    x, y, asked, target = (names[key] for key in ("x", "y", "asked", "target"))
    descent, theta = [], torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        A = x.T @ x / 40 + theta.exp() * torch.eye(30, dtype=torch.float64)
        fitted = torch.linalg.solve(A, x.T @ y / 40)
        (slope,) = torch.autograd.grad((asked @ fitted - target).square().mean(), theta)
        theta = (theta - 0.1 * slope).detach().requires_grad_()
        descent.append(theta.item())
    assert names["tight"] == pytest.approx(descent[19], abs=1e-6)
    assert names["loose"] == pytest.approx(descent[19], abs=1e-6)
    assert 0 < names["fewer"] < 0.7 * names["many"]
    assert names["theta"].item() == pytest.approx(descent[-1], abs=5e-3)


def test_what_an_approximation_is_worth(monkeypatch, tmp_path, capsys):
    """The benchmark's errors are those of the series, the sketch, SHINE and CG, in NumPy."""
    monkeypatch.setattr(approximations, "KAPPAS", (10,))
    monkeypatch.setattr(approximations, "PRODUCTS", (0, 1, K))
    N = approximations.N
    approximations.main(tmp_path / "results")
    assert (tmp_path / "results" / "approximations.png").stat().st_size > 5_000
    q = approximations.problem(10)
    A, _, v = dense(q)
    lam = q.lam
    exact = np.linalg.solve(A, v[..., None])[..., 0].mean(0) * lam

    def error(solutions):
        return np.linalg.norm(lam * solutions.mean(0) - exact) / np.linalg.norm(exact)

    rows = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    found = {int(row[0]): [float(value) for value in row[1:]] for row in rows[2:]}
    steps = round(12 * 10**0.35)
    tasks = list(zip(A, held(q, A, iopt.lbfgs(max_steps=steps, memory=steps)), v, strict=True))
    shine = error(np.stack([B @ b for _, B, b in tasks]))
    first = error(v / lam)
    assert found[0] == pytest.approx([first, first, first, shine, shine, first], rel=0.05)
    truncated = error(series(A, v, 1 / q.bounds[1], K))
    best = error(np.stack([conjugate(A, b, K) for A, _, b in tasks]))
    refined = [B @ b + conjugate(A, b - A @ B @ b, K - 1) for A, B, b in tasks]
    roots = [np.linalg.cholesky(B) for _, B, _ in tasks]
    preconditioned = [
        L @ conjugate(L.T @ A @ L, L.T @ b, K) for L, (A, _, b) in zip(roots, tasks, strict=True)
    ]
    omega = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    omega, H, eye = torch.linalg.qr(omega).Q.numpy(), A - lam * np.eye(N), np.eye(N)
    Y = H @ omega  # Hataya & Yamada 2023, equation 5
    low_rank = Y @ np.linalg.inv(omega.T @ Y) @ np.swapaxes(Y, -1, -2)
    sketched = error(np.linalg.solve(low_rank + lam * eye, v[..., None])[..., 0])
    shines = [error(np.stack(every)) for every in (refined, preconditioned)]
    expected = [truncated, truncated, sketched, *shines, best]
    assert found[K] == pytest.approx(expected, rel=0.05)  # two printed digits
