"""Ours against SciPy, higher and TorchOpt on the same problems; dense algebra is the arbiter.

Where a peer is right, both must agree with the dense answer. Where a peer is wrong, its answer is
written down next to the dense one: the test fails on the day they mend it, and then `docs/peers.md`,
which names these tests, has a row to correct.
"""

import contextlib
import copy
import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian

import implicit_optim as iopt
from problems import indefinite, logistic, matrix_lam, ridge, spd, tanh_mlp, vector_lam

try:
    import higher
    import torchopt
    from torchopt.diff.implicit import custom_root
except ImportError as error:
    raise ImportError(
        f"tests/test_peers.py compares with higher and torchopt, and {error}: "
        "pip install higher 'torchopt>=0.7.3', or let `make test` build the environment"
    ) from error

OUR_DEFAULT = iopt.CG()
EXACT = iopt.CG(rtol=1e-13, max_steps=500)
NEWTON = iopt.newton_cg(linear_solver=EXACT, tol=1e-12, max_steps=50)
THEIR_CG = torchopt.linear_solve.solve_cg(rtol=1e-14)
THEIR_INVERSE = torchopt.linear_solve.solve_inv()
THEIR_DEFAULT = None  # CG on the normal equations to a relative residual of 1e-5


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def random(n, seed=5):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(n))


def error_of(found, exact):
    """Largest relative error, tensor by tensor."""
    pairs = zip(found, exact, strict=True)
    errors = [torch.linalg.norm(a - b) / torch.linalg.norm(b) for a, b in pairs]
    return torch.stack(errors).max().item()  # NaN if any is


def fresh(tensors):
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def paired(a, b):
    """Inner product of two tensors, or of two tuples of tensors."""
    return flat(a) @ flat(b) if isinstance(a, tuple) else (a * b).sum()


def by_task(support, query):
    """The episodes of the tasks, one by one."""
    return [[tuple(t[i] for t in part) for part in (support, query)] for i in range(len(query[0]))]


def written_out(problem):
    """The problem's objective as `F(phi, anchor, lam)`."""
    return lambda phi, anchor, lam: problem.objective(phi, (anchor, lam), *problem.data)


def our_phi(objective, phi, theta, solver=EXACT):
    """The minimiser phi of `objective(phi, *theta)` as a function of theta."""
    return iopt.attach(phi, lambda p, t: objective(p, *t), theta, linear_solver=solver)


def our_gradient(objective, phi, theta, v, solver=EXACT):
    """`d <v, phi> / d theta`."""
    theta = fresh(theta)
    return torch.autograd.grad(paired(our_phi(objective, phi, theta, solver), v), theta)


@contextlib.contextmanager
def old_names():
    """TorchOpt 0.7.3 calls functorch by names that torch 2 has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "We've integrated functorch into PyTorch", FutureWarning)
        yield


def torchopt_phi(objective, phi, theta, solve=THEIR_CG):
    """`our_phi` by TorchOpt; phi may be a tuple of tensors."""

    def slope(phi, *theta):
        return torch.func.grad(objective)(phi, *theta)

    @custom_root(slope, argnums=tuple(range(1, len(theta) + 1)), solve=solve)
    def solver(init, *theta):
        return phi

    return solver(phi, *theta)


@old_names()
def torchopt_gradient(objective, phi, theta, v, solve=THEIR_CG):
    """`our_gradient` by TorchOpt."""
    theta = fresh(theta)
    return torch.autograd.grad(paired(torchopt_phi(objective, phi, theta, solve), v), theta)


# -- SciPy: linear systems -------------------------------------------------------------------------

SYSTEMS = [(1, 1.0), (4, 10.0), (12, 1e2), (40, 1e3), (80, 1e4), (25, 1e6)]


@pytest.mark.parametrize(("n", "kappa"), SYSTEMS)
def test_linear_solve_is_scipys_dense_solve_and_its_cg(n, kappa):
    matrix, b = spd(n, n, kappa)
    dense = scipy.linalg.solve(matrix.numpy(), b.numpy(), assume_a="pos")
    theirs, info = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=1e-10, maxiter=50 * n)
    ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(rtol=1e-10, max_steps=50 * n))
    assert info == 0 and ours.status == iopt.Status.SUCCESS
    for x in (theirs, ours.value.numpy()):  # a residual of 1e-10 allows an error of kappa * 1e-10
        assert np.linalg.norm(x - dense) <= 1.01e-10 * kappa * np.linalg.norm(dense)


def test_a_residual_out_of_reach_is_a_success_to_scipys_cg_and_not_to_ours():
    """1e-12 at a condition number of 1e6: SciPy believes the recurrence, we look at `b - A x`."""
    matrix, b = spd(25, 25, 1e6)
    A, rhs = matrix.numpy(), b.numpy()
    theirs, info = scipy.sparse.linalg.cg(A, rhs, rtol=1e-12, maxiter=1250)
    ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(rtol=1e-12, max_steps=1250))
    for x in (theirs, ours.value.numpy()):
        assert np.linalg.norm(rhs - A @ x) > 5e-12 * np.linalg.norm(rhs)
    assert info == 0
    assert ours.status == iopt.Status.MAX_STEPS


@pytest.mark.parametrize(("n", "kappa"), SYSTEMS)
def test_each_early_iterate_is_scipys(n, kappa):
    matrix, b = spd(n, n, kappa)
    before = np.zeros(n)
    for k in range(1, min(n, 8) + 1):
        theirs, _ = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=0, atol=0, maxiter=k)
        ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(max_steps=k)).value.numpy()
        assert np.linalg.norm(ours - theirs) <= 1e-11 * np.linalg.norm(theirs), k
        assert np.linalg.norm(ours - before) > 1e-3 * np.linalg.norm(ours), k  # it did move
        before = ours


def test_iterates_on_a_proximal_hessian_are_scipys_without_a_preconditioner():
    """A scalar lam preconditions our CG, and must change no iterate."""
    problem = ridge(1e3, n=20)
    x, b = problem.data[0].numpy(), random(20)
    matrix = x.T @ x / len(x) + problem.theta[1].item() * np.eye(20)
    operator = iopt.Hessian(problem.bind(), problem.minimiser)
    for k in range(1, 9):
        theirs, _ = scipy.sparse.linalg.cg(matrix, b.numpy(), rtol=0, atol=0, maxiter=k)
        ours = iopt.linear_solve(operator, b, iopt.CG(max_steps=k)).value.numpy()
        assert np.linalg.norm(ours - theirs) <= 1e-12 * np.linalg.norm(theirs), k
    dense = scipy.linalg.solve(matrix, b.numpy(), assume_a="pos")
    ours = iopt.linear_solve(operator, b, EXACT).value.numpy()
    assert np.linalg.norm(ours - dense) <= 1e-11 * np.linalg.norm(dense)


# -- SciPy: inner solvers --------------------------------------------------------------------------

SCIPY = {
    "BFGS": {"gtol": 1e-8},
    "L-BFGS-B": {"gtol": 1e-11, "ftol": 0.0},
    "Newton-CG": {"xtol": 1e-12},
    "trust-ncg": {"gtol": 1e-7},
}
BATCHED = {
    "ridge": lambda: ridge(1e2, (3,)),
    "logistic": lambda: logistic((3,)),
    "matrix_lam": lambda: matrix_lam((3,)),
}


def scipy_minimiser(task, method):
    def value(phi):
        return task.objective(phi, task.theta, *task.data)

    known = {"jac": lambda z: jacobian(value, torch.from_numpy(z)).numpy()}
    if method in ("Newton-CG", "trust-ncg"):
        known["hess"] = lambda z: hessian(value, torch.from_numpy(z)).numpy()
    found = scipy.optimize.minimize(
        lambda z: value(torch.from_numpy(z)).item(),
        task.init.numpy(),
        method=method,
        options=SCIPY[method],
        **known,
    )
    assert np.linalg.norm(known["jac"](found.x)) <= 1e-7, found.message
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("method", SCIPY)
@pytest.mark.parametrize("name", BATCHED)
def test_scipys_minimisers_get_our_meta_gradient(name, method):
    """SciPy task by task, ours all tasks at once; the exact one from NumPy."""
    problem = BATCHED[name]()
    v = random(tuple(problem.init.shape))
    each = torch.stack([scipy_minimiser(problem.task(i), method) for i in problem.indices()])
    ours = iopt.minimize(problem.objective, *problem.args, solver=NEWTON, batch_ndim=1).value
    gradients = []
    for phi, accuracy in ((each, 1e-5), (ours, 1e-11)):  # as good as the minimiser
        assert error_of([phi], [problem.minimiser]) <= accuracy
        theta = fresh(problem.theta)
        phi = iopt.attach(
            phi, problem.objective, theta, *problem.data, linear_solver=EXACT, batch_ndim=1
        )
        gradients.append(torch.autograd.grad((phi * v).sum(), theta))
        assert error_of(gradients[-1], problem.meta_gradient(v)) <= accuracy
    assert error_of(*gradients) <= 1e-5


# -- higher: long unrolls --------------------------------------------------------------------------


def regression(tasks=2):
    def batch():
        return torch.randn(tasks, 6, 4) / 2, torch.randn(tasks, 6, 1)

    return batch(), batch()


def unrolled_loss(model, lam, support, query, steps, lr=0.25):
    """Query loss of one task after gradient descent on the proximal objective, by higher."""
    (x, y), (xq, yq) = support, query
    sgd, anchor = torch.optim.SGD(model.parameters(), lr=lr), list(model.parameters())
    with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (net, inner):
        for _ in range(steps):
            far = sum((p - a).square().sum() for p, a in zip(net.parameters(), anchor, strict=True))
            inner.step(F.mse_loss(net(x), y) + lam / 2 * far)
        return F.mse_loss(net(xq), yq)


def dense_meta_gradient(model, log_lam, support, query):
    """The query loss of one task and its gradient in (weights, log lam), from whole matrices.

    The minimiser is found by Newton's method; nothing of ours is used.
    """
    (x, y), (xq, yq) = support, query
    lam = log_lam.exp().item()
    shapes = [p.shape for p in model.parameters()]
    anchor = flat(model.parameters()).detach()

    def fit(phi, x, y):
        parts = phi.split([s.numel() for s in shapes])
        names = [name for name, _ in model.named_parameters()]
        weights = {k: p.reshape(s) for k, p, s in zip(names, parts, shapes, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, weights, (x,)), y)

    def inner(phi):
        return fit(phi, x, y) + lam / 2 * (phi - anchor).square().sum()

    phi = anchor
    for _ in range(12):
        phi = phi - torch.linalg.solve(hessian(inner, phi), jacobian(inner, phi))
    assert torch.linalg.norm(jacobian(inner, phi)) < 1e-14
    A = hessian(inner, phi)
    assert torch.linalg.eigvalsh(A).min() > 0
    w = torch.linalg.solve(A, jacobian(lambda p: fit(p, xq, yq), phi))
    of_log_lam = -lam * w @ (phi - anchor)
    return fit(phi, xq, yq).detach(), torch.cat([lam * w, of_log_lam.reshape(1)])


MODELS = {  # and lam
    "ridge": (lambda: nn.Linear(4, 1, bias=False), 0.8),
    "tanh": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), 2.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_highers_unroll_converges_to_our_meta_gradient(name):
    build, lam = MODELS[name]
    support, query = regression()
    model, proximal = build(), iopt.Proximal(lam, learned=True)
    meta = iopt.MetaLearner(
        model, F.mse_loss, solver=NEWTON, lam=proximal, meta_gradient=iopt.Implicit(EXACT)
    )
    losses = meta(support, query)
    ours = flat(torch.autograd.grad(losses.mean(), [*model.parameters(), proximal.lam]))

    log_lam = torch.tensor(lam).log().requires_grad_()
    tasks = by_task(support, query)
    exact = [dense_meta_gradient(model, log_lam, *task) for task in tasks]
    assert error_of([losses], [torch.stack([loss for loss, _ in exact])]) <= 1e-12
    dense = torch.stack([gradient for _, gradient in exact]).mean(0)
    assert error_of([ours], [dense]) <= 1e-11

    errors = []
    for steps in (5, 20, 150):
        loss = torch.stack([unrolled_loss(model, log_lam.exp(), *t, steps) for t in tasks]).mean()
        theirs = flat(torch.autograd.grad(loss, [*model.parameters(), log_lam]))
        errors.append(error_of([theirs], [ours]))
    assert errors[0] > 1e-3 and errors[1] > 1e-7  # a short unroll is another gradient
    assert errors[2] <= 1e-10


# -- TorchOpt: where it is right -------------------------------------------------------------------

CLOSED = {
    "ridge kappa=1e2": lambda: ridge(1e2),
    "ridge kappa=1e4": lambda: ridge(1e4, n=40),
    "logistic": logistic,
    "vector_lam": vector_lam,
    "matrix_lam": matrix_lam,
}


@pytest.mark.parametrize("name", CLOSED)
def test_torchopts_custom_root_with_cg_agrees(name):
    problem = CLOSED[name]()
    v = random(problem.init.shape)
    args = (written_out(problem), problem.minimiser, problem.theta, v)
    exact = problem.meta_gradient(v)
    ours, theirs = our_gradient(*args), torchopt_gradient(*args)
    assert error_of(ours, exact) <= 1e-11
    assert error_of(theirs, exact) <= 1e-11
    assert error_of(ours, theirs) <= 1e-11


class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=THEIR_CG):
    """One task of proximally regularised regression, as TorchOpt would have it written."""

    def __init__(self, outer, log_lam):
        super().__init__()
        self.outer, self.log_lam = outer, log_lam  # meta-parameters, since they are arguments
        self.net = copy.deepcopy(outer)

    def objective(self, x, y):
        pairs = zip(self.net.parameters(), self.outer.parameters(), strict=True)
        far = sum((p - a).square().sum() for p, a in pairs)
        return F.mse_loss(self.net(x), y) + self.log_lam.exp() / 2 * far

    def solve(self, x, y):
        options = {"tolerance_grad": 1e-13, "tolerance_change": 0.0, "max_iter": 100}
        lbfgs = torch.optim.LBFGS(self.net.parameters(), line_search_fn="strong_wolfe", **options)

        def closure():
            lbfgs.zero_grad()
            loss = self.objective(x, y)
            loss.backward(inputs=list(self.net.parameters()))
            return loss

        with torch.enable_grad():
            lbfgs.step(closure)
        return self


@pytest.mark.parametrize("name", MODELS)
def test_torchopts_module_agrees_with_meta_learner(name):
    """Theirs task by task with L-BFGS, ours both at once with Newton-CG, and whole matrices."""
    build, lam = MODELS[name]
    support, query = regression()
    model, proximal = build(), iopt.Proximal(lam, learned=True)
    meta = iopt.MetaLearner(
        model, F.mse_loss, solver=NEWTON, lam=proximal, meta_gradient=iopt.Implicit(EXACT)
    )
    loss = meta(support, query).mean()
    ours = flat(torch.autograd.grad(loss, [*model.parameters(), proximal.lam]))

    log_lam = torch.tensor(lam).log().requires_grad_()
    tasks = by_task(support, query)
    dense = torch.stack([dense_meta_gradient(model, log_lam, *task)[1] for task in tasks]).mean(0)
    with old_names():
        losses = []
        for (x, y), (xq, yq) in tasks:
            inner = Inner(model, log_lam)
            inner.solve(x, y)
            losses.append(F.mse_loss(inner.net(xq), yq))
        theirs = torch.autograd.grad(torch.stack(losses).mean(), [*model.parameters(), log_lam])
    assert error_of([ours], [dense]) <= 1e-11
    assert error_of([flat(theirs)], [dense]) <= 1e-7  # what L-BFGS leaves
    assert error_of([flat(theirs)], [ours]) <= 1e-7


# -- TorchOpt: where it is wrong -------------------------------------------------------------------


def test_torchopts_default_solve_is_far_off_where_ours_is_not():
    """CG on the normal equations squares the condition number; its 1e-5 is of that residual."""
    problem = ridge(1e4, n=100)
    v = random(100)
    args = (written_out(problem), problem.minimiser, problem.theta, v)
    exact = problem.meta_gradient(v)
    assert error_of(our_gradient(*args, OUR_DEFAULT), exact) <= 1e-5
    assert error_of(torchopt_gradient(*args), exact) <= 1e-11
    assert error_of(torchopt_gradient(*args, THEIR_DEFAULT), exact) > 0.1


def test_torchopts_solve_inv_keeps_only_the_diagonal_blocks():
    """Two unknowns in two tensors, `phi.A phi / 2 - theta.phi`: the gradient is `A^-1 v`."""
    matrix, v = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 0.0])

    def joined(phi, theta):
        return phi @ matrix @ phi / 2 - theta @ phi

    def split(phi, theta):
        return joined(torch.cat(phi), theta)

    zero, theta = torch.zeros(2), (torch.zeros(2),)
    exact = torch.tensor([2.0, -1.0]) / 3
    apart = split, zero.split(1), theta, v.split(1)
    torch.testing.assert_close(our_gradient(joined, zero, theta, v)[0], exact)
    torch.testing.assert_close(torchopt_gradient(*apart)[0], exact)
    torch.testing.assert_close(torchopt_gradient(joined, zero, theta, v, THEIR_INVERSE)[0], exact)
    wrong = torch.tensor([0.5, 0.0])  # 1 / A[0, 0]
    torch.testing.assert_close(torchopt_gradient(*apart, THEIR_INVERSE)[0], wrong)


def test_torchopts_solve_inv_on_a_network():
    """The dense Hessian without what couples its four tensors, to the last digits."""
    lam = 0.5
    problem = tanh_mlp(lam=lam)
    sizes = [t.numel() for t in problem.init.values()]
    shapes = [t.shape for t in problem.init.values()]
    x, y = problem.data
    anchor, v = problem.flat(problem.theta[0]), random(sum(sizes))

    def split(flat):
        return tuple(p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True))

    def objective(phi, anchor):
        b1, b2, w1, w2 = phi
        fit = F.cross_entropy(torch.tanh(x @ w1 + b1) @ w2 + b2, y)
        return fit + lam / 2 * (flat(phi) - anchor).square().sum()

    phi = anchor
    for _ in range(12):
        value = lambda p: objective(split(p), anchor)  # noqa: E731
        phi = phi - torch.linalg.solve(hessian(value, phi), jacobian(value, phi))
    A = hessian(value, phi)
    blocks = torch.block_diag(*(torch.ones(n, n) for n in sizes))
    exact, wrong = (lam * torch.linalg.solve(m, v) for m in (A, A * blocks))

    theta = {k: p.detach().clone().requires_grad_() for k, p in problem.theta[0].items()}
    args = (problem.objective, (theta, problem.theta[1]), x, y)
    found = iopt.minimize(args[0], theta, *args[1:], solver=NEWTON)
    attached = iopt.attach(found.value, *args, linear_solver=EXACT)
    ours = torch.autograd.grad(problem.flat(attached) @ v, list(theta.values()))
    theirs = [
        torchopt_gradient(objective, split(phi), (anchor,), split(v), solve)[0]
        for solve in (THEIR_CG, THEIR_INVERSE)
    ]
    assert error_of([flat(ours)], [exact]) <= 1e-11
    assert error_of([theirs[0]], [exact]) <= 1e-11
    assert error_of([theirs[1]], [wrong]) <= 1e-11
    assert error_of([wrong], [exact]) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("solve", [THEIR_CG, THEIR_DEFAULT])
def test_torchopts_gradient_of_a_scalar_unknown_is_zero(solve):
    """`phi^2 / 2 + (phi - theta)^2 / 2` has phi = theta / 2; a 0-d phi gets no CG iteration."""

    def objective(phi, theta):
        return (phi.square() + (phi - theta).square()).sum() / 2

    for shape, theirs in (((1,), 0.5), ((), 0.0)):
        args = (objective, torch.full(shape, 1.5), (torch.full(shape, 3.0),), torch.ones(shape))
        for solver in (EXACT, OUR_DEFAULT):
            torch.testing.assert_close(our_gradient(*args, solver)[0], torch.full(shape, 0.5))
        torch.testing.assert_close(torchopt_gradient(*args, solve)[0], torch.full(shape, theirs))
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        torchopt_gradient(*args, THEIR_INVERSE)


def pulled_to_two(phi, lam):
    """`phi = 2 lam / (1 + lam)`; `phi^2 / 2` has the second derivative `4 (1 - 2 lam) / (1 + lam)^4`."""
    return phi.square().sum() / 2 + lam / 2 * (phi - 2).square().sum()


def second_derivative(phi_of, lam, minimiser):
    lam = torch.tensor(lam, requires_grad=True)
    loss = phi_of(pulled_to_two, torch.tensor([minimiser]), (lam,)).square().sum() / 2
    (g,) = torch.autograd.grad(loss, lam, create_graph=True)
    return g.item(), torch.autograd.grad(g, lam)[0].item()


@old_names()
def test_torchopts_second_derivative_is_wrong_without_a_word():
    """Theta is detached inside its backward: the first derivative is right, the second is not."""
    ours = second_derivative(our_phi, 3.0, 1.5)
    assert ours == pytest.approx((12 / 64, -5 / 64), rel=1e-12)
    theirs = second_derivative(torchopt_phi, 3.0, 1.5)
    assert theirs == pytest.approx((12 / 64, -2 / 64), rel=1e-12)


@old_names()
def test_torchopts_second_derivative_takes_the_cg_coefficients_for_constants():
    """One CG step solves for this v; as a function of v that step is another matrix than A^-1."""
    scale, target = torch.tensor([1.0, 3.0]), torch.tensor([-0.5, 0.5])

    def objective(phi, theta):  # phi = theta / (1 + scale)
        return (scale * phi.square()).sum() / 2 + (phi - theta).square().sum() / 2

    def loss_hessian(phi_of):
        theta = torch.tensor([1.0, 2.0], requires_grad=True)
        phi = phi_of(objective, theta.detach() / (1 + scale), (theta,))
        (g,) = torch.autograd.grad((phi - target).square().sum() / 2, theta, create_graph=True)
        return torch.stack([torch.autograd.grad(k, theta, retain_graph=True)[0] for k in g])

    diagonal = lambda *d: torch.diag(torch.tensor(d))  # noqa: E731
    torch.testing.assert_close(loss_hessian(our_phi), diagonal(1 / 4, 1 / 16))
    torch.testing.assert_close(loss_hessian(torchopt_phi), diagonal(1 / 4, 1 / 8))


def logistic_second_derivative(phi_of, lam):
    problem = logistic(lam=lam)
    anchor, lam = problem.theta[0], fresh([problem.theta[1]])[0]
    objective = lambda phi, lam: written_out(problem)(phi, anchor, lam)  # noqa: E731
    loss = phi_of(objective, problem.minimiser, (lam,)).square().sum() / 2
    (g,) = torch.autograd.grad(loss, lam, create_graph=True)
    return torch.autograd.grad(g, lam)[0].item()


@old_names()
def test_torchopts_second_derivative_on_logistic_regression():
    """Against differences of NumPy's exact first derivative."""

    def first(lam):
        problem = logistic(lam=lam)
        return problem.meta_gradient(problem.minimiser)[1].item()

    h = 1e-4
    numeric = (8 * (first(0.2 + h) - first(0.2 - h)) - first(0.2 + 2 * h) + first(0.2 - 2 * h)) / (
        12 * h
    )
    assert logistic_second_derivative(our_phi, 0.2) == pytest.approx(numeric, rel=1e-7)
    wrong = logistic_second_derivative(torchopt_phi, 0.2)
    assert abs(wrong - numeric) > 0.1 * abs(numeric)


@pytest.mark.parametrize("solve", [THEIR_CG, THEIR_DEFAULT])
def test_torchopts_gradient_of_a_nan_loss_is_zero(solve):
    """A NaN right-hand side ends its CG before the first step."""
    problem = ridge(1e2)
    args = (written_out(problem), problem.minimiser, problem.theta)
    v = torch.full((5,), math.nan)
    assert all(g.isnan().all() for g in problem.meta_gradient(v))
    assert all(g.isnan().all() for g in our_gradient(*args, v))
    for g in torchopt_gradient(*args, v, solve):
        assert torch.equal(g, torch.zeros_like(g))  # of either sign


def test_torchopts_cg_meets_negative_curvature_in_silence():
    """`A = diag(1, -1.001)`, `b = (1, 1)`: the exact solution is `(1, -1 / 1.001)`."""
    matrix, b = torch.diag(torch.tensor([1.0, -1.001])), torch.ones(2)
    first = torchopt.linear_solve.solve_cg(rtol=1e-14, maxiter=1)(lambda x: matrix @ x, b)
    torch.testing.assert_close(first, -2000 * b, rtol=1e-9, atol=0)  # b.b / b.Ab = 2 / -0.001
    ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(max_steps=1))
    assert ours.status == iopt.Status.NEGATIVE_CURVATURE
    assert torch.equal(ours.value, b)

    matrix[1, 1] = -1.0  # b.Ab = 0
    with pytest.raises(ZeroDivisionError):
        torchopt.linear_solve.solve_cg()(lambda x: matrix @ x, b)
    ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(rtol=1e-12))
    assert ours.status == iopt.Status.NEGATIVE_CURVATURE
    assert torch.equal(ours.value, b)


@old_names()
def test_torchopts_normal_equations_solve_an_indefinite_system_and_our_cg_does_not():
    """There is no minimum and so no meta-gradient; but as a linear system it has a solution."""
    matrix, b = spd(0, 6, eigenvalues=np.linspace(-1.5, 3, 6))
    dense = scipy.linalg.solve(matrix.numpy(), b.numpy(), assume_a="sym")
    theirs = torchopt.linear_solve.solve_normal_cg(rtol=1e-13)(lambda x: matrix @ x, b)
    assert np.linalg.norm(theirs.numpy() - dense) <= 1e-9 * np.linalg.norm(dense)
    ours = iopt.linear_solve(iopt.Dense(matrix), b, EXACT)
    assert ours.status == iopt.Status.NEGATIVE_CURVATURE
    assert np.linalg.norm(ours.value.numpy() - dense) > 0.1 * np.linalg.norm(dense)


def test_our_floor_under_the_curvature_would_lose_what_torchopt_keeps():
    """A smallest eigenvalue of 0.05 beside lam = 1.55: definite, but below `min_curvature = 0.1`.

    That floor is the default of a few steps; with a tolerance there is none.
    """
    problem = indefinite(lam=1.55)
    (matrix, _), (anchor, lam) = problem.data[0], problem.theta
    v = random(6)
    exact = lam * torch.linalg.solve(matrix + lam * torch.eye(6), v)
    theirs = torchopt_gradient(
        lambda phi, anchor: written_out(problem)(phi, anchor, lam), problem.minimiser, (anchor,), v
    )
    assert error_of(theirs, [exact]) <= 1e-10

    ours = {}
    for floor in (0.1, None):
        (theta,), heard = fresh([anchor]), []
        attached = iopt.attach(
            problem.minimiser,
            problem.objective,
            (theta, lam),
            *problem.data,
            linear_solver=iopt.CG(rtol=1e-13, max_steps=500, min_curvature=floor),
            on_solve=lambda name, solution: heard.append(solution.status.item()),  # noqa: B023
        )
        ours[floor] = torch.autograd.grad(attached @ v, theta), heard
    assert ours[None][1] == [iopt.Status.SUCCESS] and error_of(ours[None][0], [exact]) <= 1e-10
    assert ours[0.1][1] == [iopt.Status.NEGATIVE_CURVATURE]
    assert error_of(ours[0.1][0], [exact]) > 0.1


TRANSFORMS = {
    "grad": lambda f, theta: torch.func.grad(lambda t: f(t).sum())(theta),
    "jacrev": lambda f, theta: torch.func.jacrev(f)(theta).diagonal(),
    "vmap": lambda f, theta: torch.func.vmap(f)(theta.expand(3, 2))[1] / theta,
    "vmap of grad": lambda f, theta: torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(
        theta.expand(3, 2)
    )[1],
    "jvp": lambda f, theta: torch.func.jvp(f, (theta,), (torch.ones(2),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torchopt_under_the_transforms_of_torch_func(transform):
    """It refuses them all; ours agree with the inverse."""
    scale, theta = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])

    def objective(phi, theta):  # phi = theta / (1 + scale)
        return (scale * phi.square()).sum() / 2 + (phi - theta).square().sum() / 2

    apply = TRANSFORMS[transform]
    with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
        apply(lambda t: torchopt_phi(objective, t.detach() / (1 + scale), (t,)), theta)

    def ours(theta):
        return our_phi(objective, theta.detach() / (1 + scale), (theta,))

    torch.testing.assert_close(apply(ours, theta), 1 / (1 + scale), rtol=1e-12, atol=0)


@old_names()
def test_torchopts_argnums_must_start_at_one():
    """`argnums=2` alone, which its documentation allows, raises in backward."""

    def slope(phi, scale, theta):
        return scale * phi - theta

    @custom_root(slope, argnums=2, solve=THEIR_CG)
    def solver(init, scale, theta):
        return theta.detach() / scale

    scale, theta = torch.tensor([2.0, 4.0]), torch.ones(2, requires_grad=True)
    with pytest.raises(IndexError, match="tuple index out of range"):
        solver(torch.zeros(2), scale, theta).sum().backward()

    def objective(phi, t, scale):
        return (scale * phi.square()).sum() / 2 - (t * phi).sum()

    iopt.attach(theta.detach() / scale, objective, theta, scale).sum().backward()
    torch.testing.assert_close(theta.grad, 1 / scale)
