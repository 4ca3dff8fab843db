"""Drawn shapes, trees, dtypes and strengths: `attach` and `linear_solve` against dense algebra.

The inner problem is a regression with outputs `h(X phi)`, mean squared error and a proximal term of
any kind. Its gradient, its Hessian, its Gauss-Newton matrix and its mixed derivatives are written out
in NumPy, for one task at a time: the oracle knows no autograd, no batch dimensions and no pytrees.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import implicit_optim as iopt

BATCHES = [(), (1,), (3,), (2, 3)]
SHAPES = [(), (2,), (1,), (2, 2), (3,), (0,), (1, 3), (0, 3)]
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float64, torch.float32])
DOUBLE = st.just(torch.float64)
KINDS = ["tensor", "list", "tuple", "dict", "named", "nested"]  # named: lam too is a dict
MANY = settings(max_examples=3 * settings().max_examples)
SOLVERS = {torch.float64: iopt.CG(rtol=1e-12, max_steps=500), torch.float32: iopt.CG()}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
NAMES = ["anchor", "lam", "x", "y"]

# The activation with its first two derivatives.
LINKS = {
    "linear": (lambda z: z, np.ones_like, np.zeros_like),
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2, lambda z: -2 * np.tanh(z) / np.cosh(z) ** 2),
}
TORCH_LINKS = {"linear": lambda z: z, "tanh": torch.tanh}


# -- trees, written here once more so that the library's own do not check themselves ----------------


def build(kind, leaves):
    if kind == "tensor":
        return leaves[0]
    if kind == "dict":  # named so that sorting would change the order
        return {f"p{9 - i}": leaf for i, leaf in enumerate(leaves)}
    if kind == "nested":
        return {"z": leaves[0], "a": [tuple(leaves[1:]), {}]}
    return {"list": list, "tuple": tuple}[kind](leaves)


def leaves_of(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in leaves_of(part)]


def flatten(tree):
    """One task's tree as a vector."""
    return torch.cat([leaf.reshape(-1) for leaf in leaves_of(tree)])


def split(flat, shapes, batch=()):
    """A flat array `[*batch, n]` as leaves."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [
        part.reshape((*batch, *shape))
        for part, shape in zip(np.split(flat, ends[:-1], -1), shapes, strict=True)
    ]


def sum_to(array, shape):
    """Undo broadcasting, as a gradient must."""
    array = array.sum(tuple(range(array.ndim - len(shape))))
    ones = tuple(i for i, size in enumerate(shape) if size == 1)
    return array.sum(ones, keepdims=True)


# -- a drawn problem -------------------------------------------------------------------------------


@dataclass
class Case:
    """Everything about a problem, in NumPy and float64 but with the digits of `dtype`."""

    batch: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    shapes: list[tuple[int, ...]]
    link: str
    lam_kind: str
    lam: Any  # an array, or one for each leaf
    anchor: np.ndarray
    x: np.ndarray
    y: np.ndarray
    phi: np.ndarray
    structured: bool
    curvature: Any
    shared: bool  # whether all tasks have the same x, by a view
    strided: bool
    seed: int

    @property
    def n(self):
        return len(self.anchor)

    @property
    def names(self):
        return [f"p{9 - i}" for i in range(len(self.shapes))]

    @property
    def strength(self):
        """Lam as a matrix."""
        if self.lam_kind == "named":
            full = [np.broadcast_to(a, s) for a, s in zip(self.lam, self.shapes, strict=True)]
            return np.diag(np.concatenate([a.reshape(-1) for a in full]))
        return self.lam if self.lam.ndim == 2 else np.diag(np.broadcast_to(self.lam, self.n))

    def lam_gradient(self, of_strength):
        """The gradient in lam from that in the matrix."""
        if self.lam_kind == "named":
            parts = split(np.diag(of_strength), self.shapes)
            return [sum_to(p, a.shape) for p, a in zip(parts, self.lam, strict=True)]
        if self.lam.ndim == 2:
            return [(of_strength + of_strength.T) / 2]
        return [np.diag(of_strength) if self.lam.ndim else np.trace(of_strength)]

    def tasks(self):
        return itertools.product(*(range(size) for size in self.batch))

    def task_x(self, index):
        return self.x if self.shared else self.x[index]

    def matrix(self, index, curvature=None):
        """The Hessian or the Gauss-Newton matrix of one task, the gradient's ingredients."""
        x, y, phi = self.task_x(index), self.y[index], self.phi[index]
        h, dh, ddh = LINKS[self.link]
        z, m = x @ phi, len(y)
        q = (h(z) - y) * dh(z)
        dq = dh(z) ** 2 + (h(z) - y) * ddh(z)
        bend = dh(z) ** 2 if (curvature or self.curvature) is iopt.GaussNewton else dq
        return x.T * bend @ x / m + self.strength, q / m, dq / m, dh(z) / m

    def clearly_convex(self):
        """So that CG does not stop at negative curvature, its floor of 0.1 of lam included."""
        return all(
            np.linalg.eigvals(np.linalg.solve(self.strength, self.matrix(i)[0])).real.min(initial=1)
            > 0.15
            for i in self.tasks()
        )

    def gradients(self, v, first_order=False):
        """`d <v, phi*>` in anchor, lam, x and y by the implicit function theorem, task by task.

        To first order the matrix is lam's alone, or for a plain function nothing is known of it.
        """
        anchor, strength = np.zeros(self.n), np.zeros((self.n, self.n))
        of_x, of_y = np.zeros(self.batch + self.x.shape[-2:]), np.zeros(self.y.shape)
        for i in self.tasks():
            matrix, q, dq, dh = self.matrix(i)
            if first_order:
                matrix = self.strength if self.structured else np.eye(self.n)
            w, x, phi = np.linalg.solve(matrix, v[i]), self.task_x(i), self.phi[i]
            anchor += self.strength @ w
            strength -= np.outer(w, phi - self.anchor)
            of_y[i] = dh * (x @ w)
            of_x[i] = -(np.outer(q, w) + np.outer(dq * (x @ w), phi))
        of_x = of_x.sum(tuple(range(len(self.batch)))) if self.shared else of_x
        anchors = split(anchor, self.shapes)
        return {"anchor": anchors, "lam": self.lam_gradient(strength), "x": [of_x], "y": [of_y]}

    # -- the same in torch ---------------------------------------------------------------------------

    def tensor(self, array):
        return torch.from_numpy(np.array(array)).to(self.dtype)

    def inputs(self):
        """Leaves of anchor, lam, x and y as a caller has them."""
        x = self.tensor(self.x)
        x = x.mT.contiguous().mT if self.strided else x
        lam = self.lam if self.lam_kind == "named" else [self.lam]
        return {
            "anchor": [self.tensor(a) for a in split(self.anchor, self.shapes)],
            "lam": [self.tensor(a) for a in lam],
            "x": [x],
            "y": [self.tensor(self.y)],
        }

    def theta(self, inputs):
        lam = inputs["lam"]
        if self.lam_kind == "named":  # in another order than phi's
            lam = dict(reversed(list(zip(self.names, lam, strict=True))))
        else:
            (lam,) = lam
        return build(self.kind, inputs["anchor"]), lam

    def data(self, inputs):
        (x,), (y,) = inputs["x"], inputs["y"]
        return x.expand(*self.batch, *x.shape) if self.shared else x, y

    def tree(self, flat):
        return build(self.kind, [self.tensor(a) for a in split(flat, self.shapes, self.batch)])

    def objective(self):
        link = TORCH_LINKS[self.link]
        objective = iopt.Objective(
            lambda phi, x: link(x @ flatten(phi)),
            lambda output, y: ((output - y) ** 2).mean() / 2,
            iopt.proximal,
        )
        return objective if self.structured else lambda *args: objective(*args)

    def attach(self, inputs, mapped=0, x_dim=0, **settings):
        """The attached solution; `mapped` of the batch dimensions are left to vmap.

        The first of them then stands at `x_dim` in x.
        """
        theta, objective = self.theta(inputs), self.objective()
        settings = {"linear_solver": SOLVERS[self.dtype], **settings}

        def one(phi, x, y):
            return iopt.attach(
                phi, objective, theta, x, y, batch_ndim=len(self.batch) - mapped,
                curvature=self.curvature, **settings,
            )  # fmt: skip

        x, y = self.data(inputs)
        for level in reversed(range(mapped)):
            one = torch.func.vmap(one, in_dims=(0, 0 if level else x_dim, 0))
        return one(self.tree(self.phi), x.movedim(0, x_dim) if mapped else x, y)

    def weighed(self, tree, v):
        """`<v, phi>` over all tasks."""
        parts = split(v, self.shapes, self.batch)
        pairs = zip(leaves_of(tree), parts, strict=True)
        return sum((leaf * self.tensor(part)).sum() for leaf, part in pairs)


@st.composite
def cases(draw, *, links=tuple(LINKS), dtypes=DTYPES, batches=BATCHES, kinds=KINDS, shapes=SHAPES):
    kind = draw(st.sampled_from(kinds))
    shapes = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=4))
    shapes = shapes[:1] if kind == "tensor" else shapes
    batch, dtype = draw(st.sampled_from(batches)), draw(dtypes)
    lam_kinds = ["named"] if kind == "named" else ["scalar", "vector", "matrix"]
    lam_kind, m = draw(st.sampled_from(lam_kinds)), draw(st.integers(1, 4))
    kind, link = {"named": "dict"}.get(kind, kind), draw(st.sampled_from(links))
    structured = draw(st.sampled_from([True, False, True]))
    curvatures = [iopt.Hessian, iopt.GaussNewton] if structured else [iopt.Hessian]
    shared, strided, seed = draw(st.booleans()), draw(st.booleans()), draw(SEEDS)

    rng = np.random.default_rng(seed)
    digits = np.float32 if dtype == torch.float32 else np.float64
    normal = lambda *shape: rng.standard_normal(shape).astype(digits).astype(float)  # noqa: E731
    positive = lambda *shape: np.asarray(rng.uniform(0.5, 2, shape).astype(digits), float)  # noqa: E731
    n = sum(int(np.prod(shape)) for shape in shapes)
    if lam_kind == "named":
        ones = [draw(st.sampled_from(broadcastable(shape))) for shape in shapes]
        lam = [positive(*shape) for shape in ones]
    elif lam_kind == "matrix":
        root = rng.standard_normal((n, n))
        lam = ((root @ root.T + root.T @ root) / (4 * max(n, 1)) + np.eye(n)).astype(digits)
        lam = np.tril(lam) + np.tril(lam, -1).T.astype(float)
    else:
        lam = positive(*{"scalar": (), "vector": (n,)}[lam_kind])
    x = normal(*(() if shared else batch), m, n)
    phi = normal(*batch, n)
    outputs = LINKS[link][0]((x @ phi[..., None])[..., 0])
    y = (outputs + 0.1 * rng.standard_normal((*batch, m))).astype(digits).astype(float)
    return Case(
        batch, dtype, kind, shapes, link, lam_kind, lam, normal(n), x, y, phi, structured,
        draw(st.sampled_from(curvatures)), shared, strided, seed,
    )  # fmt: skip


def broadcastable(shape):
    """Shapes of lam that broadcast to a leaf: one number, one per last index, one per entry."""
    return [(), shape, *([shape[-1:], (*shape[:-1], 1)] if shape else [])]


def close(got, expected, case, what):
    """Each leaf, relative to the largest entry of all of them."""
    assert len(got) == len(expected), what
    largest = max([np.abs(e).max(initial=0.0) for e in expected] + [1e-2])
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == case.dtype
        assert tuple(ours.shape) == np.shape(theirs)
        np.testing.assert_allclose(
            ours.detach().double().numpy(), theirs, rtol=0,
            atol=TOLERANCE[case.dtype] * largest, err_msg=what,
        )  # fmt: skip


def differentiate(case, total, inputs, needed):
    tensors = [t for name in needed for t in inputs[name]]
    gradients = iter(torch.autograd.grad(total, tensors))
    return {name: [next(gradients) for _ in inputs[name]] for name in needed}


def wanting(inputs, needed):
    for name in needed:
        for t in inputs[name]:
            t.requires_grad_()
    return inputs


SUBSETS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)


# -- what is right ---------------------------------------------------------------------------------


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


# -- what is wrong ---------------------------------------------------------------------------------

BATCHED = cases(dtypes=DOUBLE, batches=BATCHES[1:])


@given(case=BATCHED, axis=st.integers(0, 1), by=st.sampled_from([-1, 1]), which=st.integers(0, 1))
def test_data_of_another_batch_size(case, axis, by, which):
    axis %= len(case.batch)
    data = list(case.data(case.inputs()))
    wrong = list(data[which].shape)
    wrong[axis] += by
    data[which] = torch.ones(wrong, dtype=torch.float64)
    theta, batch_ndim = case.theta(case.inputs()), len(case.batch)
    with pytest.raises(ValueError, match=rf"data\[{which}\] has shape .*phi's batch dimensions"):
        iopt.attach(case.tree(case.phi), case.objective(), theta, *data, batch_ndim=batch_ndim)


@given(case=BATCHED, leaf=st.integers(0, 2))
def test_leaves_of_phi_of_another_batch_size(case, leaf):
    leaves = leaves_of(case.tree(case.phi))
    leaf %= len(leaves)
    leaves[leaf] = torch.ones((case.batch[0] + 1, *leaves[leaf].shape[1:]), dtype=torch.float64)
    inputs, batch_ndim = case.inputs(), len(case.batch)
    with pytest.raises(ValueError, match="leading dimensions|phi's batch dimensions"):
        iopt.attach(
            build(case.kind, leaves), case.objective(), case.theta(inputs), *case.data(inputs),
            batch_ndim=batch_ndim,
        )  # fmt: skip


@given(case=cases(), leaf=st.integers(0, 2), dtype=st.sampled_from([torch.int64, torch.bool]))
def test_a_leaf_of_phi_that_is_no_float(case, leaf, dtype):
    leaves = leaves_of(case.tree(case.phi))
    leaves[leaf % len(leaves)] = leaves[leaf % len(leaves)].to(dtype)
    inputs = case.inputs()
    with pytest.raises(TypeError, match=r"phi.* must be a floating-point tensor, got torch"):
        iopt.attach(
            build(case.kind, leaves), case.objective(), case.theta(inputs), *case.data(inputs),
            batch_ndim=len(case.batch),
        )  # fmt: skip


@given(
    case=cases(kinds=KINDS[1:]).filter(lambda case: len(case.shapes) > 1), leaf=st.integers(0, 2)
)
def test_leaves_of_phi_of_two_dtypes(case, leaf):
    leaves = leaves_of(case.tree(case.phi))
    leaves[leaf % len(leaves)] = leaves[leaf % len(leaves)].half()
    inputs = case.inputs()
    with pytest.raises(ValueError, match="bring all leaves to one dtype and device"):
        iopt.attach(
            build(case.kind, leaves), case.objective(), case.theta(inputs), *case.data(inputs),
            batch_ndim=len(case.batch),
        )  # fmt: skip


@given(case=cases(dtypes=st.just(torch.float32)), which=st.sampled_from(["anchor", "lam"]))
def test_hyperparameters_in_double_precision(case, which):
    """Beside a single-precision phi: right, each gradient in the dtype of its leaf, or refused."""
    assume(case.clearly_convex())
    v = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    inputs = case.inputs()
    inputs[which] = [t.double() for t in inputs[which]]
    total = case.weighed(case.attach(wanting(inputs, NAMES)), v)
    try:
        ours = differentiate(case, total, inputs, NAMES)
    except (RuntimeError, ValueError) as error:
        assert "dtype" in str(error) or "scalar type" in str(error)
        assert case.lam_kind != "scalar"  # which takes the dtype of the anchor
        if "lam has dtype" in str(error):
            lam, anchor = (
                torch.float64 if which == name else torch.float32 for name in ("lam", "anchor")
            )
            assert f"lam has dtype {lam} but the anchor has {anchor}" in str(error)
        return
    assert all(t.dtype == torch.float64 for t in ours[which])
    ours[which] = [t.float() for t in ours[which]]
    expected = case.gradients(case.tensor(v).double().numpy())
    for name in NAMES:
        close(ours[name], expected[name], case, name)


@given(case=cases(dtypes=DOUBLE), number=st.integers(1, 5))
def test_integers_where_they_are_numbers(case, number):
    """An int lam, int targets and an int anchor mean the same as floats."""
    case.lam_kind, case.lam = "scalar", np.array(float(number))
    case.y, case.anchor = np.round(case.y), np.round(3 * case.anchor)
    assume(case.clearly_convex())
    v = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    inputs = wanting(case.inputs(), ["x"])
    for name in ("anchor", "lam", "y"):
        inputs[name] = [t.long() for t in inputs[name]]
    ours = differentiate(case, case.weighed(case.attach(inputs), v), inputs, ["x"])
    close(ours["x"], case.gradients(v)["x"], case, "x")


@given(
    case=cases(dtypes=DOUBLE, batches=[(2,), (4,)], shapes=[(), (1,), (2,), (2, 2)]),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    where=st.sampled_from(["x", "v"]),
    at=st.integers(0, 99),
)
def test_a_task_that_is_not_finite(case, bad, where, at):
    """It alone is NaN and flagged; the others have the very bits that they have without it."""
    if case.shared:  # then by copies
        case.x, case.shared = np.stack([case.x] * case.batch[0]), False
    assume(case.clearly_convex())
    v = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    task, results, heard = at % case.batch[0], [], []
    for spoil in (False, True):
        if spoil:
            spoiled = (case.x if where == "x" else v)[task].reshape(-1)
            spoiled[at % spoiled.size] = bad
        inputs = wanting(case.inputs(), NAMES)
        attached = case.attach(inputs, on_solve=lambda _, s: heard.append(s))
        total = case.weighed(attached, v)
        results.append(differentiate(case, total, inputs, NAMES))
    clean, dirty = results
    others = [i for i in range(case.batch[0]) if i != task]
    for name in ("x", "y"):
        assert torch.equal(clean[name][0][others], dirty[name][0][others])
        assert dirty[name][0][task].isnan().all()
    assert all(t.isnan().all() for t in dirty["anchor"])
    expected = [iopt.Status.NONFINITE if i == task else 0 for i in range(case.batch[0])]
    assert [s.status.tolist() for s in heard] == [[0] * case.batch[0], expected]


@given(case=cases(kinds=["named"]), extra=st.booleans())
def test_lam_must_name_every_parameter(case, extra):
    inputs = wanting(case.inputs(), ["y"])
    anchor, lam = case.theta(inputs)
    other = {"other": torch.tensor(1.0, dtype=case.dtype)}
    lam = {**lam, **other} if extra else {k: v for k, v in lam.items() if k != "p9"}
    message = r"missing \[\], unknown \['other'\]" if extra else r"missing \['p9'\], unknown \[\]"
    attached = iopt.attach(
        case.tree(case.phi), case.objective(), (anchor, lam), *case.data(inputs),
        batch_ndim=len(case.batch),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        flatten(attached).sum().backward()


@given(batch=st.sampled_from(BATCHES), n=st.integers(1, 4), extra=st.sampled_from([0, 1]))
def test_a_right_hand_side_of_another_shape(batch, n, extra):
    matrix = torch.eye(n, dtype=torch.float64).expand(*batch, n, n)
    wrong = [torch.ones(*batch, n + 1), torch.ones(2, *batch, n)][extra]
    with pytest.raises(ValueError, match=r"b has shape .*, the operator takes"):
        iopt.linear_solve(iopt.Dense(matrix), wrong.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex128])
def test_a_right_hand_side_of_another_dtype(dtype):
    """It is refused, never quietly converted."""
    matrix = 2 * torch.eye(3, dtype=torch.float64)
    with pytest.raises((RuntimeError, TypeError), match="dtype|floating point"):
        iopt.linear_solve(iopt.Dense(matrix), torch.ones(3, dtype=dtype))
