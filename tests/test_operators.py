"""Curvature products against dense autograd, task by task, for every problem of the zoo."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import (
    CG,
    Damped,
    Dense,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    InnerProblem,
    Objective,
    Status,
    linear_solve,
    proximal,
)
from problems import (
    BATCHES,
    NORMS,
    ZOO,
    conv,
    least_squares,
    quadratic,
    ridge,
    solve,
    spd,
    tanh_mlp,
)

F64 = torch.float64
NETWORKS = ["tanh_mlp", *(f"conv {norm} norm" for norm in NORMS)]
STRUCTURED = [name for name in ZOO if name != "quadratic"]
LINEAR = ["ridge kappa=1", "ridge kappa=1e2", "ridge kappa=1e6"]
LINEAR += ["logistic", "least_squares", "vector_lam", "matrix_lam", "zero_rhs", "indefinite"]


def by_hand(name, batch):
    """The problem itself; networks with normalisation as their definition in elementary terms."""
    if name.startswith("conv"):
        return conv(name.split()[1], batch, by_hand=True)
    return ZOO[name](batch)


def per_task(problem, of):
    """`of(value, phi)` for every task alone, without vmap, stacked."""
    flat = problem.flat()
    rows = [of(problem.plain(index), flat[index]) for index in problem.indices()]
    return torch.stack(rows).reshape((*problem.batch, *rows[0].shape))


def assert_close(mine, other, rel=1e-9):
    assert mine.shape == other.shape
    assert (mine - other).abs().max().item() <= rel * max(1.0, other.abs().max().item())


# -- the Hessian -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_hessian_is_autograds(name, batch):
    problem = ZOO[name](batch)
    operator = Hessian(problem.bind(), problem.flat())
    expected = per_task(by_hand(name, batch), torch.autograd.functional.hessian)
    assert operator.shape == tuple(problem.flat().shape)
    assert_close(operator.as_matrix(), expected)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_gradient_and_value_of_the_problem(name, batch):
    problem = ZOO[name](batch)
    hand, bound, flat = by_hand(name, batch), problem.bind(), problem.flat()
    values = per_task(hand, lambda value, phi: value(phi))
    gradients = per_task(hand, torch.autograd.functional.jacobian)
    assert_close(bound.values(flat), values)
    assert_close(bound.grad(flat), gradients)
    both = bound.grad_and_value(flat)
    assert_close(both[0], gradients)
    assert_close(both[1], values)


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(Hessian, name) for name in ZOO] + [(GaussNewton, name) for name in STRUCTURED],
)
def test_linearize_is_mv_with_value_and_gradient(kind, name, batch):
    problem = ZOO[name](batch)
    hand = by_hand(name, batch)
    operator = kind(problem.bind(), problem.flat())
    linearized = operator.linearize()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # a linearisation serves many products
        x = torch.randn(operator.shape, generator=generator, dtype=F64)
        assert_close(linearized.mv(x), operator.mv(x), 1e-12)
        expected = (operator.as_matrix() @ x.unsqueeze(-1)).squeeze(-1)
        assert_close(linearized.mv(x), expected, 1e-11)
    assert_close(linearized.value, per_task(hand, lambda value, phi: value(phi)))
    assert_close(linearized.gradient, per_task(hand, torch.autograd.functional.jacobian))


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(BATCHES), st.sampled_from(["tanh_mlp", "logistic"])
)
def test_products_are_symmetric_and_linear(seed, batch, name):
    problem = ZOO[name](batch)
    for kind in (Hessian, GaussNewton):
        mv = kind(problem.bind(), problem.flat()).linearize().mv
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(2, *problem.flat().shape, generator=generator, dtype=F64)
        left, right = torch.linalg.vecdot(y, mv(x)), torch.linalg.vecdot(x, mv(y))
        assert_close(left, right, 1e-11)
        assert_close(mv(2 * x - 3 * y), 2 * mv(x) - 3 * mv(y), 1e-11)


@pytest.mark.parametrize("name", ["tanh_mlp", "conv batch norm"])
def test_one_task_does_not_enter_the_product_of_another(name):
    problem = ZOO[name]((3,))
    for kind in (Hessian, GaussNewton):
        mv = kind(problem.bind(), problem.flat()).linearize().mv
        x = torch.ones_like(problem.flat())
        other = x.clone()
        other[1] = 7.0
        assert_close(mv(other)[[0, 2]], mv(x)[[0, 2]], 1e-12)
        assert (mv(other)[1] - mv(x)[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_mv_differentiates_in_the_point_and_in_theta(kind):
    zoo = tanh_mlp()
    (anchor, lam), names = zoo.theta, list(zoo.init)
    x = torch.linspace(-1, 1, zoo.flat().shape[-1], dtype=F64)

    def product(lam, *leaves):
        phi = dict(zip(names, leaves, strict=True))
        problem = InnerProblem.bind(zoo.objective, phi, (anchor, lam), *zoo.data)
        return kind(problem, problem.layout.ravel(phi)).mv(x)

    point = [t.clone().requires_grad_() for t in (lam, *zoo.init.values())]
    assert torch.autograd.gradcheck(product, point)


def test_an_objective_linear_in_phi_has_no_curvature():
    phi = torch.ones(3, dtype=F64)
    problem = InnerProblem.bind(lambda phi, theta: phi @ theta, phi, phi)
    assert torch.equal(Hessian(problem, phi).as_matrix(), torch.zeros(3, 3, dtype=F64))


# -- Gauss-Newton ----------------------------------------------------------------------------------


def dense_gauss_newton(problem, index):
    """`J^T H_out J + prox` of one task from dense Jacobians and dense Hessians."""
    task = problem.task(index)
    flat, plain = task.flat(), task.objective
    *inputs, target = task.data

    def tree(flat):
        if isinstance(task.init, torch.Tensor):
            return flat
        leaves = list(task.init.values())
        views = flat.split([t.numel() for t in leaves])
        return {
            name: view.reshape(t.shape)
            for (name, t), view in zip(task.init.items(), views, strict=True)
        }

    def outputs(flat):
        return plain.predict(tree(flat), *inputs).reshape(-1)

    shape = plain.predict(tree(flat), *inputs).shape
    J = torch.autograd.functional.jacobian(outputs, flat)
    H = torch.autograd.functional.hessian(
        lambda out: plain.loss(out.reshape(shape), target), outputs(flat)
    )
    prox = torch.autograd.functional.hessian(lambda p: plain.proximal(tree(p), task.theta), flat)
    return J.T @ H @ J + prox


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", STRUCTURED)
def test_gauss_newton_is_the_dense_product(name, batch):
    problem = ZOO[name](batch)
    matrix = GaussNewton(problem.bind(), problem.flat()).as_matrix()
    hand = by_hand(name, batch)
    rows = torch.stack([dense_gauss_newton(hand, index) for index in hand.indices()])
    assert_close(matrix, rows.reshape(matrix.shape))


@pytest.mark.parametrize("name", NETWORKS)
def test_gauss_newton_is_positive_definite_where_the_hessian_is_not(name):
    problem = ZOO[name]((3,))
    lam = problem.theta[1].item()
    theta = (problem.theta[0], torch.tensor(1e-3, dtype=F64))
    bound = InnerProblem.bind(problem.objective, problem.init, theta, *problem.data, batch_ndim=1)
    eigenvalues = torch.linalg.eigvalsh(GaussNewton(bound, problem.flat()).as_matrix())
    assert eigenvalues.min() >= 1e-3 - 1e-12
    assert torch.linalg.eigvalsh(Hessian(bound, problem.flat()).as_matrix()).min() < 0
    full = torch.linalg.eigvalsh(GaussNewton(problem.bind(), problem.flat()).as_matrix())
    assert torch.allclose(full, eigenvalues + lam - 1e-3, atol=1e-9)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_gauss_newton_is_the_hessian_of_a_linear_model(name, batch):
    problem = ZOO[name](batch)
    args = problem.bind(), problem.flat()
    assert_close(GaussNewton(*args).as_matrix(), Hessian(*args).as_matrix())


def test_gauss_newton_is_not_the_hessian_of_a_network():
    args = tanh_mlp().bind(), tanh_mlp().flat()
    difference = GaussNewton(*args).as_matrix() - Hessian(*args).as_matrix()
    assert difference.abs().max() > 1e-2


def test_gauss_newton_without_a_proximal_term():
    zoo = least_squares()
    objective = Objective(zoo.objective.predict, zoo.objective.loss)
    problem = InnerProblem.bind(objective, zoo.init, (), *zoo.data)
    matrix = GaussNewton(problem, zoo.flat()).as_matrix()
    with_lam = GaussNewton(zoo.bind(), zoo.flat()).as_matrix()
    assert_close(matrix, with_lam - zoo.theta[1] * torch.eye(len(matrix), dtype=F64))


def test_gauss_newton_of_a_pytree_of_outputs():
    """Two heads: the matrix is the sum of those of the heads."""

    def predict(phi, x):
        return {"a": torch.tanh(x @ phi), "b": (x @ phi) ** 2}

    def loss(output, y):
        return ((output["a"] - y) ** 2).sum() / 2 + ((output["b"] - y) ** 2).sum() / 2

    generator = torch.Generator().manual_seed(0)
    x, y, phi = (torch.randn(s, generator=generator, dtype=F64) for s in [(5, 3), (5,), (3,)])
    problem = InnerProblem.bind(Objective(predict, loss), phi, (), x, y)
    h = x @ phi
    J_a, J_b = (1 - h.tanh() ** 2)[:, None] * x, (2 * h)[:, None] * x
    assert_close(GaussNewton(problem, phi).as_matrix(), J_a.T @ J_a + J_b.T @ J_b)


CONVEX_LOSSES = {
    "mse": (F.mse_loss, lambda z: z),
    "huber": (F.huber_loss, lambda z: 3 * z),  # on both sides of delta
    "cross entropy": (F.cross_entropy, lambda z: z.argmax(-1)),
    "binary cross entropy": (F.binary_cross_entropy_with_logits, lambda z: (z > 0).to(z)),
    "Poisson": (F.poisson_nll_loss, lambda z: z.exp().round()),
}


@pytest.mark.parametrize("name", CONVEX_LOSSES)
def test_gauss_newton_of_every_loss_that_is_convex_in_the_output(name):
    """``J^T H J + lam`` with J and H by plain autograd; definite for every lam > 0."""
    loss, target = CONVEX_LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    x, y, phi = (torch.randn(s, generator=generator, dtype=F64) for s in [(5, 3), (5, 4), (12,)])
    y, lam = target(y), 0.1

    def predict(phi, x):
        return torch.tanh(x @ phi.reshape(3, 4))

    theta = (torch.zeros(12, dtype=F64), torch.tensor(lam, dtype=F64))
    problem = InnerProblem.bind(Objective(predict, loss, proximal), phi, theta, x, y)
    matrix = GaussNewton(problem, phi).as_matrix()
    J = torch.autograd.functional.jacobian(lambda p: predict(p, x), phi).reshape(20, 12)
    out = predict(phi, x)
    H = torch.autograd.functional.hessian(lambda o: loss(o, y), out).reshape(20, 20)
    assert_close(matrix, J.T @ H @ J + lam * torch.eye(12, dtype=F64))
    assert torch.linalg.eigvalsh(matrix)[0] > 0.99 * lam


def test_gauss_newton_wants_structure():
    problem = quadratic().bind()
    with pytest.raises(TypeError, match="GaussNewton needs the structure of the objective"):
        GaussNewton(problem, quadratic().init).linearize()


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_empirical_fisher_is_the_mean_of_squared_gradients(batch):
    """Against a loop over the examples, each one's gradient by autograd."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*batch, 5, 3, generator=generator, dtype=F64)
    y = torch.randint(0, 4, (*batch, 5), generator=generator)
    phi = torch.randn(*batch, 12, generator=generator, dtype=F64)
    theta = (torch.zeros(12, dtype=F64), torch.tensor(0.5, dtype=F64))

    def predict(phi, x):
        return torch.tanh(x @ phi.reshape(3, 4))

    fit = Objective(predict, F.cross_entropy, proximal)
    problem = InnerProblem.bind(fit, phi, theta, x, y, batch_ndim=len(batch))
    matrices = EmpiricalFisher(problem, phi).as_matrix().reshape(-1, 12, 12)
    tasks = zip(phi.reshape(-1, 12), x.reshape(-1, 5, 3), y.reshape(-1, 5), strict=True)
    for matrix, (p, inputs, labels) in zip(matrices, tasks, strict=True):
        p = p.clone().requires_grad_()
        expected = 0.5 * torch.eye(12, dtype=F64)
        for one, label in zip(inputs, labels, strict=True):
            loss = F.cross_entropy(predict(p, one[None]), label[None])
            (g,) = torch.autograd.grad(loss, p)
            expected += torch.outer(g, g) / 5
        assert_close(matrix, expected)


def test_empirical_fisher_differentiates_like_the_dense_one():
    """The solve's derivative in the targets, against autograd through dense algebra."""
    generator = torch.Generator().manual_seed(0)
    x, y, phi, b = (
        torch.randn(s, generator=generator, dtype=F64) for s in [(5, 3), (5,), (3,), (3,)]
    )
    theta = (torch.zeros(3, dtype=F64), torch.tensor(0.5, dtype=F64))
    fit = Objective(lambda phi, x: torch.tanh(x @ phi), F.mse_loss, proximal)

    def ours(y):
        problem = InnerProblem.bind(fit, phi, theta, x, y)
        return linear_solve(EmpiricalFisher(problem, phi), b, CG(rtol=1e-12)).value

    def dense(y):
        h = torch.tanh(x @ phi)
        g = (2 * (h - y) * (1 - h**2))[:, None] * x
        return torch.linalg.solve(g.T @ g / 5 + 0.5 * torch.eye(3, dtype=F64), b)

    assert_close(ours(y), dense(y))
    jacobians = [torch.func.jacrev(f)(y) for f in (ours, dense)]
    assert torch.allclose(*jacobians, rtol=1e-8, atol=1e-10)


def test_empirical_fisher_wants_examples():
    phi = torch.ones(2, dtype=F64)
    fit = Objective(lambda phi, x: {"a": x @ phi}, lambda o, y: F.mse_loss(o["a"], y))
    problem = InnerProblem.bind(fit, phi, (), torch.ones(3, 2, dtype=F64), torch.ones(3, dtype=F64))
    with pytest.raises(TypeError, match=r"predictions that are one tensor \[N"):
        EmpiricalFisher(problem, phi).linearize()


# -- explicit matrices and damping -----------------------------------------------------------------


@given(st.integers(0, 8), st.integers(0, 2**32 - 1), st.sampled_from(BATCHES))
def test_dense(n, seed, batch):
    matrix, x = spd(seed, n, batch=batch)
    operator = Dense(matrix)
    assert operator.shape == (*batch, n)
    assert torch.equal(operator.as_matrix(), matrix)
    expected = np.einsum("...ij,...j->...i", matrix.numpy(), x.numpy())
    assert np.allclose(operator.mv(x).numpy(), expected, rtol=1e-12, atol=1e-13)
    assert operator.precondition(x) is x


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from(BATCHES), st.booleans())
def test_damped(n, seed, batch, one_per_task):
    matrix, x = spd(seed, n, batch=batch)
    rng = np.random.default_rng(seed)
    damping = torch.from_numpy(rng.uniform(0.1, 2, batch if one_per_task else ()))
    operator = Damped(Dense(matrix), damping)
    expected = matrix.numpy() + damping.numpy()[..., None, None] * np.eye(n)
    assert operator.shape == (*batch, n)
    assert np.allclose(operator.as_matrix(), expected, rtol=1e-12)
    product = np.einsum("...ij,...j->...i", expected, x.numpy())
    assert np.allclose(operator.mv(x), product, rtol=1e-10, atol=1e-12)
    first_order = x.numpy() / damping.numpy()[..., None]
    assert np.allclose(operator.precondition(x), first_order, rtol=1e-14)


def test_damped_curvature_keeps_its_value_and_gradient_and_preconditioner():
    zoo = ridge(10.0, (3,))
    inner = Hessian(zoo.bind(), zoo.flat())
    damped = Damped(inner, 0.5).linearize()
    plain = inner.linearize()
    assert torch.equal(damped.gradient, plain.gradient)
    assert torch.equal(damped.value, plain.value)
    x = torch.ones_like(zoo.flat())
    assert torch.allclose(damped.mv(x), plain.mv(x) + 0.5 * x)
    assert torch.allclose(damped.precondition(x), x / zoo.theta[1])


def test_no_damping_is_no_damping():
    """The end of a schedule that takes the damping to zero."""
    matrix, b = spd(0, 3, batch=(2,))
    operator = Damped(Dense(matrix), torch.tensor([0.0, 0.5], dtype=F64))
    expected = matrix.numpy() + np.array([0.0, 0.5])[:, None, None] * np.eye(3)
    x, status, _ = linear_solve(operator, b, CG(rtol=1e-10))
    assert status.tolist() == [Status.SUCCESS, Status.SUCCESS]
    assert np.allclose(x, solve(expected, b.numpy()), rtol=1e-8)


def test_damping_twice_adds_up():
    matrix, _ = spd(0, 3)
    operator = Damped(Damped(Dense(matrix), 0.5), 0.25)
    assert_close(operator.as_matrix(), matrix + 0.75 * torch.eye(3, dtype=F64))


@pytest.mark.parametrize("name", ["ridge kappa=1e2", "vector_lam", "matrix_lam", "least_squares"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_precondition_inverts_the_proximal_hessian(name, batch):
    problem = ZOO[name](batch)
    n = problem.flat().shape[-1]
    lam = problem.theta[1].numpy()
    prox = lam if lam.ndim == 2 else np.diag(np.broadcast_to(lam, (n,)))
    r = torch.from_numpy(np.random.default_rng(0).standard_normal((*batch, n)))
    expected = np.einsum("ij,...j->...i", np.linalg.inv(prox), r.numpy())
    for kind in (Hessian, GaussNewton):
        got = kind(problem.bind(), problem.flat()).precondition(r)
        assert np.allclose(got, expected, rtol=1e-9)


def test_a_plain_function_is_not_preconditioned():
    r = torch.ones(6, dtype=F64)
    assert torch.equal(Hessian(quadratic().bind(), quadratic().init).precondition(r), r)


# -- a fact of torch that the library is built around ----------------------------------------------


def outside_vmap_of_grad(problem):
    """Columns of the Hessian by differentiating `vmap(grad(F))`, as one would like to write it."""
    tree = torch.func.vmap(
        torch.func.grad(problem.objective), in_dims=(0, None, *(0 for _ in problem.data))
    )
    layout = problem.bind().layout

    def gradients(flat):
        return layout.ravel(tree(layout.unravel(flat), problem.theta, *problem.data))

    flat = problem.flat()
    _, pull = torch.func.vjp(gradients, flat)
    basis = torch.eye(flat.shape[-1], dtype=F64)
    return torch.stack([pull(e.expand_as(flat).contiguous())[0] for e in basis], -1)


@pytest.mark.parametrize("norm", ["batch", "instance", "layer"])
def test_second_derivatives_outside_vmap_of_grad_are_wrong_in_torch(norm):
    """pytorch#196699, #196700. Ours are right; when torch's are, InnerProblem may be simpler."""
    problem = conv(norm, (3,))
    hand = per_task(conv(norm, (3,), by_hand=True), torch.autograd.functional.hessian)
    assert_close(Hessian(problem.bind(), problem.flat()).as_matrix(), hand)
    wrong = outside_vmap_of_grad(problem)
    assert (wrong - hand).norm() / hand.norm() > 1e-2


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives_outside_vmap_of_grad_are_right_by_hand(norm):
    """The fault is in torch's normalisation layers, not in the oracle above."""
    problem = conv(norm, (3,), by_hand=True)
    hand = per_task(problem, torch.autograd.functional.hessian)
    assert_close(outside_vmap_of_grad(problem), hand)


def test_proximal_is_what_the_zoo_uses():
    """So that its inverse is known to the objectives above."""
    assert ridge().objective.proximal is proximal
    assert ridge().objective.inverse_proximal is not None


def test_gauss_newton_without_a_proximal_term_stays_on_its_device():
    """No term of it may come from another device, or in another dtype, than phi's."""
    fit = Objective(lambda phi, x: x @ phi, lambda z, y: ((z - y) ** 2).sum())
    phi = torch.empty(2, 3, dtype=torch.float64, device="meta")
    data = phi.new_empty(2, 4, 3), phi.new_empty(2, 4)
    with torch.no_grad():
        kept = GaussNewton(InnerProblem.bind(fit, phi, (), *data, batch_ndim=1), phi).linearize()
        made = (kept.mv(phi), kept.gradient, kept.value)
    assert {(t.device.type, t.dtype) for t in made} == {("meta", torch.float64)}
