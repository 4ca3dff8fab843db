"""Every linear solver against dense solves by NumPy, for random matrices of every kind it takes."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import implicit_optim as iopt
from implicit_optim import Dense, GaussNewton, Status, linear_solve
from problems import BATCHES, ridge, solve, tanh_mlp

F64 = torch.float64
SEEDS = st.integers(0, 2**32 - 1)
BATCH = st.sampled_from(BATCHES)
TIGHT = {"rtol": 1e-10}
SOLVERS = {
    "CG": iopt.CG(**TIGHT),
    "MINRES": iopt.MINRES(**TIGHT),
    "GMRES": iopt.GMRES(**TIGHT),
    "Neumann": iopt.Neumann(rtol=1e-10, max_steps=2000),
    "Cholesky": iopt.Cholesky(),
    "QR": iopt.QR(),
    "Auto, dense": iopt.Auto(rtol=1e-10),
    "Auto, iterative": iopt.Auto(rtol=1e-10, max_dense=0),
}
DEFINITE, SYMMETRIC = tuple(SOLVERS), ("MINRES", "GMRES", "QR", "Auto, dense", "Auto, iterative")
ANY = ("GMRES", "QR", "Auto, dense", "Auto, iterative")


def symmetric(seed, n, batch, eigenvalues):
    """Random symmetric matrices with these eigenvalues, and right-hand sides."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((*batch, n, n)))[0]
    A = (Q * eigenvalues) @ np.swapaxes(Q, -1, -2)
    return (A + np.swapaxes(A, -1, -2)) / 2, rng.standard_normal((*batch, n))


def general(seed, n, batch):
    """Well-conditioned matrices that are far from symmetric: a rotation, stretched by 1 to 4."""
    rng = np.random.default_rng(seed)
    Q, P = (np.linalg.qr(rng.standard_normal((*batch, n, n)))[0] for _ in range(2))
    return (Q * np.linspace(1, 4, n)) @ P, rng.standard_normal((*batch, n))


def check(name, A, b, rtol=1e-7, is_symmetric=True):
    operator = Dense(torch.from_numpy(A), symmetric=is_symmetric)
    solution = linear_solve(operator, torch.from_numpy(b), SOLVERS[name])
    expected = solve(A, b)
    size = np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(solution.value.numpy() / size, expected / size, atol=rtol)
    assert (solution.status == 0).all()
    residual = np.linalg.norm(b - (A @ solution.value.numpy()[..., None])[..., 0], axis=-1)
    np.testing.assert_allclose(solution.stats["residual_norm"].numpy(), residual, atol=1e-11)
    np.testing.assert_allclose(
        solution.stats["rhs_norm"].numpy(), np.linalg.norm(b, axis=-1), rtol=1e-12
    )
    return solution


@pytest.mark.parametrize("name", DEFINITE)
@given(SEEDS, st.integers(1, 12), BATCH, st.floats(0, 1.5))
def test_definite_matrices(name, seed, n, batch, log_kappa):
    A, b = symmetric(seed, n, batch, np.geomspace(10**-log_kappa, 1, n))
    check(name, A, b)


@pytest.mark.parametrize("name", SYMMETRIC)
@given(SEEDS, st.integers(2, 12), BATCH)
def test_indefinite_matrices(name, seed, n, batch):
    eigenvalues = np.linspace(0.2, 2, n) * np.where(np.arange(n) % 2, 1, -1)
    A, b = symmetric(seed, n, batch, eigenvalues)
    check(name, A, b)


@pytest.mark.parametrize("name", ANY)
@given(SEEDS, st.integers(1, 12), BATCH)
def test_matrices_that_are_not_symmetric(name, seed, n, batch):
    A, b = general(seed, n, batch)
    check(name, A, b, is_symmetric=False)


@pytest.mark.parametrize("name", ["MINRES", "GMRES"])
@given(SEEDS, st.integers(2, 14), st.integers(1, 14))
def test_a_step_minimises_the_residual_over_the_krylov_space(name, seed, n, steps):
    """Against an orthonormal basis of that space and least squares, by NumPy."""
    eigenvalues = np.linspace(0.5, 2, n) * np.where(np.arange(n) % 3, 1, -1)
    A, b = symmetric(seed, n, (), eigenvalues)
    if name == "GMRES":
        A, b = general(seed, n, ())
    steps = min(steps, n)
    solver = {"MINRES": iopt.MINRES, "GMRES": iopt.GMRES}[name](max_steps=steps)
    operator = Dense(torch.from_numpy(A), symmetric=name == "MINRES")
    x, status, stats = linear_solve(operator, torch.from_numpy(b), solver)
    basis = [b / np.linalg.norm(b)]
    for _ in range(steps - 1):
        w = A @ basis[-1]
        for _ in range(2):
            w = w - sum((w @ v) * v for v in basis)
        basis.append(w / np.linalg.norm(w))
    V = np.stack(basis, 1)
    least = np.linalg.norm(b - A @ V @ np.linalg.lstsq(A @ V, b, rcond=None)[0])
    assert np.linalg.norm(b - A @ x.numpy()) == pytest.approx(least, rel=1e-6, abs=1e-8)
    assert stats["residual_norm"].item() == pytest.approx(least, rel=1e-6, abs=1e-8)
    assert stats["steps"].item() <= steps and status == 0


@given(SEEDS, st.integers(2, 10), st.integers(1, 4))
def test_gmres_may_be_restarted(seed, n, restart):
    A, b = symmetric(seed, n, (2,), np.geomspace(0.2, 1, n))  # definite: a restart cannot stall
    solver = iopt.GMRES(rtol=1e-8, max_steps=2000, restart=restart)
    solution = linear_solve(Dense(torch.from_numpy(A)), torch.from_numpy(b), solver)
    np.testing.assert_allclose(solution.value.numpy(), solve(A, b), rtol=1e-6, atol=1e-6)
    assert (solution.status == 0).all()


@given(SEEDS, st.integers(1, 8), st.integers(0, 30), st.floats(0.1, 1.9))
def test_neumann_is_its_series(seed, n, steps, step):
    """``s sum_k (I - s A)^k b``, by powers of the matrix; eigenvalues up to 1 and s < 2 converge."""
    A, b = symmetric(seed, n, (), np.linspace(0.1, 1, n))
    x = linear_solve(
        Dense(torch.from_numpy(A)), torch.from_numpy(b), iopt.Neumann(max_steps=steps, step=step)
    ).value
    power, total = b, 0 * b
    for _ in range(steps):
        total, power = total + step * power, power - step * A @ power
    expected = total if steps else b  # no step: the first-order direction
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-9, atol=1e-9)


def descended(A, r, step, steps):
    for _ in range(steps):
        Ar = A @ r
        if np.linalg.norm(r - step * Ar) >= np.linalg.norm(r):
            step = (r @ Ar) / (Ar @ Ar)
        r = r - step * Ar
    return r


@given(SEEDS, st.floats(-8, 8))
def test_neumann_finds_a_step_that_cannot_diverge(seed, log_size):
    """Whatever the scale of A, and though the first step given is far too long.

    What is left is what a plain loop leaves, in which a step that raises the residual is exchanged for
    the one that lowers it most. It may be much: nothing says that the new step is a good one later on.
    """
    A, b = symmetric(seed, 6, (3,), 10**log_size * np.geomspace(0.2, 1, 6))
    norms = []
    for steps in (0, 1, 3, 10, 60):
        solver = iopt.Neumann(max_steps=steps, step=1000 / 10**log_size)
        x = linear_solve(Dense(torch.from_numpy(A)), torch.from_numpy(b), solver).value.numpy()
        if steps:
            norms.append(np.linalg.norm(b - (A @ x[..., None])[..., 0], axis=-1))
            left = [np.linalg.norm(descended(A[i], b[i], solver.step, steps)) for i in range(3)]
            np.testing.assert_allclose(norms[-1], left, rtol=1e-6, atol=1e-9)
    assert all((after <= before * (1 + 1e-9)).all() for before, after in itertools.pairwise(norms))
    assert (norms[0] < np.linalg.norm(b, axis=-1)).all()  # the first step is one already
    automatic = iopt.Neumann(rtol=1e-6, max_steps=500)
    solution = linear_solve(Dense(torch.from_numpy(A)), torch.from_numpy(b), automatic)
    assert (solution.status == 0).all()


# ------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("limits", [{"max_steps": 20}, {"rtol": 1e-6}], ids=str)
def test_neumann_says_where_no_step_helps(limits):
    """A rotation by 90 degrees, minus the identity, and beside them a matrix that it can solve."""
    turn = [[0.0, 1.0], [-1.0, 0.0]]
    A = torch.tensor([turn, [[-1.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 0.5]]])
    b = torch.tensor([[1.0, 2.0]]).expand(3, 2)
    x, status, stats = linear_solve(Dense(A, symmetric=False), b, iopt.Neumann(**limits))
    assert status.tolist() == [Status.NO_DESCENT, Status.NO_DESCENT, Status.SUCCESS]
    assert x[:2].tolist() == b[:2].tolist()  # the first-order direction, not zero
    assert stats["steps"][:2].tolist() == [0, 0]
    assert stats["residual_norm"][:2].tolist() == pytest.approx([5**0.5, 5**0.5])
    assert x[2].tolist() == pytest.approx([1.0, 4.0], rel=1e-4)


def test_woodbury_that_cannot_be_factored_says_so():
    """In float32, outputs that repeat each other on a nearly flat proximal term."""
    fit = iopt.Objective(
        lambda phi, x: x @ phi, lambda out, y: 1e12 * (out - y).square().sum(), iopt.proximal
    )
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    y, phi = torch.ones(8), torch.zeros(2)
    theta = torch.zeros(2), torch.tensor(1e-6)
    A = iopt.GaussNewton(iopt.InnerProblem.bind(fit, phi, theta, x, y), phi)
    value, status, _ = linear_solve(A, torch.ones(2), iopt.Woodbury())
    assert status == Status.SINGULAR
    assert value.isnan().all()


def test_auto_forms_a_matrix_once():
    """Two tasks, one indefinite, so that both factorisations have their turn."""

    class Counted(Dense):
        products = 0

        def linearize(self):
            linear = super().linearize()

            def mv(v):
                Counted.products += 1
                return linear.mv(v)

            return dataclasses.replace(linear, mv=mv)

    A = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 2.0]))])
    x, status, _ = linear_solve(Counted(A), torch.ones(2, 3), iopt.Auto())
    assert status.tolist() == [0, 0]
    assert x.tolist() == [[1.0, 1.0, 1.0], [1.0, -1.0, 0.5]]
    assert Counted.products == 3


@pytest.mark.parametrize("name", ["MINRES", "GMRES", "QR"])
@given(SEEDS, st.integers(2, 12))
def test_a_singular_matrix_is_said_to_be_singular(name, seed, n):
    """And what comes back is no worse than zero, or NaN from the dense solver."""
    A, b = symmetric(seed, n, (2,), np.linspace(0, 2, n))
    A[1] = np.eye(n)  # beside one that is not
    x, status, stats = linear_solve(Dense(torch.from_numpy(A)), torch.from_numpy(b), SOLVERS[name])
    assert status.tolist() == [Status.SINGULAR, Status.SUCCESS]
    np.testing.assert_allclose(x[1].numpy(), b[1], rtol=1e-9)
    if name != "QR":
        # What no x reaches is the part of b in the null space.
        null = np.linalg.eigh(A[0])[1][:, 0]
        residual = np.linalg.norm(b[0] - A[0] @ x[0].numpy())
        assert abs(null @ b[0]) <= residual * (1 + 1e-9) <= 1.02 * np.linalg.norm(b[0])
        # Where x is huge, A x has an error of its own: less than two digits of b.
        size = 0.02 * np.linalg.norm(b[0])
        assert residual == pytest.approx(stats["residual_norm"][0].item(), abs=size)


def test_pivots_do_not_hide_a_singular_matrix_from_qr():
    """Of some singular matrices the smallest pivot lies a thousand times above rounding.

    NumPy's singular values say which are singular for certain. Half of the matrices are badly
    conditioned and no more: they are solved.
    """
    for dtype, digits in ((F64, 10.0), (torch.float32, 2.5)):
        for n in (2, 3, 8):
            least = np.repeat([0.0, 10.0**-digits], 500)[:, None]
            sizes = np.concatenate([least, np.tile(np.linspace(1, 2, n - 1), (1000, 1))], -1)
            A, b = symmetric(n, n, (1000,), sizes[:, None, :])
            A, b = (torch.from_numpy(t).to(dtype) for t in (A, b))
            x, status, _ = linear_solve(Dense(A), b, iopt.QR())
            tiny = linear_solve(Dense(A * 1e-30), b * 1e-30, iopt.QR())
            assert torch.equal(tiny.status, status)
            values = np.linalg.svd(A.numpy().astype(float), compute_uv=False)
            clear = values[:, -1] < 0.1 * n * torch.finfo(dtype).eps * values[:, 0]
            assert clear.mean() > 0.3
            assert (status[clear] == Status.SINGULAR).all() and x[clear].isnan().all()
            assert (status[500:] == Status.SUCCESS).all()
            expected = solve(A[500:].double().numpy(), b[500:].double().numpy())
            error = np.linalg.norm(x[500:].numpy() - expected, axis=-1)
            bound = 100 * torch.finfo(dtype).eps * 10**digits * np.linalg.norm(expected, axis=-1)
            assert (error <= bound).all()


def test_minres_sees_a_pivot_that_is_the_rounding_of_many_steps():
    """A singular matrix whose last pivot is 300 times the machine's precision, in step 9."""
    A, b = symmetric(9, 9, (), np.linspace(0, 2, 9))
    x, status, stats = linear_solve(
        Dense(torch.from_numpy(A)), torch.from_numpy(b), SOLVERS["MINRES"]
    )
    assert status == Status.SINGULAR
    assert stats["steps"] <= 10
    null = np.linalg.eigh(A)[1][:, 0]
    assert np.linalg.norm(b - A @ x.numpy()) == pytest.approx(abs(null @ b), rel=1e-6)


def test_what_is_worse_than_no_step_is_given_up():
    """A product that is not the one of the matrix in the end: the true residual tells."""
    A, b = symmetric(0, 4, (2,), np.linspace(1, 2, 4))
    A, b, calls = torch.from_numpy(A), torch.from_numpy(b), []

    def mv(x):
        calls.append(1)
        wrong = torch.where(torch.tensor([True, False])[:, None], 1e6, 1.0)
        return (A @ x.unsqueeze(-1)).squeeze(-1) * (wrong if len(calls) == 5 else 1.0)

    solution = iopt.MINRES(rtol=1e-12).solve(iopt.Linearized(mv, lambda r: 3 * r), b)
    assert len(calls) == 5  # four steps, and the residual
    assert solution.status.tolist() == [Status.SINGULAR, Status.SUCCESS]
    assert torch.equal(solution.value[0], 3 * b[0])  # the first-order direction
    assert solution.stats["residual_norm"][0] == solution.stats["rhs_norm"][0]


@pytest.mark.parametrize("name", DEFINITE)
def test_a_singular_but_consistent_zero_costs_nothing(name):
    A, b = symmetric(0, 4, (3,), np.ones(4))
    b[1] = 0
    x, status, _ = linear_solve(Dense(torch.from_numpy(A)), torch.from_numpy(b), SOLVERS[name])
    assert x[1].tolist() == [0.0] * 4 and status.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", DEFINITE)
@pytest.mark.parametrize("where", ["matrix", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_with_their_task(name, where, value):
    A, b = symmetric(0, 4, (3,), np.linspace(1, 2, 4))
    if where == "matrix":
        A[1, 2, 3] = A[1, 3, 2] = value
    else:
        b[1, 0] = value
    x, status, _ = linear_solve(Dense(torch.from_numpy(A)), torch.from_numpy(b), SOLVERS[name])
    assert status.tolist() == [0, Status.NONFINITE, 0]
    assert x[1].isnan().all()
    np.testing.assert_allclose(x[::2].numpy(), solve(A[::2], b[::2]), rtol=1e-8)


def test_cholesky_says_which_task_is_not_definite():
    A, b = symmetric(0, 5, (2,), np.linspace(1, 2, 5))
    A[1] = -A[1]
    x, status, _ = linear_solve(Dense(torch.from_numpy(A)), torch.from_numpy(b), iopt.Cholesky())
    assert status.tolist() == [0, Status.NEGATIVE_CURVATURE]
    np.testing.assert_allclose(x[0].numpy(), solve(A, b)[0], rtol=1e-12)
    assert x[1].isnan().all()


def test_auto_says_what_it_chose():
    A, b = symmetric(0, 5, (3,), np.linspace(1, 2, 5))
    A[1] = symmetric(1, 5, (), np.linspace(-1, 2, 5))[0]
    operator, b = Dense(torch.from_numpy(A)), torch.from_numpy(b)
    for max_dense, names in ((5, ("Cholesky", "QR")), (4, ("CG", "MINRES"))):
        solution = linear_solve(operator, b, iopt.Auto(rtol=1e-10, max_dense=max_dense))
        assert iopt.Auto.chosen(solution) == {names[0]: 2, names[1]: 1}
        assert iopt.Auto.names[solution.stats["choice"][1]] == names[1]
    loose = Dense(operator.matrix, symmetric=False)
    assert iopt.Auto.chosen(linear_solve(loose, b, iopt.Auto(max_dense=4))) == {"GMRES": 3}
    assert iopt.Auto.chosen(linear_solve(loose, b, iopt.Auto())) == {"QR": 3}


@pytest.mark.parametrize(
    "solver", [iopt.MINRES, iopt.GMRES, iopt.Neumann], ids=lambda s: s.__name__
)
def test_settings_out_of_range(solver):
    for name, value in (("max_steps", -1), ("rtol", 1.0), ("atol", -1.0), ("check_every", 0)):
        with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
            solver(**{name: value})


def test_more_settings_out_of_range():
    with pytest.raises(ValueError, match="Invalid restart: 0"):
        iopt.GMRES(restart=0)
    for step in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="Invalid step"):
            iopt.Neumann(step=step)
    with pytest.raises(ValueError, match="Invalid max_n: 0"):
        iopt.QR(max_n=0)
    with pytest.raises(ValueError, match="Invalid max_m: 0"):
        iopt.Woodbury(max_m=0)
    with pytest.raises(ValueError, match="Invalid max_dense: -1"):
        iopt.Auto(max_dense=-1)
    with pytest.raises(ValueError, match="Invalid rtol: 2"):
        iopt.Auto(rtol=2.0)
    A, b = Dense(torch.eye(5)), torch.ones(5)
    with pytest.raises(ValueError, match="n = 5 takes n products .* raise max_n = 4"):
        linear_solve(A, b, iopt.QR(max_n=4))
    with pytest.raises(TypeError, match="Woodbury needs curvature=GaussNewton"):
        linear_solve(A, b, iopt.Woodbury())
    loose = Dense(torch.eye(5), symmetric=False)
    for solver in (iopt.CG(), iopt.MINRES(), iopt.Cholesky()):
        with pytest.raises(
            TypeError, match=r"needs a symmetric operator, Dense is none: use GMRES"
        ):
            linear_solve(loose, b, solver)


# ------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ANY)
def test_derivatives_through_a_matrix_that_is_not_symmetric(name):
    A, b = (torch.from_numpy(t).requires_grad_() for t in general(0, 4, (2,)))
    solve = lambda A, b: linear_solve(Dense(A, symmetric=False), b, SOLVERS[name]).value  # noqa: E731
    assert torch.autograd.gradcheck(solve, (A, b), atol=1e-7, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, (A, b), atol=1e-6)
    v = torch.ones(2, 4, dtype=F64)
    ours = torch.autograd.grad((solve(A, b) * v).sum(), (A, b))
    dense = torch.autograd.grad((torch.linalg.solve(A, b) * v).sum(), (A, b))
    for one, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
    over = torch.func.vmap(lambda b: solve(A.detach(), b))(torch.stack([b, 2 * b]).detach())
    torch.testing.assert_close(over[1], 2 * over[0], rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------------------- Woodbury


@pytest.mark.parametrize("make", [ridge, tanh_mlp])
@pytest.mark.parametrize("batch", BATCHES)
def test_woodbury_is_dense_gauss_newton(make, batch):
    problem = make(batch=batch)
    phi = problem.flat() + 0.1
    operator = GaussNewton(problem.bind(), phi)
    b = torch.randn(phi.shape, dtype=F64)
    solution = linear_solve(operator, b, iopt.Woodbury())
    expected = solve(operator.as_matrix().numpy(), b.numpy())
    np.testing.assert_allclose(solution.value.numpy(), expected, rtol=1e-10, atol=1e-10)
    assert (solution.status == 0).all()
    assert solution.stats["residual_norm"].max() < 1e-9
    m = operator.linearize().low_rank().size
    with pytest.raises(ValueError, match=f"m = {m} outputs a task"):
        linear_solve(operator, b, iopt.Woodbury(max_m=m - 1))


def test_woodbury_with_several_outputs_and_a_vector_lam():
    """Cross-entropy, whose Hessian in the outputs is singular, and an output that is a pytree."""
    x, y = torch.randn(3, 4, 5, dtype=F64), torch.randint(0, 3, (3, 4))
    phi = torch.randn(3, 15, dtype=F64)

    def predict(phi, x):
        logits = x @ phi.reshape(5, 3)
        return {"logits": logits, "size": logits.square().sum(-1)}

    def loss(out, y):
        return torch.nn.functional.cross_entropy(out["logits"], y) + out["size"].mean() / 3

    fit = iopt.Objective(predict, loss, iopt.proximal)
    theta = torch.zeros(15, dtype=F64), torch.linspace(0.1, 2, 15, dtype=F64)
    problem = iopt.InnerProblem.bind(fit, phi, theta, x, y, batch_ndim=1)
    operator, b = GaussNewton(problem, phi), torch.randn(3, 15, dtype=F64)
    assert operator.linearize().low_rank().size == 4 * 3 + 4
    x = linear_solve(operator, b, iopt.Woodbury()).value
    np.testing.assert_allclose(
        x.numpy(), solve(operator.as_matrix().numpy(), b.numpy()), rtol=1e-10, atol=1e-11
    )


def test_woodbury_as_the_solver_of_a_meta_gradient():
    torch.set_default_dtype(F64)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    support, query = ((torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))) for _ in range(2))

    def gradient(solver):
        meta = iopt.MetaLearner(
            model,
            torch.nn.functional.cross_entropy,
            solver=iopt.gd(lr=0.1, max_steps=5),
            lam=0.3,
            meta_gradient=iopt.Implicit(solver, iopt.GaussNewton),
            on_solve=iopt.Raise(),
        )
        loss = meta(support, query).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    torch.testing.assert_close(
        gradient(iopt.Woodbury()), gradient(iopt.CG(rtol=1e-13)), rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(
        gradient(iopt.Auto()), gradient(iopt.CG(rtol=1e-13)), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize(
    "limits",
    [{"max_steps": 2}, {"restart": 2, "max_steps": 8}, {"restart": 2, "rtol": 1e-9}],
    ids=str,
)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_gmres_ends_a_cycle_with_a_product_that_is_not_finite(limits, bad):
    """Its norm is infinite, but the matrix is not called singular, nor is there a finite answer."""
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    calls = []

    def mv(x):
        calls.append(x)
        hit = torch.tensor([[bad, 0, 0, 0], [0.0] * 4], dtype=x.dtype)
        return x @ A + (hit if len(calls) == 2 else 0)

    b = torch.ones(2, 4, dtype=torch.float64)
    x, status, _ = iopt.GMRES(**limits).solve(iopt.Linearized(mv, lambda r: r), b)
    assert status[0] == Status.NONFINITE and x[0].isnan().all()
    assert status[1] != Status.NONFINITE and x[1].isfinite().all()
