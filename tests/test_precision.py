"""Autocast: 16 bits in the model, full precision in the solvers, one function forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from per_task import learned

LOW = [torch.bfloat16, torch.float16]
FEW = {"solver": iopt.gd(lr=0.1, max_steps=5), "lam": 3.0}


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype, enabled=enabled)


class Shared(set):
    """One set for the copies of a network in several threads."""

    def __deepcopy__(self, memo):
        return self


class Net(nn.Module):
    """A network that notes the dtypes of what it computes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.dtypes = Shared()

    def forward(self, x):
        h = self.first(x)
        self.dtypes.add(h.dtype)
        return self.last(h.tanh()).float()


def episodes():
    return [(torch.randn(3, 8, 4), torch.randn(3, 8, 1)) for _ in range(2)]


def learner(model, **settings):
    return iopt.MetaLearner(model, F.mse_loss, **(FEW | settings))


@pytest.mark.parametrize("rule", [iopt.Implicit(), iopt.Unrolled(), iopt.FirstOrder()])
@pytest.mark.parametrize("batching", [iopt.Batching(), iopt.Batching(chunk_size=1, threads=2)])
@pytest.mark.parametrize("dtype", LOW)
def test_gradients_and_vectors_are_in_full_precision(dtype, batching, rule):
    model, (support, query) = Net(), episodes()
    heard = {}
    settings = {"meta_gradient": rule, "batching": batching}
    meta = learner(model, **settings, on_solve=lambda name, s: heard.update({name: s}))
    exact = learned(learner(model, **settings), support, query)
    assert model.dtypes == {torch.float32}
    model.dtypes.clear()
    with autocast(dtype):
        losses = meta(support, query)
    losses.mean().backward()
    assert model.dtypes == {dtype}  # in every evaluation, those of backward too
    assert losses.dtype == torch.float32
    assert set(heard) == {"minimize"} | ({"linear_solve"} if rule == iopt.Implicit() else set())
    for solution in heard.values():
        numbers = [solution.value, *(t for t in solution.stats.values() if t.is_floating_point())]
        assert {t.dtype for t in numbers} == {torch.float32}
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(losses.detach(), exact[0], rtol=2e-2, atol=0)
    assert (gradient - exact[1]).norm() < 2e-2 * exact[1].norm()
    assert not torch.equal(gradient, exact[1])


@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
@pytest.mark.parametrize("region", [None, *LOW])
def test_backward_knows_the_precision_of_forward(region, curvature):
    """Forward in one region, backward in any other: the same bits."""
    model, (support, query) = Net(), episodes()
    meta = learner(model, meta_gradient=iopt.Implicit(curvature=curvature))
    parameters = list(model.parameters())
    with autocast(region or torch.bfloat16, region is not None):
        phi = torch.cat([p.flatten(1) for p in meta.adapt(support).values()], 1)
        losses = meta(support, query)
    v = torch.randn_like(phi)
    outside = torch.autograd.grad(phi, parameters, v, retain_graph=True)
    for dtype in LOW:
        with autocast(dtype):
            inside = torch.autograd.grad(phi, parameters, v, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    if region is not None:
        outside = torch.autograd.grad(losses.mean(), parameters, retain_graph=True)
        with autocast(region):
            inside = torch.autograd.grad(losses.mean(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_attach_and_minimize_remember_it_too():
    x, y, lam = torch.randn(8, 4), torch.randn(8), torch.tensor(0.5)
    theta = torch.randn(4, requires_grad=True)
    dtypes = set()

    def objective(phi, theta, x, y):
        z = x @ phi
        dtypes.add(z.dtype)
        return F.mse_loss(z.float(), y) + iopt.proximal(phi, theta)

    with autocast():
        solver = iopt.newton_cg(linear_solver=iopt.CG(max_steps=4), max_steps=2)
        solution = iopt.minimize(objective, torch.zeros(4), (theta, lam), x, y, solver=solver)
        phi = iopt.attach(solution.value, objective, (theta, lam), x, y)
    phi.sum().backward()
    assert dtypes == {torch.bfloat16}
    assert solution.value.dtype == theta.grad.dtype == torch.float32
    A = 2 / 8 * x.T @ x + lam * torch.eye(4)
    exact = lam * torch.linalg.solve(A, torch.ones(4))
    assert (theta.grad - exact).norm() < 2e-2 * exact.norm()


def test_a_problem_bound_outside_of_a_region_stays_outside():
    x, phi, v = torch.randn(8, 4), torch.randn(4), torch.randn(4)
    problem = iopt.InnerProblem.bind(
        lambda phi, theta, x: (x @ phi).tanh().square().mean(), phi, (), x
    )
    account = lambda: (problem.grad(phi), problem.values(phi), iopt.Hessian(problem, phi).mv(v))  # noqa: E731
    outside = account()
    with autocast():
        inside = account()
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


class LearnedMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(1, 1))

    def forward(self, output, target):
        return F.mse_loss((output @ self.W).float(), target)


@pytest.mark.parametrize("batching", [iopt.Batching(), iopt.Batching(chunk_size=1)])
def test_casts_of_one_evaluation_are_not_seen_by_another(batching):
    """A learned matrix in the loss: torch would keep the cast that it made while nothing recorded."""
    model, (support, query) = Net(), episodes()
    loss = LearnedMatrix()
    W = loss.W
    meta = iopt.MetaLearner(model, loss, **FEW, batching=batching, meta_gradient=iopt.FirstOrder())
    with autocast():
        with torch.no_grad():
            phi = meta.adapt(support)
        (ours,) = torch.autograd.grad(meta(support, query).mean(), W)
    with autocast():
        each = []
        for i in range(3):
            output = torch.func.functional_call(
                model, {k: p[i] for k, p in phi.items()}, query[0][i]
            )
            each.append(loss(output, query[1][i]))
        (theirs,) = torch.autograd.grad(torch.stack(each).mean(), W)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


OPERATORS = {
    "dense": lambda matrix: iopt.Dense(matrix),
    "damped": lambda matrix: iopt.Damped(iopt.Dense(matrix), matrix[0, 0].detach()),
}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_linear_solve_does_not_notice_autocast(name, dtype):
    """Value, gradients, second gradients and tangents, bit for bit."""
    half = torch.randn(6, 6)
    matrix, b = (half @ half.T + torch.eye(6)).requires_grad_(), torch.randn(6, requires_grad=True)
    direction = torch.randn(6, 6)

    def solved(matrix, b):
        return iopt.linear_solve(OPERATORS[name](matrix), b).value

    def account(enabled):
        with autocast(dtype, enabled):
            x = solved(matrix, b)
            first = torch.autograd.grad(x.square().sum(), (matrix, b), create_graph=True)
            _, tangent = torch.func.jvp(lambda m: solved(m, b.detach()), (matrix,), (direction,))
        # Outside of the region: what torch itself does inside it is not ours.
        second = torch.autograd.grad(first[0].square().sum() + first[1].sum(), (matrix, b))
        return [t.detach() for t in (x, *first, *second, tangent)]

    for ours, theirs in zip(account(True), account(False), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_the_dtypes_of_data_and_parameters_must_agree():
    (support, query), model = episodes(), nn.Linear(4, 1)
    wide = tuple(t.double() for t in support)
    message = r"met two dtypes: bring the data to the dtype of the parameters, or .*autocast"
    with pytest.raises(RuntimeError, match=message):
        learner(model)(wide, query)
    with pytest.raises(RuntimeError, match=message):
        learner(model)(support, tuple(t.double() for t in query))
    phi = learner(model).adapt(support)
    with pytest.raises(RuntimeError, match=message):
        learner(model).predict(phi, wide[0])
    with pytest.raises(
        ValueError, match=r"1\.weight'\] is torch.float64 .* but .*float32 .*one dtype"
    ):
        mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1).double())
        learner(mixed)(support, query)
