"""The differentiable solve: derivatives, every composition of transforms, statuses, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from implicit_optim import (
    CG,
    Damped,
    Dense,
    GaussNewton,
    Hessian,
    InnerProblem,
    Status,
    linear_solve,
)
from problems import BATCHES, conv, indefinite, ridge, solve, spd, tanh_mlp

F64 = torch.float64
EXACT = CG(rtol=1e-13, max_steps=200)
SEEDS = st.integers(0, 2**32 - 1)


def symmetric(matrix):
    return (matrix + matrix.mT) / 2


def solved(matrix, b, solver=EXACT):
    return linear_solve(Dense(symmetric(matrix)), b, solver).value


def dense_solved(matrix, b):
    """The same with torch's own differentiable solve."""
    return torch.linalg.solve(symmetric(matrix), b.unsqueeze(-1)).squeeze(-1)


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_gradcheck(batch):
    matrix, b = (t.requires_grad_() for t in spd(0, 3, 5.0, batch))
    assert gradcheck(solved, (matrix, b))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradgradcheck(batch):
    matrix, b = (t.requires_grad_() for t in spd(0, 3, 5.0, batch))
    assert gradgradcheck(solved, (matrix, b))


@given(st.integers(1, 10), SEEDS, st.sampled_from(BATCHES))
def test_gradient_is_that_of_a_dense_solve(n, seed, batch):
    matrix, b = (t.requires_grad_() for t in spd(seed, n, 20.0, batch))
    weights = torch.from_numpy(np.random.default_rng(seed).standard_normal((*batch, n)))
    ours = torch.autograd.grad((solved(matrix, b) * weights).sum(), (matrix, b))
    theirs = torch.autograd.grad((dense_solved(matrix, b) * weights).sum(), (matrix, b))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-7, atol=1e-8 * other.abs().max().item())


def test_gradient_of_only_one_of_the_two():
    matrix, b = spd(0, 4)
    (of_b,) = torch.autograd.grad(solved(matrix, b.requires_grad_()).sum(), b)
    assert np.allclose(of_b, solve(matrix.numpy(), np.ones(4)), rtol=1e-9)
    b = b.detach()
    (of_matrix,) = torch.autograd.grad(solved(matrix.requires_grad_(), b).sum(), matrix)
    outer = -of_b[:, None].numpy() * solve(matrix.detach().numpy(), b.numpy())
    assert np.allclose(of_matrix, (outer + outer.T) / 2, rtol=1e-8)


def test_only_the_value_is_differentiable():
    matrix, b = spd(0, 3)
    x, status, stats = linear_solve(Dense(matrix.requires_grad_()), b, EXACT)
    assert x.requires_grad
    assert not status.requires_grad
    assert not any(number.requires_grad for number in stats.values())


def test_no_graph_where_none_is_wanted():
    matrix, b = spd(0, 3)
    assert not linear_solve(Dense(matrix), b, EXACT).value.requires_grad
    with torch.no_grad():
        assert not linear_solve(Dense(matrix.requires_grad_()), b, EXACT).value.requires_grad


def test_an_unused_value_gives_no_gradient():
    matrix, b = spd(0, 3)
    matrix.requires_grad_()
    solution = linear_solve(Dense(matrix), b, EXACT)
    (gradient,) = torch.autograd.grad(
        (solution.value * 0 + 1).sum() + matrix.sum(), matrix, allow_unused=True
    )
    assert torch.equal(gradient, torch.ones(3, 3, dtype=F64))


@pytest.mark.parametrize("damping", [0.3, torch.tensor(0.3, dtype=F64)])
@pytest.mark.parametrize("batch", BATCHES)
def test_damped(damping, batch):
    matrix, b = spd(0, 4, 50.0, batch)
    x = linear_solve(Damped(Dense(matrix), damping), b, EXACT).value
    assert np.allclose(x, solve(matrix.numpy() + 0.3 * np.eye(4), b.numpy()), rtol=1e-9)


@pytest.mark.parametrize("shape", ["scalar", "per task"])
@pytest.mark.parametrize("batch", BATCHES)
def test_gradient_with_respect_to_the_damping(shape, batch):
    matrix, b = spd(0, 4, 50.0, batch)
    shape = batch if shape == "per task" else ()
    damping = (0.3 + torch.rand(shape, dtype=F64)).requires_grad_()
    x = linear_solve(Damped(Dense(matrix), damping), b, EXACT).value
    (gradient,) = torch.autograd.grad(x.sum(), damping)
    full = damping.detach().expand(batch).numpy()[..., None, None]
    A = matrix.numpy() + full * np.eye(4)
    expected = -(solve(A, np.ones((*batch, 4))) * solve(A, b.numpy())).sum(-1)
    expected = expected if shape == batch else expected.sum()
    assert np.allclose(gradient, expected, rtol=1e-8)


def test_gradcheck_of_the_damping():
    matrix, b = spd(0, 3, 5.0, (2,))
    damping = torch.tensor([0.3, 1.0], dtype=F64, requires_grad=True)

    def of(matrix, damping, b):
        return linear_solve(Damped(Dense(symmetric(matrix)), damping), b, EXACT).value

    args = (matrix.requires_grad_(), damping, b.requires_grad_())
    assert gradcheck(of, args)
    assert gradgradcheck(of, args)


@pytest.mark.parametrize("steps", [1, 2])
def test_backward_uses_the_same_solver(steps):
    """`d<w, x>/db` is the solver's own answer for w, also where it is no exact solve."""
    matrix, b = spd(0, 6, 100.0)
    w = torch.linspace(-1, 1, 6, dtype=F64)
    x = linear_solve(Dense(matrix), b.requires_grad_(), CG(max_steps=steps)).value
    (gradient,) = torch.autograd.grad(x @ w, b)
    assert torch.equal(gradient, CG(max_steps=steps).solve(Dense(matrix).linearize(), w).value)


def curvature_solve(kind, phi, theta, b):
    problem = InnerProblem.bind(tanh_mlp().objective, phi, theta, *tanh_mlp().data)
    return linear_solve(kind(problem, problem.layout.ravel(phi)), b, EXACT).value


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_gradient_through_a_curvature_is_a_finite_difference(kind):
    """With respect to the point, lam and b, along one random direction."""
    zoo = tanh_mlp(lam=1.0)
    generator = torch.Generator().manual_seed(0)
    names = list(zoo.init)
    b = torch.randn(zoo.flat().shape, generator=generator, dtype=F64)

    def value(lam, b, *leaves):
        phi = dict(zip(names, leaves, strict=True))
        return curvature_solve(kind, phi, (zoo.theta[0], lam), b).cos().sum()

    point = (zoo.theta[1], b, *zoo.init.values())
    gradients = torch.func.grad(value, argnums=tuple(range(len(point))))(*point)
    for at in range(len(point)):
        direction = torch.randn(point[at].shape, generator=generator, dtype=F64)
        step = 1e-5
        there, back = (
            value(*(p + sign * step * direction if i == at else p for i, p in enumerate(point)))
            for sign in (1, -1)
        )
        numeric = ((there - back) / (2 * step)).item()
        assert (gradients[at] * direction).sum().item() == pytest.approx(
            numeric, rel=1e-6, abs=1e-8
        )


# -- transforms ------------------------------------------------------------------------------------


@given(st.integers(1, 6), SEEDS)
def test_vmap_over_the_right_hand_side(n, seed):
    matrix, b = spd(seed, n, 20.0)
    rhs = b * torch.linspace(-1, 1, 5, dtype=F64)[:, None] + 1
    got = vmap(lambda b: solved(matrix, b))(rhs)
    assert np.allclose(got, solve(matrix.numpy(), rhs.numpy()), rtol=1e-7, atol=1e-9)


@given(st.integers(1, 6), SEEDS)
def test_vmap_over_the_matrix(n, seed):
    matrices = spd(seed, n, 20.0, (4,))[0]
    b = spd(seed, n)[1]
    got = vmap(lambda matrix: solved(matrix, b))(matrices)
    assert np.allclose(got, solve(matrices.numpy(), b.numpy()), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("in_dims", [(0, 1), (2, 0), (1, 1)])
def test_vmap_over_any_dimension(in_dims):
    matrix, b = spd(0, 3, 5.0, (4,))
    moved = matrix.movedim(0, in_dims[0]).contiguous(), b.movedim(0, in_dims[1]).contiguous()
    got = vmap(solved, in_dims=in_dims)(*moved)
    assert np.allclose(got, solve(matrix.numpy(), b.numpy()), rtol=1e-9)


def test_nested_vmap():
    """Over pairs of a matrix and a right-hand side."""
    matrices, rhs = spd(0, 4, 20.0, (3,))[0], spd(1, 4, 20.0, (2,))[1]
    got = vmap(lambda m: vmap(lambda b: solved(m, b))(rhs))(matrices)
    swapped = vmap(lambda b: vmap(lambda m: solved(m, b))(matrices))(rhs)
    expected = solve(matrices.numpy()[:, None], np.broadcast_to(rhs.numpy(), (3, 2, 4)))
    assert np.allclose(got, expected, rtol=1e-9)
    assert np.allclose(swapped, np.swapaxes(expected, 0, 1), rtol=1e-9)


def test_vmap_of_a_batch():
    matrix, b = spd(0, 3, 5.0, (2, 3))
    assert np.allclose(vmap(solved)(matrix, b), solve(matrix.numpy(), b.numpy()), rtol=1e-9)


@pytest.mark.parametrize("argnums", [0, 1])
def test_vmap_of_grad_is_a_loop(argnums):
    matrix, b = spd(0, 4, 20.0, (3,))
    weights = torch.linspace(-1, 2, 4, dtype=F64)
    of = lambda solve: lambda m, b: (solve(m, b) * weights).cos().sum()  # noqa: E731
    together = vmap(grad(of(solved), argnums))(matrix, b)
    loop = torch.stack(
        [grad(of(dense_solved), argnums)(m, b) for m, b in zip(matrix, b, strict=True)]
    )
    assert torch.allclose(together, loop, rtol=1e-7, atol=1e-9)


def test_vmap_of_vmap_of_grad():
    matrix, b = spd(0, 3, 5.0, (2, 3))
    of = lambda solve: grad(lambda m, b: solve(m, b).cos().sum())  # noqa: E731
    together = vmap(vmap(of(solved)))(matrix, b)
    expected = torch.stack(
        [torch.stack([of(dense_solved)(matrix[i, j], b[i, j]) for j in range(3)]) for i in range(2)]
    )
    assert torch.allclose(together, expected, rtol=1e-7, atol=1e-9)


def test_grad_of_vmap():
    matrix, rhs = spd(0, 3)[0], spd(1, 3, batch=(4,))[1]
    of = lambda solve: grad(lambda m: vmap(lambda b: solve(m, b))(rhs).cos().sum())  # noqa: E731
    assert torch.allclose(of(solved)(matrix), of(dense_solved)(matrix), rtol=1e-7)


def test_jacrev_is_the_inverse():
    matrix, b = spd(0, 4, 10.0)
    jacobian = jacrev(lambda b: solved(matrix, b))(b)
    assert np.allclose(jacobian, np.linalg.inv(matrix.numpy()), rtol=1e-9)


def test_grad_of_grad():
    matrix, b = spd(0, 3, 5.0)
    of = lambda solve: grad(  # noqa: E731
        lambda m: grad(lambda b: solve(m, b).cos().sum())(b).square().sum()
    )
    assert torch.allclose(of(solved)(matrix), of(dense_solved)(matrix), rtol=1e-6)


def test_vmap_over_the_damping():
    matrix, b = spd(0, 4, 50.0)
    dampings = torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    got = vmap(lambda d: linear_solve(Damped(Dense(matrix), d), b, EXACT).value)(dampings)
    A = matrix.numpy() + dampings.numpy()[:, None, None] * np.eye(4)
    assert np.allclose(got, solve(A, np.broadcast_to(b.numpy(), (3, 4))), rtol=1e-9)


def test_vmap_over_the_hyperparameters_of_a_curvature():
    """Then theta is no longer shared by all tasks of the batch."""
    zoo = ridge(10.0)
    (anchor, _), lams = zoo.theta, torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    x = zoo.data[0].numpy()
    b = torch.ones(5, dtype=F64)

    def one(lam):
        problem = InnerProblem.bind(zoo.objective, zoo.init, (anchor, lam), *zoo.data)
        return linear_solve(Hessian(problem, zoo.init), b, EXACT).value.cos().sum()

    A = x.T @ x / len(x) + lams.numpy()[:, None, None] * np.eye(5)
    w = solve(A, np.ones((3, 5)))
    assert np.allclose(vmap(one)(lams), np.cos(w).sum(-1), rtol=1e-9)
    gradient = (solve(A, np.sin(w)) * w).sum(-1)
    assert np.allclose(vmap(grad(one))(lams), gradient, rtol=1e-8)


@pytest.mark.parametrize("outer", ["theta", "data"])
def test_some_batch_dimensions_share_theta_and_others_do_not(outer):
    """Every lam with every task, whichever of the two is mapped outside."""
    zoo = ridge(10.0, (3,))
    (anchor, _), lams = zoo.theta, torch.tensor([0.1, 1.0], dtype=F64)
    b = torch.ones(5, dtype=F64)

    def one(lam, init, x, y):
        problem = InnerProblem.bind(zoo.objective, init, (anchor, lam), x, y)
        return linear_solve(Hessian(problem, init), b, EXACT).value

    over_lam, over_tasks = (0, None, None, None), (None, 0, 0, 0)
    inner, outside = (over_tasks, over_lam) if outer == "theta" else (over_lam, over_tasks)
    got = vmap(vmap(one, in_dims=inner), in_dims=outside)(lams, zoo.init, *zoo.data)
    got = got if outer == "theta" else got.transpose(0, 1)
    x = zoo.data[0].numpy()
    A = np.swapaxes(x, -1, -2) @ x / x.shape[-2] + lams.numpy()[:, None, None, None] * np.eye(5)
    assert np.allclose(got, solve(A, np.ones((2, 3, 5))), rtol=1e-9)


def test_vmap_of_grad_through_batch_norm():
    """Where torch's own second derivatives under vmap go wrong."""
    zoo = conv("batch", (3,), lam=4.0)
    by_hand = conv("batch", (3,), lam=4.0, by_hand=True)
    b = torch.linspace(-1, 1, zoo.flat().shape[-1], dtype=F64)

    def one(phi, lam, x, y):
        problem = InnerProblem.bind(zoo.objective, phi, (zoo.theta[0], lam), x, y)
        flat = problem.layout.ravel(phi)
        return linear_solve(GaussNewton(problem, flat), b, EXACT).value.sum()

    lam = torch.tensor([4.0, 5.0, 6.0], dtype=F64)
    got = vmap(grad(one, argnums=1), in_dims=(0, 0, 0, 0))(zoo.init, lam, *zoo.data)
    for i in range(3):
        task = by_hand.task((i,))
        A = gauss_newton_by_hand(task) + (lam[i].item() - 4.0) * np.eye(len(b))
        expected = -solve(A, np.ones(len(b))) @ solve(A, b.numpy())
        assert got[i].item() == pytest.approx(expected, rel=1e-7)


def gauss_newton_by_hand(task):
    """`J^T H_out J + lam` of one task of a network with cross-entropy, from dense Jacobians."""
    leaves = list(task.init.values())
    sizes, shapes = [t.numel() for t in leaves], [t.shape for t in leaves]

    def outputs(flat):
        views = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        return task.objective.predict(dict(zip(task.init, views, strict=True)), task.data[0])

    flat = task.flat()
    J = torch.autograd.functional.jacobian(outputs, flat).numpy()  # [N, classes, n]
    p = torch.softmax(outputs(flat), -1).numpy()
    H = (p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]) / len(p)
    return np.einsum("ncp,ncd,ndq->pq", J, H, J) + task.theta[1].item() * np.eye(len(flat))


# -- statuses and numbers --------------------------------------------------------------------------


def mixed():
    """A good task, an indefinite one, a NaN one, and a zero right-hand side."""
    matrix, b = spd(0, 4, 10.0, (4,))
    matrix[1] = -matrix[1]
    matrix[2, 0, 0] = math.nan
    b[3] = 0
    return matrix, b, [Status.SUCCESS, Status.NEGATIVE_CURVATURE, Status.NONFINITE, Status.SUCCESS]


def test_statuses():
    matrix, b, expected = mixed()
    assert linear_solve(Dense(matrix), b, CG(rtol=1e-8)).status.tolist() == expected


def test_statuses_under_vmap():
    matrix, b, expected = mixed()
    together = linear_solve(Dense(matrix), b, CG(rtol=1e-8))
    got = vmap(lambda m, b: linear_solve(Dense(m), b, CG(rtol=1e-8)))(matrix, b)
    assert got.status.tolist() == expected
    assert got.status.dtype == torch.int8
    assert torch.allclose(got.value, together.value, rtol=1e-9, equal_nan=True)
    assert list(got.stats) == [*CG.stats_names, "stationarity"]
    assert torch.equal(got.stats["steps"], together.stats["steps"])


def test_gradient_of_a_good_task_beside_bad_ones():
    matrix, b, _ = mixed()
    matrix.requires_grad_()
    x = linear_solve(Dense(matrix), b, EXACT).value
    (gradient,) = torch.autograd.grad(x[0].sum() + x[3].sum(), matrix)
    A, rhs = matrix[0].detach().numpy(), b[0].numpy()
    expected = -np.outer(solve(A, np.ones(4)), solve(A, rhs))
    assert np.allclose(gradient[0], expected, rtol=1e-8)
    assert torch.equal(gradient[3], torch.zeros(4, 4, dtype=F64))


def test_stationarity_is_the_norm_of_the_gradient():
    zoo = ridge(10.0, (3,))
    moved = zoo.minimiser + torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
    b = torch.ones_like(moved)
    stats = linear_solve(Hessian(zoo.bind(), moved), b, EXACT).stats
    x, lam = zoo.data[0].numpy(), zoo.theta[1].item()
    A = np.swapaxes(x, -1, -2) @ x / x.shape[-2] + lam * np.eye(5)
    expected = np.linalg.norm(A @ (moved - zoo.minimiser).numpy()[..., None], axis=(-2, -1))
    assert np.allclose(stats["stationarity"], expected, rtol=1e-9, atol=1e-12)


def test_stationarity_is_unknown_for_a_bare_matrix():
    matrix, b = spd(0, 3, batch=(2,))
    assert torch.isnan(linear_solve(Dense(matrix), b).stats["stationarity"]).tolist() == [True] * 2


def test_the_default_solver_is_cg():
    matrix, b = spd(0, 10, 100.0)
    default, explicit = linear_solve(Dense(matrix), b), linear_solve(Dense(matrix), b, CG())
    assert torch.equal(default.value, explicit.value)
    assert explicit.stats["residual_norm"] <= 1e-6 * explicit.stats["rhs_norm"]


def test_an_indefinite_curvature_under_vmap():
    zoo = indefinite((3,))
    b = torch.from_numpy(np.linalg.eigh(zoo.data[0][0].numpy())[1][..., 0])

    def one(phi, data, b):
        problem = InnerProblem.bind(zoo.objective, phi, zoo.theta, data)
        return linear_solve(Hessian(problem, phi), b, CG(rtol=1e-6))

    solution = vmap(one)(zoo.init, zoo.data[0], b)
    assert solution.status.tolist() == [Status.NEGATIVE_CURVATURE] * 3
    assert torch.equal(solution.value, b)  # lam is 1


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"b has shape .*, the operator takes \(3,\)"):
        linear_solve(Dense(torch.eye(3)), torch.ones(shape))


def test_wrong_operator():
    with pytest.raises(TypeError, match=r"operator must be an Operator such as Dense\(matrix\)"):
        linear_solve(torch.eye(3), torch.ones(3))


@pytest.mark.parametrize("solver", ["cg", CG])
def test_wrong_solver(solver):
    with pytest.raises(TypeError, match=r"linear_solver must be a LinearSolver such as CG\(\)"):
        linear_solve(Dense(torch.eye(3)), torch.ones(3), solver)


@pytest.mark.parametrize("shape", [(3,), (), (2, 3), (2, 3, 2)])
def test_matrix_that_is_not_square(shape):
    with pytest.raises(ValueError, match=r"matrix must be \[\*batch, n, n\], got \("):
        Dense(torch.ones(shape))


def test_a_solve_of_a_derivative_is_told_of():
    """`diag(1, -1)` is definite along the right-hand side and not along the cotangent."""
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    heard = []

    def solve(b):
        tell = lambda name, solution: heard.append((name, int(solution.status)))  # noqa: E731
        return linear_solve(Dense(matrix), b, CG(rtol=1e-8), on_solve=tell).value

    grad(lambda b: solve(b).sum())(b)
    fine = ("linear_solve", Status.SUCCESS.value)
    failed = ("linear_solve", Status.NEGATIVE_CURVATURE.value)
    assert heard == [fine, failed]
    heard.clear()
    torch.func.jvp(solve, (b,), (torch.ones(2, dtype=torch.float64),))
    assert heard == [failed, fine]  # forward mode takes the tangent before the value is handed back
