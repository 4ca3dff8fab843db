"""The trust region and Steihaug's conjugate gradients, against dense algebra and SciPy."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

import implicit_optim as iopt
from implicit_optim._solver.steihaug import steihaug
from problems import BATCHES, CONVEX, ridge, spd, tanh_mlp

F64 = torch.float64
EXACT = iopt.CG(rtol=1e-12)


def model(A, b, x):
    return x @ A @ x / 2 - b @ x


def subproblem(A, b, radius):
    """The global minimiser of the model in the ball: eigenvalues, bisection on the multiplier."""
    eigenvalues, vectors = np.linalg.eigh(A)
    c = vectors.T @ b
    if eigenvalues[0] > 0 and np.linalg.norm(c / eigenvalues) <= radius:
        return vectors @ (c / eigenvalues)
    low = max(0.0, -eigenvalues[0])
    high = low + np.linalg.norm(b) / radius + 1
    for _ in range(200):
        middle = (low + high) / 2
        inside = np.linalg.norm(c / (eigenvalues + middle)) <= radius
        low, high = (low, middle) if inside else (middle, high)
    return vectors @ (c / (eigenvalues + high))


def symmetric(seed, n, batch=(), shift=0.0):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((*batch, n, n))
    return (root + np.swapaxes(root, -1, -2)) / 2 + shift * np.eye(n), rng.standard_normal(
        (*batch, n)
    )


def ball(A, b, radius, **settings):
    A, b = torch.as_tensor(A), torch.as_tensor(b)
    radius = torch.full(b.shape[:-1], radius, dtype=b.dtype)
    return steihaug(iopt.Dense(A).linearize(), b, radius, **settings)


# ------------------------------------------------------------------------------- the ball


@given(seed=st.integers(0, 9999), n=st.integers(1, 10))
def test_inside_the_ball_it_is_the_dense_solution(seed, n):
    A, b = (t.numpy() for t in spd(seed, n, 20.0))
    exact = subproblem(A, b, 1e3)
    solution = ball(A, b, 1e3)
    np.testing.assert_allclose(solution.value.numpy(), exact, rtol=0, atol=1e-9)
    np.testing.assert_allclose(exact, np.linalg.solve(A, b), rtol=1e-9)
    assert not solution.stats["on_boundary"]
    assert solution.stats["decrease"].item() == pytest.approx(b @ exact / 2, rel=1e-9)


@given(seed=st.integers(0, 9999), n=st.integers(1, 10), radius=st.floats(1e-3, 30))
def test_of_a_definite_model_it_gets_at_least_half(seed, n, radius):
    """Yuan 2000: half of what the global minimiser in the ball gets."""
    A, b = (t.numpy() for t in spd(seed, n, 20.0))
    solution = ball(A, b, radius)
    best = -model(A, b, subproblem(A, b, radius))
    assert best / 2 * (1 - 1e-9) <= solution.stats["decrease"].item() <= best * (1 + 1e-9)


@given(
    seed=st.integers(0, 9999),
    n=st.integers(1, 10),
    radius=st.floats(1e-6, 1e6),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    steps=st.sampled_from([None, 1, 3]),
)
def test_step_length_decrease_and_cauchy_point(seed, n, radius, shift, steps):
    A, b = symmetric(seed, n, shift=shift)
    solution = ball(A, b, radius, max_steps=steps)
    x, stats = solution.value.numpy(), solution.stats
    length = np.linalg.norm(x)
    assert length <= radius * (1 + 1e-12)
    assert stats["norm"].item() == pytest.approx(length, rel=1e-14)
    if stats["on_boundary"]:
        assert length == pytest.approx(radius, rel=1e-10)
    decrease = -model(A, b, x)
    size = np.abs(A).max() * length**2 + np.linalg.norm(b) * length
    assert stats["decrease"].item() == pytest.approx(decrease, rel=1e-8, abs=1e-12 * size)
    curvature, norm = b @ A @ b, np.linalg.norm(b)
    t = radius / norm if curvature <= 0 else min(norm**2 / curvature, radius / norm)
    assert decrease >= -model(A, b, t * b) * (1 - 1e-9) - 1e-12 * size
    least = norm / 2 * min(radius, norm / np.linalg.norm(A, 2))
    assert decrease >= least * (1 - 1e-9) - 1e-12 * size
    if solution.status == iopt.Status.NEGATIVE_CURVATURE.value:
        assert np.linalg.eigvalsh(A)[0] <= 1e-10


@given(seed=st.integers(0, 999), n=st.integers(1, 8), radius=st.floats(0.01, 100))
def test_a_batch_is_its_tasks(seed, n, radius):
    A, b = symmetric(seed, n, (4,), shift=1.0)
    whole = ball(A, b, radius)
    for i in range(4):
        alone = ball(A[i], b[i], radius)
        torch.testing.assert_close(whole.value[i], alone.value, rtol=1e-7, atol=1e-9)
        assert whole.status[i] == alone.status


@pytest.mark.parametrize("power", [-80, 0, 80])
def test_a_tiny_or_huge_model_is_the_same_model(power):
    A, b = (torch.tensor(t, dtype=torch.float32) for t in symmetric(0, 6, (20,)))
    here, there = ball(A, b, 1.0), ball(A, b * 2.0**power, 2.0**power)
    assert torch.equal(there.value, here.value * 2.0**power)


def test_nan_stays_in_its_task():
    A, b = symmetric(0, 4, (3,), shift=3.0)
    clean = ball(A, b, 1.0)
    A[1, 0, 0] = np.nan
    solution = ball(A, b, 1.0)
    assert solution.status.tolist()[1] == iopt.Status.NONFINITE.value
    assert solution.value[1].isnan().all()
    for i in (0, 2):
        assert torch.equal(solution.value[i], clean.value[i])


def test_nothing_to_do():
    solution = ball(np.eye(3), np.zeros(3), 1.0)
    assert (solution.value.tolist(), solution.status.item()) == ([0.0] * 3, 0)


# ------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONVEX)
def test_reaches_the_minimiser(name, batch):
    p = CONVEX[name](batch)
    solver = iopt.trust_region(tol=1e-9)
    solution = iopt.minimize(p.objective, *p.args, solver=solver, batch_ndim=len(batch))
    assert (solution.status == 0).all()
    assert solution.stats["grad_norm"].max() <= 1e-9
    torch.testing.assert_close(p.flat(solution.value), p.flat(p.minimiser), rtol=1e-6, atol=1e-6)


def rosenbrock(x, _):
    return ((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2).sum()


def start(n):
    return torch.tensor([-1.2, 1.0] * (n // 2), dtype=F64)


@pytest.mark.parametrize("n", [2, 4])
def test_rosenbrock(n):
    solver = iopt.trust_region(tol=1e-10)
    solution = iopt.minimize(rosenbrock, start(n), (), solver=solver)
    x = solution.value.numpy()
    theirs = scipy.optimize.minimize(
        scipy.optimize.rosen,
        start(n).numpy(),
        method="trust-ncg",
        jac=scipy.optimize.rosen_der,
        hess=scipy.optimize.rosen_hess,
        options={"gtol": 1e-10},
    )
    assert solution.status == 0
    assert abs(scipy.optimize.rosen(x) - theirs.fun) < 1e-8
    np.testing.assert_allclose(x, theirs.x, rtol=0, atol=1e-8)
    assert solution.stats["steps"].item() <= theirs.nit + 10


def test_goes_on_where_plain_newton_does_not():
    """With a Hessian that is not definite, Newton's full steps do not even go down."""
    p = tanh_mlp((4,), lam=0.05)
    value = p.bind().values
    eigenvalues = iopt.Hessian(p.bind(), p.flat()).as_matrix()
    assert (torch.linalg.eigvalsh(eigenvalues)[:, 0] < -0.01).any()
    plain = iopt.newton_cg(
        line_search=iopt.FixedStep(1.0),
        linear_solver=iopt.QR(),
        max_steps=30,
        tol=1e-8,
    )
    newton = iopt.minimize(p.objective, *p.args, solver=plain, batch_ndim=1)
    ours = iopt.minimize(p.objective, *p.args, solver=iopt.trust_region(tol=1e-8), batch_ndim=1)
    assert (ours.status == 0).all()
    phi = p.flat(ours.value)
    assert (torch.linalg.eigvalsh(iopt.Hessian(p.bind(), phi).as_matrix())[:, 0] > 0).all()
    theirs = value(p.flat(newton.value))
    assert ((newton.status != 0) | (theirs > value(phi) + 1e-3)).any()
    for i in p.indices()[:2]:
        flat = p.plain(i)

        def value_and_grad(x, flat=flat):
            x = torch.tensor(x, requires_grad=True)
            loss = flat(x)
            return loss.item(), torch.autograd.grad(loss, x)[0].numpy()

        def hessian(x, flat=flat):
            return torch.autograd.functional.hessian(flat, torch.tensor(x)).numpy()

        found = scipy.optimize.minimize(
            value_and_grad,
            phi[i].numpy() + 1e-3,
            method="trust-ncg",
            jac=True,
            hess=hessian,
            options={"gtol": 1e-8},
        )
        assert abs(found.fun - value(phi)[i].item()) < 1e-8


@pytest.mark.parametrize("tol", [0.0, 1e-9])
@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
def test_batch_equals_loop(tol, curvature):
    p = tanh_mlp((2, 3), lam=0.1)
    solver = iopt.trust_region(tol=tol, max_steps=20 if tol else 6, curvature=curvature)
    whole = iopt.minimize(p.objective, *p.args, solver=solver, batch_ndim=2)
    for i in p.indices():
        one = p.task(i)
        alone = iopt.minimize(one.objective, *one.args, solver=solver)
        torch.testing.assert_close(
            p.flat(whole.value)[i], one.flat(alone.value), rtol=1e-6, atol=1e-8
        )
        assert whole.status[i] == alone.status
        assert whole.stats["steps"][i] == alone.stats["steps"]


@pytest.mark.parametrize("where", ["x", "y"])
def test_nan_stays_in_its_task_of_the_solver(where):
    p = ridge(10.0, (3,))
    solver = iopt.trust_region(max_steps=8)
    clean = iopt.minimize(p.objective, *p.args, solver=solver, batch_ndim=1)
    x, y = (t.clone() for t in p.data)
    (x if where == "x" else y)[1, 0] = torch.nan
    solution = iopt.minimize(p.objective, p.init, p.theta, x, y, solver=solver, batch_ndim=1)
    assert solution.status.tolist() == [0, iopt.Status.NONFINITE.value, 0]
    assert torch.equal(solution.value[1], p.init[1])
    assert torch.equal(solution.value[[0, 2]], clean.value[[0, 2]])


def test_a_hessian_that_is_not_finite_is_no_rejected_step():
    F = lambda phi, _: phi.abs().pow(1.5).sum()  # noqa: E731  at 0: gradient 0, Hessian inf
    init = torch.tensor([0.0, 1.0], dtype=F64)
    solution = iopt.minimize(F, init, (), solver=iopt.trust_region(max_steps=3))
    assert solution.status == iopt.Status.NONFINITE.value
    assert torch.equal(solution.value, init)


def test_the_radius_doubles_on_the_boundary_up_to_its_bound():
    slope = torch.tensor([3.0, 4.0], dtype=F64)
    values = []
    for steps in range(1, 6):
        solver = iopt.trust_region(max_steps=steps, max_radius=4.0)
        values.append(iopt.minimize(lambda p, t: t @ p, 0 * slope, slope, solver=solver).value)
    lengths = torch.stack(values).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 3.0, 7.0, 11.0, 15.0], dtype=F64))


def test_a_rejected_step_stays_and_shrinks():
    """The model of a sine at its steepest point is a line: too good to be true for radius 6."""
    F = lambda phi, _: phi.sin().sum()  # noqa: E731
    zero = torch.zeros(1, dtype=F64)
    ends = [
        iopt.minimize(F, zero, (), solver=iopt.trust_region(radius=6.0, max_steps=k))
        for k in (1, 2)
    ]
    assert [end.status.item() for end in ends] == [0, 0]
    assert ends[0].value.item() == 0.0
    assert ends[1].value.item() == pytest.approx(-1.5)


def test_a_collapsed_radius_is_told():
    F = lambda phi, _: 2 * phi.detach().square().sum() - phi.square().sum()  # noqa: E731  grad: -2 phi
    init = torch.tensor([[3.0], [0.5]], dtype=F64)
    solver = iopt.trust_region(max_steps=60)
    solution = iopt.minimize(F, init, (), solver=solver, batch_ndim=1)
    assert (solution.status == iopt.Status.NO_DESCENT.value).all()
    assert torch.equal(solution.value, init)
    assert (solution.stats["steps"] < 40).all()


@pytest.mark.parametrize("offset", [0.0, 1.0, -1e3])
def test_at_the_minimiser_rounding_rejects_nothing(offset):
    A, b = spd(0, 6, 10.0)
    best = torch.linalg.solve(A, b)
    F = lambda phi, _: phi @ A @ phi / 2 - b @ phi + offset  # noqa: E731
    solution = iopt.minimize(F, best, (), solver=iopt.trust_region(max_steps=40))
    assert solution.status == 0
    assert solution.stats["grad_norm"] < 1e-13
    zero = iopt.minimize(lambda p, _: p @ p, 0 * b, (), solver=iopt.trust_region(max_steps=5))
    assert (zero.status.item(), zero.value.abs().max().item()) == (0, 0.0)


def test_a_number_of_cg_steps_asks_the_host_for_nothing(monkeypatch):
    p = tanh_mlp((3,))
    looks = []
    monkeypatch.setattr(
        "implicit_optim._solver.steihaug.none_running", lambda t: looks.append(1) or False
    )
    few = iopt.trust_region(max_steps=3, cg_steps=4)
    iopt.minimize(p.objective, *p.args, solver=few, batch_ndim=1)
    assert not looks
    iopt.minimize(p.objective, *p.args, solver=iopt.trust_region(max_steps=1), batch_ndim=1)
    assert looks


def test_in_a_meta_learner():
    meta = iopt.MetaLearner(
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double(),
        torch.nn.functional.mse_loss,
        solver=iopt.trust_region(tol=1e-8),
        meta_gradient=iopt.Implicit(iopt.CG(rtol=1e-10)),
    )
    x, y = torch.randn(4, 5, 3, dtype=F64), torch.randn(4, 5, 1, dtype=F64)
    meta((x, y), (x, y)).mean().backward()
    assert all(p.grad.isfinite().all() for p in meta.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0.0}, "Invalid radius: 0.0"),
        (
            {"radius": 2.0, "max_radius": 1.0},
            r"Invalid radius: 2.0: it must lie in \(0, max_radius",
        ),
        ({"max_radius": float("inf")}, "Invalid max_radius: inf"),
        ({"eta": 0.25}, r"Invalid eta: 0.25: it must lie in \[0, 1/4\)"),
        ({"eta": -0.1}, "Invalid eta"),
        ({"cg_steps": 0}, "Invalid cg_steps: 0: it must be >= 1"),
        ({"max_steps": -1}, "Invalid max_steps"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        iopt.trust_region(**settings)
