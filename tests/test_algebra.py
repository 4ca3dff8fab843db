"""`A + B`, `A - B`, `A + c`, `c * A`, `A @ B`: held to the same in dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import implicit_optim as iopt
from implicit_optim import Dense, linear_solve

SEEDS = st.integers(0, 10**6)
# Operators of two operators and a number per task, and the same of matrices.
FORMS = {
    "sum": (lambda A, B, c: A + B, lambda A, B, c, eye: A + B),
    "difference": (lambda A, B, c: A - B, lambda A, B, c, eye: A - B),
    "damped": (lambda A, B, c: A + c, lambda A, B, c, eye: A + c * eye),
    "damped, the number first": (lambda A, B, c: c + A, lambda A, B, c, eye: A + c * eye),
    "less": (lambda A, B, c: A - 0.1 * c, lambda A, B, c, eye: A - 0.1 * c * eye),
    "scaled": (lambda A, B, c: c * A, lambda A, B, c, eye: c * A),
    "product": (lambda A, B, c: A @ B, lambda A, B, c, eye: A @ B),
    "all": (lambda A, B, c: (A + 2 * B) @ A + c, lambda A, B, c, eye: (A + 2 * B) @ A + c * eye),
}


def matrices(seed, n, batch, symmetric=False):
    rng = np.random.default_rng(seed)
    A, B = 0.2 * rng.standard_normal((2, *batch, n, n))
    A, B = 3 * np.eye(n) + A, np.eye(n) + B
    if symmetric:
        A, B = (A + np.swapaxes(A, -1, -2)) / 2, (B + np.swapaxes(B, -1, -2)) / 2
    c, b = rng.uniform(0.5, 2, batch), rng.standard_normal((*batch, n))
    return tuple(torch.from_numpy(np.asarray(t)) for t in (A, B, c, b))


def both(name, A, B, c, symmetric=False):
    """The operator and the matrix."""
    of_operators, of_matrices = FORMS[name]
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    operator = of_operators(Dense(A, symmetric=symmetric), Dense(B, symmetric=symmetric), c)
    return operator, of_matrices(A, B, c[..., None, None], eye)


@pytest.mark.parametrize("name", FORMS)
@given(SEEDS, st.integers(1, 6), st.sampled_from([(), (3,), (2, 2)]))
def test_products_are_those_of_the_matrix(name, seed, n, batch):
    A, B, c, b = matrices(seed, n, batch)
    operator, matrix = both(name, A, B, c)
    assert operator.shape == tuple(b.shape)
    for ours, dense in ((operator, matrix), (operator.transpose(), matrix.mT)):
        torch.testing.assert_close(ours.mv(b), (dense @ b[..., None])[..., 0])
        torch.testing.assert_close(ours.linearize().mv(b), (dense @ b[..., None])[..., 0])
        torch.testing.assert_close(ours.as_matrix(), dense)
    # Not symmetric because neither is; a product never says that it is.
    assert not operator.symmetric
    symmetric = both(name, *matrices(seed, n, batch, symmetric=True)[:3], symmetric=True)[0]
    assert symmetric.symmetric == (name not in ("product", "all"))


@pytest.mark.parametrize("name", FORMS)
@given(SEEDS, st.integers(1, 5), st.sampled_from([(), (3,)]))
def test_solves_and_their_gradients_are_those_of_the_matrix(name, seed, n, batch):
    A, B, c, b = (t.requires_grad_() for t in matrices(seed, n, batch))
    operator, matrix = both(name, A, B, c)
    ours = linear_solve(operator, b, iopt.GMRES(rtol=1e-12)).value
    theirs = torch.linalg.solve(matrix, b[..., None])[..., 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    weights = torch.linspace(1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
    for mine, dense in zip(
        torch.autograd.grad((ours * weights).sum(), [A, B, c, b], materialize_grads=True),
        torch.autograd.grad((theirs * weights).sum(), [A, B, c, b], materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, dense, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", FORMS)
def test_vmap_is_a_loop(name):
    A, B, c, b = matrices(0, 3, (4,))

    def solve(A, B, c, b):
        return linear_solve(both(name, A, B, c)[0], b, iopt.GMRES(rtol=1e-12)).value

    together = torch.func.vmap(solve)(A, B, c, b)
    apart = torch.stack([solve(*task) for task in zip(A, B, c, b, strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
    own = torch.func.vmap(lambda A: solve(A, B[0], c[0], b[0]))(A)  # one of the two has a batch
    apart = torch.stack([solve(a, B[0], c[0], b[0]) for a in A])
    torch.testing.assert_close(own, apart, rtol=1e-9, atol=1e-9)


def test_curvatures_of_two_problems():
    """The Hessian of a sum is the sum of the Hessians; a known proximal term stays known."""

    def fit(phi, theta, x, y):
        return torch.nn.functional.mse_loss((x @ phi).tanh(), y) + theta * phi @ phi / 2

    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    phi, theta = torch.randn(3, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    one, two = (
        iopt.Hessian(iopt.InnerProblem.bind(fit, phi, theta, *data), phi)
        for data in zip(x, y, strict=True)
    )
    total = torch.func.hessian(lambda p: fit(p, theta, x[0], y[0]) + 3 * fit(p, theta, x[1], y[1]))
    torch.testing.assert_close((one + 3 * two).as_matrix(), total(phi))
    lam = torch.tensor(4.0, dtype=torch.float64)
    predict = lambda p, x: x @ p  # noqa: E731
    known = iopt.Objective(predict, torch.nn.functional.mse_loss, iopt.proximal)
    problem = iopt.InnerProblem.bind(known, phi, (phi, lam), x[0], y[0])
    A = iopt.GaussNewton(problem, phi)
    r = torch.ones(3, dtype=torch.float64)
    for operator, expected in (
        (A, r / 4),
        (2 * A, r / 8),
        (A + one, r / 4),
        (one + A, r / 4),
        (A + A, r),
        (A @ A, r),
        (A + 2.0, r / 4),
        (one + 2.0, r / 2),
    ):
        torch.testing.assert_close(operator.precondition(r), expected)
        torch.testing.assert_close(operator.linearize().precondition(r), expected)
    with pytest.raises(TypeError, match="Woodbury needs"):  # whose formula is that of A alone
        linear_solve(2 * A, r, iopt.Woodbury())


@pytest.mark.parametrize("solver", [iopt.CG(rtol=1e-9), iopt.Neumann(rtol=1e-9)], ids=repr)
def test_what_is_taken_away_does_not_turn_the_first_order_direction_round(solver):
    """M^-1 must be positive definite, also where M is subtracted and the rest outweighs it."""
    b = torch.tensor([1.0, -2.0], dtype=torch.float64)
    four = Dense(4 * torch.eye(2, dtype=torch.float64))
    easy = iopt.Damped(Dense(torch.zeros(2, 2, dtype=torch.float64)), 2.0)
    for operator, scale in ((four - 1.0, 3.0), (four - easy, 2.0), (four + -0.5 * easy, 3.0)):
        (start,) = linear_solve(operator, b, iopt.CG(max_steps=0)).value @ b[:, None]
        assert start > 0
        x, status, _ = linear_solve(operator, b, solver)
        assert status == iopt.Status.SUCCESS
        torch.testing.assert_close(x, b / scale)


def test_what_does_not_fit():
    two, three = Dense(torch.eye(2)), Dense(torch.eye(3))
    for make in (lambda: two + three, lambda: two @ three):
        with pytest.raises(ValueError, match=r"different shapes, \(2,\) and \(3,\)"):
            make()
    for make in (lambda: two + "a", lambda: two * two, lambda: two @ 2.0, lambda: None * two):
        with pytest.raises(TypeError, match="unsupported operand"):
            make()
    A = Dense(torch.eye(2))
    with pytest.raises(TypeError, match="needs a symmetric operator, Product is none"):
        linear_solve(A @ A, torch.ones(2))


@given(SEEDS, st.integers(1, 6), st.sampled_from([(), (3,), (2, 2)]))
def test_diagonal_operators_are_diagonal_matrices(seed, n, batch):
    """Products, solves, derivatives, and what they precondition, against the dense matrix."""
    A, _, _, b = matrices(seed, n, batch, symmetric=True)
    A = A @ A.mT
    d = torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 2, (*batch, n)))
    operator = iopt.Diagonal(d)
    torch.testing.assert_close(operator.as_matrix(), torch.diag_embed(d))
    torch.testing.assert_close(operator.diagonal(), d)
    whole = Dense(A) + operator
    torch.testing.assert_close(whole.precondition(b), b / d)
    d_ = d.clone().requires_grad_()
    ours = linear_solve(Dense(A) + iopt.Diagonal(d_), b, iopt.CG(rtol=1e-12)).value
    dense = torch.linalg.solve(A + torch.diag_embed(d_), b)
    torch.testing.assert_close(ours, dense, rtol=1e-8, atol=1e-10)
    gradients = [torch.autograd.grad(x.square().sum(), d_)[0] for x in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


def test_a_diagonal_that_is_not_positive_preconditions_nothing():
    d, r = torch.tensor([[1.0, 2.0], [1.0, -2.0]]), torch.ones(2, 2)
    assert iopt.Diagonal(d).precondition(r).tolist() == [[1.0, 0.5], [1.0, 1.0]]


def test_a_diagonal_solve_under_vmap():
    d = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    solve = lambda d: linear_solve(iopt.Diagonal(d), torch.ones_like(d)).value  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(solve)(d), 1 / d)
    torch.testing.assert_close(torch.func.jacrev(solve)(d[0]), torch.diag(-1 / d[0] ** 2))


def test_hutchinsons_estimate_of_the_diagonal():
    """No bias, and the variance that the docstring states: its standard error over many probes."""
    A, *_ = matrices(0, 5, (2,), symmetric=True)
    operator, probes = Dense(A), 4000
    generator = torch.Generator().manual_seed(0)
    found = operator.diagonal(probes, generator)
    exact = A.diagonal(dim1=-2, dim2=-1)
    others = A - torch.diag_embed(exact)
    deviation = (others.square().sum(-1) / probes).sqrt()
    assert ((found - exact).abs() < 4 * deviation).all()
    assert ((found - exact).abs() > 0.01 * deviation).any()  # an estimate, not the diagonal
    torch.testing.assert_close(iopt.Diagonal(exact).diagonal(1), exact)  # no others: no variance
    again = operator.diagonal(7, torch.Generator().manual_seed(1))
    assert torch.equal(again, operator.diagonal(7, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="Invalid probes: 0"):
        operator.diagonal(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda A, D: A + 0.1,
        lambda A, D: A + D,
        lambda A, D: D + A,
        lambda A, D: 2 * (A + D),
        lambda A, D: A + D + 0.1,
    ],
)
def test_a_sum_with_one_curvature_knows_its_stationarity(make):
    def loss(phi, theta):
        return (phi**4).sum() + theta * phi.sum()

    phi, theta = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(3.0)
    problem = iopt.InnerProblem.bind(loss, phi, theta)
    A, D = iopt.Hessian(problem, phi), iopt.Diagonal(torch.ones(2, dtype=torch.float64))
    solution = linear_solve(make(A, D), torch.ones_like(phi))
    slope = 4 * phi**3 + 3
    torch.testing.assert_close(solution.stats["stationarity"], slope.norm())
    for other in (A + A, A @ D, D @ A):  # not the curvature of one objective
        unknown = linear_solve(other, torch.ones_like(phi), iopt.GMRES())
        assert torch.isnan(unknown.stats["stationarity"])
