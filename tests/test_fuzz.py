"""Drawn shapes, trees, dtypes and strengths: `attach` and `linear_solve` against dense algebra."""

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import implicit_optim as iopt
from drawn import (
    BATCHES,
    DTYPES,
    NAMES,
    SEEDS,
    SOLVERS,
    TOLERANCE,
    cases,
    close,
    differentiate,
    leaves_of,
    wanting,
)

MANY = settings(max_examples=3 * settings().max_examples)

SUBSETS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)


@MANY
@given(case=cases(), needed=SUBSETS, data=st.data())
def test_attach_at_any_point(case, needed, data):
    """Stationary or not, phi has the gradient of the formula, for either curvature."""
    assume(case.clearly_convex())
    mapped, x_dim = data.draw(st.integers(0, len(case.batch))), data.draw(st.integers(-1, 1))
    v = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    inputs, heard = wanting(case.inputs(), needed), []
    attached = case.attach(inputs, mapped, x_dim, on_solve=lambda name, s: heard.append((name, s)))
    plain = case.tree(case.phi)
    for ours, theirs in zip(leaves_of(attached), leaves_of(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert type(attached) is type(plain)
    ours = differentiate(case, case.weighed(attached, v), inputs, needed)
    expected = case.gradients(case.tensor(v).double().numpy())
    for name in needed:
        close(ours[name], expected[name], case, name)
    ((name, solution),) = heard
    assert (name, tuple(solution.status.shape)) == ("linear_solve", case.batch)
    assert (solution.status == 0).all()


@given(case=cases(), needed=SUBSETS)
def test_no_step_of_cg_is_the_first_order_gradient(case, needed):
    v = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    inputs = wanting(case.inputs(), needed)
    attached = case.attach(inputs, linear_solver=iopt.CG(max_steps=0))
    ours = differentiate(case, case.weighed(attached, v), inputs, needed)
    expected = case.gradients(case.tensor(v).double().numpy(), first_order=True)
    for name in needed:
        close(ours[name], expected[name], case, name)


@MANY
@given(case=cases(links=["linear"]), needed=SUBSETS)
def test_attach_makes_a_ridge_minimiser_differentiable(case, needed):
    """A loss of the solution has the gradient that torch finds through a dense solve."""
    inputs, exact = wanting(case.inputs(), needed), case.inputs()
    exact = wanting({k: [t.double() for t in ts] for k, ts in exact.items()}, needed)
    minimiser = dense_minimiser(case, exact)
    case.phi = minimiser.detach().numpy()
    attached = case.attach(inputs)
    flat = torch.cat([t.reshape(*case.batch, -1) for t in leaves_of(attached)], -1)
    ours = differentiate(case, flat.sin().sum(), inputs, needed)
    theirs = differentiate(case, minimiser.sin().sum(), exact, needed)
    for name in needed:
        close(ours[name], [t.numpy() for t in theirs[name]], case, name)


def dense_strength(case, lam):
    """Lam as a matrix, differentiable in its leaves."""
    if case.lam_kind == "named":
        full = [a.expand(s).reshape(-1) for a, s in zip(lam, case.shapes, strict=True)]
        return torch.diag(torch.cat(full))
    (lam,) = lam
    return (lam + lam.mT) / 2 if lam.ndim == 2 else torch.diag(lam.expand(case.n))


def dense_minimiser(case, inputs):
    (x, y), strength = case.data(inputs), dense_strength(case, inputs["lam"])
    anchor = torch.cat([a.reshape(-1) for a in inputs["anchor"]])
    matrix = x.mT @ x / y.shape[-1] + strength
    right = (x.mT @ y.unsqueeze(-1)).squeeze(-1) / y.shape[-1] + strength @ anchor
    return torch.linalg.solve(matrix, right.unsqueeze(-1)).squeeze(-1)


@MANY
@given(case=cases(), needed=SUBSETS)
def test_linear_solve_with_a_curvature(case, needed):
    """The value, and its derivatives in the point, b and all that the matrix is made of."""
    assume(case.clearly_convex())
    b = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    wanted = ["b", "phi", *needed]
    single = {**case.inputs(), "b": [case.tensor(b)], "phi": [case.tensor(case.phi)]}
    double = {name: [t.double() for t in tensors] for name, tensors in single.items()}
    results = []
    for solution, inputs in ((library_solution, single), (dense_solution, double)):
        value = solution(case, wanting(inputs, wanted))
        tensors = [t for name in wanted for t in inputs[name]]
        gradients = torch.autograd.grad(
            value.sin().sum(), tensors, allow_unused=True, materialize_grads=True
        )
        results.append([value, *gradients])
    for ours, theirs in zip(*results, strict=True):
        close([ours], [theirs.detach().numpy()], case, f"value and gradients in {wanted}")


def library_solution(case, inputs):
    (flat,), (b,) = inputs["phi"], inputs["b"]
    phi = case.tree(case.phi)
    problem = iopt.InnerProblem.bind(
        case.objective(), phi, case.theta(inputs), *case.data(inputs), batch_ndim=len(case.batch)
    )
    solution = iopt.linear_solve(case.curvature(problem, flat), b, SOLVERS[case.dtype])
    assert (solution.status == 0).all()
    return solution.value


def dense_solution(case, inputs):
    (x, y), (phi,), (b,) = case.data(inputs), inputs["phi"], inputs["b"]
    z = (x @ phi.unsqueeze(-1)).squeeze(-1)
    if case.link == "linear":
        bend = torch.ones_like(z)
    else:
        slope = 1 - z.tanh() ** 2
        bend = slope**2
        if case.curvature is iopt.Hessian:
            bend = bend - 2 * (z.tanh() - y) * z.tanh() * slope
    matrix = x.mT @ (bend.unsqueeze(-1) * x) / y.shape[-1] + dense_strength(case, inputs["lam"])
    return torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)


@MANY
@given(
    batch=st.sampled_from(BATCHES), n=st.integers(0, 6), dtype=DTYPES, seed=SEEDS,
    damping=st.sampled_from(["none", "number", "scalar", "per task"]), strided=st.booleans(),
    rhs=st.sampled_from(["any", "zero", "huge", "tiny"]),
)  # fmt: skip
def test_linear_solve_with_a_matrix(batch, n, dtype, seed, damping, strided, rhs):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((*batch, n, n))
    A = root @ np.swapaxes(root, -1, -2) / max(n, 1) + 0.5 * np.eye(n)
    factor = {"any": 1.0, "zero": 0.0, "huge": 1e30, "tiny": 1e-30}[rhs]
    b = factor * rng.standard_normal((*batch, n))
    shift = rng.uniform(0.5, 2, batch if damping == "per task" else ())
    shift = {"none": np.zeros(())}.get(damping, shift)

    matrix = torch.from_numpy(A).to(dtype)
    matrix = (matrix.mT.contiguous().mT if strided else matrix).requires_grad_()
    right = torch.from_numpy(b).to(dtype).requires_grad_()
    given_shift = torch.from_numpy(np.array(shift)).to(dtype).requires_grad_()
    operator = iopt.Dense(matrix)
    if damping != "none":
        operator = iopt.Damped(operator, float(shift) if damping == "number" else given_shift)
    solution = iopt.linear_solve(operator, right, SOLVERS[dtype])

    v = rng.standard_normal((*batch, n))
    tensors = [matrix, right, *([given_shift] if damping in ("scalar", "per task") else [])]
    ours = torch.autograd.grad((solution.value * torch.from_numpy(v).to(dtype)).sum(), tensors)
    full = A + shift[..., None, None] * np.eye(n)
    value = np.linalg.solve(full, b[..., None])[..., 0]
    w = np.linalg.solve(full, v[..., None])[..., 0]
    of_shift = -(w * value).sum(-1)
    expected = [
        -w[..., :, None] * value[..., None, :],
        w,
        of_shift if damping == "per task" else of_shift.sum(),
    ]
    assert (solution.status == 0).all()
    for mine, exact in zip([solution.value, *ours], [value, *expected], strict=False):
        assert (tuple(mine.shape), mine.dtype) == (np.shape(exact), dtype)
        mine, largest = mine.detach().double().numpy(), np.abs(exact).max(initial=0.0)
        np.testing.assert_allclose(mine, exact, rtol=0, atol=TOLERANCE[dtype] * largest)
    if rhs == "zero":
        assert not solution.value.any()
