"""attach: the implicit gradient against closed forms, finite differences and long unrolls."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev, vmap

import implicit_optim as iopt

DOUBLE = torch.float64
EXACT = iopt.CG(rtol=1e-13, max_steps=500)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(DOUBLE)


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


def logistic(phi, theta, x, y):
    """Smooth, strongly convex, with a Hessian that changes from point to point."""
    anchor, lam = theta
    return F.softplus(-y * (x @ phi)).mean() + iopt.proximal(phi, (anchor, lam))


def solved(theta, lam, x, y, objective=logistic, batch_ndim=0, **kwargs):
    init = torch.zeros(*x.shape[:batch_ndim], theta.shape[-1])
    # Under vmap a loop cannot stop early, so the limits are close to what n = 4 needs.
    few = iopt.CG(rtol=1e-13, max_steps=12)
    solver = iopt.newton_cg(linear_solver=few, tol=1e-12, max_steps=12)
    solution = iopt.minimize(
        objective, init, (theta, lam), x, y, solver=solver, batch_ndim=batch_ndim
    )
    return iopt.attach(
        solution.value, objective, (theta, lam), x, y,
        linear_solver=EXACT, batch_ndim=batch_ndim, **kwargs,
    )  # fmt: skip


def logistic_inputs(batch=(), n=4, examples=6):
    theta = torch.randn(n, requires_grad=True)
    lam = torch.tensor(0.7, requires_grad=True)
    x = torch.randn(*batch, examples, n, requires_grad=True)
    y = torch.randn(*batch, examples).sign()
    return theta, lam, x, y


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
    layout, root = iopt.Layout.of(phi), torch.randn(3, 3)
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


# -- composition with the transforms ------------------------------------------------------------------


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


# -- networks -----------------------------------------------------------------------------------------


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


def test_conv_net_with_batch_norm_against_finite_differences():
    net = small_net()
    anchor = {k: p.detach() for k, p in net.named_parameters()}
    layout = iopt.Layout.of(anchor)
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
    layout = iopt.Layout.of(anchor)
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


# -- a phi from anywhere ------------------------------------------------------------------------------


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


# -- negative curvature, NaN --------------------------------------------------------------------------


def saddle(phi, theta, eigenvalues):
    anchor, lam = theta
    return (eigenvalues * phi**2).sum() / 2 + iopt.proximal(phi, (anchor, lam))


def test_negative_curvature_of_one_task_spares_the_others_and_gives_no_nan():
    eigenvalues = torch.tensor([[1.0, 2.0, 3.0], [-9.0, -9.0, -9.0], [30.0, 2.0, -4.0]])
    lam, anchor = torch.tensor(2.0), torch.zeros(3, requires_grad=True)
    objective = iopt.Objective(lambda phi, e: e * phi**2 / 2, lambda z, _: z.sum(), iopt.proximal)
    data = (eigenvalues, torch.zeros(3))
    heard = []
    phi = iopt.attach(
        torch.zeros(3, 3), objective, (anchor, lam), *data,
        linear_solver=iopt.CG(max_steps=5), batch_ndim=1, on_solve=lambda _, s: heard.append(s),
    )  # fmt: skip
    v = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 0.1, 1.0]])
    gradients = [torch.autograd.grad(phi[i] @ v[i], anchor, retain_graph=True)[0] for i in range(3)]
    torch.testing.assert_close(gradients[0], 2 * v[0] / (2 + eigenvalues[0]))
    torch.testing.assert_close(gradients[1], v[1])  # stopped at once: first order, never zero
    # A numpy-free account of task 2: step 1 is steepest descent, step 2 meets p.Ap < 0.
    a = eigenvalues[2] + 2
    step = (v[2] @ v[2]) / (v[2] @ (a * v[2]))
    torch.testing.assert_close(gradients[2], 2 * step * v[2])
    assert heard[0].status.tolist() == [0, 0, 0]  # its own right-hand side was zero elsewhere
    assert heard[1].status.tolist() == [0, 2, 0]
    assert heard[2].status.tolist() == [0, 0, 2]
    assert "GaussNewton" in heard[2].summary()


def test_nan_in_one_task_is_flagged_and_the_others_are_right():
    theta, lam, x, y = logistic_inputs((3,))
    x = x.detach().clone()
    objective = iopt.Objective(
        lambda phi, x: x @ phi, lambda z, y: F.softplus(-y * z).mean(), iopt.proximal
    )
    clean = solved(theta, lam, x[:2], y[:2], objective, batch_ndim=1)
    (expected,) = torch.autograd.grad(clean.sum(), theta)
    x[2, 0, 0] = torch.nan
    heard = []
    phi = solved(theta, lam, x, y, objective, batch_ndim=1, on_solve=lambda _, s: heard.append(s))
    (g,) = torch.autograd.grad(phi[:2].sum(), theta, retain_graph=True)
    torch.testing.assert_close(phi[:2], clean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-14)
    (g,) = torch.autograd.grad(phi[2].sum(), theta)
    assert torch.isnan(g).all() and heard[-1].status.tolist() == [0, 0, 4]


# -- errors -------------------------------------------------------------------------------------------


def test_errors_name_the_argument_and_the_remedy():
    theta, lam, x, y = logistic_inputs((3,))
    phi = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"data\[1\] has shape .* must lead with phi's batch"):
        iopt.attach(phi, logistic, (theta, lam), x, y[:2], batch_ndim=1)
    with pytest.raises(TypeError, match=r"GaussNewton needs the structure .* Objective\(predict"):
        iopt.attach(phi, logistic, (theta, lam), x, y, batch_ndim=1, curvature=iopt.GaussNewton)
    with pytest.raises(TypeError, match="phi must be a floating-point tensor, got torch.int64"):
        iopt.attach(phi.long(), logistic, (theta, lam), x, y, batch_ndim=1)
    with pytest.raises(TypeError, match="objective must be callable"):
        iopt.attach(phi, "loss", (theta, lam), x, y, batch_ndim=1)
    with pytest.raises(ValueError, match="are empty: give at least one task"):
        iopt.attach(phi[:0], logistic, (theta, lam), x[:0], y[:0], batch_ndim=1)
    with pytest.raises(ValueError, match="one scalar per task, .* set batch_ndim"):
        iopt.minimize(lambda p, t: p, phi, theta, solver=iopt.gd(lr=0.1))
    with pytest.raises(TypeError, match="solver must be gd"):
        iopt.minimize(logistic, phi[0], (theta, lam), x[0], y[0], solver="gd")
    with pytest.raises(ValueError, match="is on meta but phi is on cpu"):
        iopt.attach(phi, logistic, (theta, lam), x, y.to("meta"), batch_ndim=1)


def test_lam_of_another_dtype():
    """A vector or matrix that would fail deep inside CG is refused; a scalar promotes."""
    anchor, phi = torch.ones(3, dtype=torch.float32), torch.zeros(3, dtype=torch.float32)
    for lam in (torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)):
        with pytest.raises(
            ValueError, match="lam has dtype torch.float64 but the anchor has torch.float32"
        ):
            iopt.proximal(phi, (anchor, lam))
    scalar = torch.tensor(2.0, dtype=torch.float64)
    assert iopt.proximal(phi, (anchor, scalar)).item() == 3


def test_torchs_older_vmap_with_a_tolerance():
    """`is_grads_batched` uses it: nobody may look whether all tasks are done."""
    theta = torch.ones(2, requires_grad=True)
    phi = iopt.attach(
        theta.detach() * 2 / 3, lambda p, t: p @ p / 2 + (p - t) @ (p - t), theta,
        linear_solver=iopt.CG(rtol=1e-6),
    )  # fmt: skip
    (jacobian,) = torch.autograd.grad(phi, theta, torch.eye(2), is_grads_batched=True)
    torch.testing.assert_close(jacobian, torch.eye(2) * 2 / 3)
