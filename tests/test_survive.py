"""Bad numbers, degenerate problems and wrong arguments: flagged, contained, and explained."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from implicit_optim import Status
from per_task import EXACT, NEWTON

VMAP, LOOP = iopt.Batching(), iopt.Batching(chunk_size=1)
FEW = iopt.gd(lr=0.1, max_steps=4)
BAD = [math.nan, -math.inf]

pytestmark = pytest.mark.usefixtures("double")


def episodes():
    return [tuple(torch.randn(3, 5, n) for n in (4, 1)) for _ in range(2)]


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def learner(model=None, loss=F.mse_loss, **settings):
    settings = {"solver": FEW, "on_solve": iopt.Ignore(), "lam": 3.0} | settings
    return iopt.MetaLearner(network() if model is None else model, loss, **settings)


# -- NaN and inf -----------------------------------------------------------------------------------


RULES = [iopt.Implicit(), EXACT, iopt.FirstOrder(), iopt.Unrolled()]


@pytest.mark.parametrize("batching", [VMAP, LOOP, iopt.Batching(chunk_size=2)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", BAD)
def test_bad_data_of_one_task_stays_there(bad, rule, batching):
    """In the examples or the targets, of the support or the query: the others to the last bit."""
    meta = learner(meta_gradient=rule, batching=batching)
    data, good = episodes(), torch.tensor([0, 2])
    clean = meta(*data)
    for part in range(2):
        for which in range(2):
            spoilt = [tuple(t.clone() for t in e) for e in data]
            spoilt[part][which][1, 0, 0] = bad
            losses = meta(*spoilt)
            if losses[1].isfinite():  # tanh takes an infinite example in its stride
                assert (part, which) == (1, 0) and math.isinf(bad)
                continue
            assert torch.equal(losses[good], clean[good])
            gradients = torch.autograd.grad(losses.sum(), list(meta.model.parameters()))
            assert not all(g.isfinite().all() for g in gradients)  # loud


@pytest.mark.parametrize("batching", [VMAP, iopt.Batching(chunk_size=2)])
@pytest.mark.parametrize("solver", [FEW, iopt.newton_cg(max_steps=3)])
@pytest.mark.parametrize("rule", RULES[:3])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_task_can_be_dropped_after_adapting(bad, rule, solver, batching):
    meta = learner(meta_gradient=rule, solver=solver, batching=batching)
    support, (x, y) = episodes()
    parameters = list(meta.model.parameters())

    def gradients(support, good):
        phi = {k: p[good] for k, p in meta.adapt(support).items()}
        loss = F.mse_loss(meta.predict(phi, x[good]), y[good])
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    clean = gradients(support, [0, 2])
    for which in range(2):
        spoilt = tuple(t.clone() for t in support)
        spoilt[which][1, 0, 0] = bad
        good = meta.adapt(spoilt)["0.weight"].isfinite().flatten(1).all(1)
        assert good.tolist() == [True, False, True]
        for ours, theirs in zip(gradients(spoilt, good), clean, strict=True):
            assert torch.equal(ours, theirs)


def test_bad_parameters_spoil_every_task_and_leave_no_trace():
    model, data = network(), episodes()
    meta = learner(model, on_solve=iopt.Raise())
    clean = meta(*data)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(iopt.SolveError, match="0 of 3 success, 3 nonfinite: NaN or inf appeared"):
        meta(*data)
    assert learner(model)(*data).isnan().all()
    with torch.no_grad():
        model[0].weight[0, 0] = 0.1
    after = meta(*data)
    with torch.no_grad():
        model[0].weight[0, 0] = 0.1
    assert after.isfinite().all() and not torch.equal(after, clean)
    assert torch.equal(meta(*data), after)


@pytest.mark.parametrize("batching", [VMAP, LOOP])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_right_hand_side_is_flagged_and_stays_in_its_task(bad, batching):
    x, y = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5)
    theta, lam, heard = torch.randn(4), torch.tensor(0.5), []
    ridge = iopt.Objective(lambda phi, x: x @ phi, F.mse_loss, iopt.proximal)
    common = {"batch_ndim": 1, "batching": batching}
    start = torch.zeros(3, 4)
    phi = iopt.minimize(ridge, start, (theta, lam), x, y, solver=NEWTON, **common).value
    on_solve = lambda _, solution: heard.append(solution)  # noqa: E731
    phi = iopt.attach(phi, ridge, (theta, lam), x, y, on_solve=on_solve, **common)
    v = torch.randn(3, 4)
    (clean,) = torch.autograd.grad(phi, x, v, retain_graph=True)
    v[1, 2] = bad
    (g,) = torch.autograd.grad(phi, x, v)
    assert torch.equal(g[[0, 2]], clean[[0, 2]]) and g[1].isnan().all()
    assert heard[1].status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]
    assert heard[1].value[1].isnan().all()


def test_a_zero_right_hand_side_gives_exactly_zero():
    meta, (support, query) = learner(meta_gradient=EXACT), episodes()
    support[0].requires_grad_()
    (0.0 * meta(support, query)).sum().backward()
    assert not any(p.grad.any() for p in meta.model.parameters()) and not support[0].grad.any()
    assert all(p.grad is not None for p in meta.model.parameters())


# -- degenerate problems ---------------------------------------------------------------------------


def quadratic(phi, theta, A):
    return phi @ A @ phi / 2 - theta @ phi


def rotated(eigenvalues):
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)))
    A = q @ torch.diag(torch.tensor(eigenvalues)) @ q.T
    return (A + A.T) / 2, q


def test_a_bad_condition_in_single_precision_is_not_success():
    A = torch.logspace(0, 8, 60).float().diag()
    theta, heard = torch.ones(60, dtype=torch.float32, requires_grad=True), []
    start = torch.zeros_like(theta)
    phi = iopt.attach(
        start, quadratic, theta, A, on_solve=lambda *a: heard.append(a[1]),
        linear_solver=iopt.CG(rtol=1e-6, max_steps=300),
    )  # fmt: skip
    phi.sum().backward()
    assert heard[0].status == Status.MAX_STEPS and "float64" in heard[0].summary()
    residual = torch.ones(60) - A.double() @ heard[0].value.double()
    assert residual.norm() > 1e-6 * 60**0.5
    torch.testing.assert_close(residual.norm().float(), heard[0].stats["residual_norm"])
    for solver in (iopt.gd(lr=1e-8, tol=1e-6), iopt.agd(lr=1e-8, tol=1e-6)):
        solution = iopt.minimize(quadratic, start, theta.detach(), A, solver=solver)
        assert solution.status == Status.MAX_STEPS


def test_singular_and_indefinite_curvature_side_by_side():
    """A null space that v has no part in is no obstacle; one that it has is not success."""
    (definite, _), (singular, q), (lost, u), (indefinite, w) = (
        rotated(e) for e in ([1.0, 2.0, 3.0], [0.0, 2.0, 3.0], [0.0, 2.0, 3.0], [-1.0, 2.0, 3.0])
    )
    A = torch.stack([definite, singular, lost, indefinite, torch.zeros(3, 3)])
    v = torch.stack([torch.randn(3), q[:, 1] - q[:, 2], u.sum(1), w.sum(1), torch.ones(3)])
    theta, heard = torch.randn(3, requires_grad=True), []
    phi = iopt.attach(
        torch.zeros(5, 3), quadratic, theta, A, batch_ndim=1,
        linear_solver=iopt.CG(rtol=1e-10), on_solve=lambda *a: heard.append(a[1]),
    )  # fmt: skip
    (g,) = torch.autograd.grad(phi, theta, v)
    solution = heard[0]
    assert solution.status[:2].tolist() == [0, 0]
    assert all(solution.status[2:] == Status.NEGATIVE_CURVATURE)
    exact = torch.linalg.pinv(A[:2]) @ v[:2].unsqueeze(-1)
    torch.testing.assert_close(solution.value[:2], exact.squeeze(-1), rtol=1e-9, atol=1e-11)
    assert torch.equal(solution.value[4], v[4])  # a flat objective: the right-hand side itself
    assert g.isfinite().all()
    torch.testing.assert_close(g, solution.value.sum(0))


def test_parameters_of_every_size():
    """0-d, empty and one-element leaves, all of them or alone."""

    def objective(phi, theta, a):
        each = [((a * p - t) ** 2).sum() for p, t in zip(phi.values(), theta.values(), strict=True)]
        return sum(each) / 2 + sum((p**2).sum() for p in phi.values()) / 2

    shapes = {"scalar": (), "empty": (0,), "one": (1, 1), "none": (3, 0)}
    for names in (list(shapes), ["scalar"], ["empty"], ["one"]):
        theta = {k: torch.randn(shapes[k], requires_grad=True) for k in names}
        a = torch.tensor([1.0, 2.0])
        start = {k: torch.zeros(2, *shapes[k]) for k in names}
        solution = iopt.minimize(objective, start, theta, a, solver=NEWTON, batch_ndim=1)
        phi = iopt.attach(solution.value, objective, theta, a, batch_ndim=1)
        assert solution.status.tolist() == [0, 0]
        gradients = torch.autograd.grad(sum(p.sum() for p in phi.values()), list(theta.values()))
        for (k, t), g in zip(theta.items(), gradients, strict=True):
            wide = (2,) + (1,) * t.ndim
            factor = (a / (a**2 + 1)).reshape(wide)
            torch.testing.assert_close(phi[k], factor * t)
            torch.testing.assert_close(g, factor.sum() * torch.ones_like(t))


@pytest.mark.parametrize("solver", [FEW, iopt.newton_cg(max_steps=2)])
def test_a_module_with_an_empty_parameter(solver):
    class Empty(nn.Linear):
        def __init__(self, alone):
            super().__init__(4, 1)
            self.requires_grad_(not alone)
            self.nothing = nn.Parameter(torch.zeros(0))

        def forward(self, x):
            return super().forward(x) + self.nothing.sum()

    support, query = episodes()
    for alone in (True, False):
        model = Empty(alone)
        losses = learner(model, solver=solver)(support, query)
        losses.sum().backward()
        assert model.nothing.grad.shape == (0,)
        if alone:
            torch.testing.assert_close(losses, ((model(query[0]) - query[1]) ** 2).mean((1, 2)))
        else:
            plain = nn.Linear(4, 1)
            plain.load_state_dict({"weight": model.weight, "bias": model.bias})
            assert torch.equal(learner(plain, solver=solver)(support, query), losses)


# -- what depends on nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("batching", [VMAP, LOOP])
@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
def test_a_support_loss_that_ignores_the_parameters_is_an_error(curvature, batching):
    """phi would be theta and its gradient the first-order one, with a success in every task."""
    model, (support, query) = network(), episodes()
    meta = learner(
        model,
        lambda output, target: target.mean(),
        batching=batching,
        meta_gradient=iopt.Implicit(curvature=curvature),
    )
    with pytest.raises(ValueError, match="does not reach .* exactly zero in every task"):
        meta(support, query)


@pytest.mark.parametrize("batch", [0, 1])
def test_an_objective_that_ignores_theta_or_phi_has_the_gradient_zero(batch):
    theta, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    start, a = torch.zeros(2, 3)[0 if batch == 0 else ...], torch.ones(2)[0 if batch == 0 else ...]

    def without_unused(phi, theta, a):
        return a * ((phi - theta[0]) ** 2).sum()

    def without_phi(phi, theta, a):
        return a * (theta[0] ** 2).sum()

    for objective, factor in ((without_unused, 1.0), (without_phi, 0.0)):
        common = {"batch_ndim": batch}
        phi = iopt.minimize(objective, start, (theta, unused), a, solver=NEWTON, **common).value
        phi = iopt.attach(phi, objective, (theta, unused), a, **common)
        g, zero = torch.autograd.grad(phi.sum(), (theta, unused))
        torch.testing.assert_close(g, factor * phi.numel() / 3 * torch.ones(3))
        assert torch.equal(zero, torch.zeros(2))


def test_a_theta_that_needs_no_gradient_keeps_no_graph():
    theta, count = torch.randn(3), torch.tensor([1, 2, 3])

    def objective(phi, theta, count, note):
        assert note == "as it is"
        return (count * (phi - theta) ** 2).sum()

    phi = iopt.attach(theta, objective, theta, count, "as it is")
    assert not phi.requires_grad and torch.equal(phi, theta)
    theta = theta.requires_grad_()
    phi = iopt.attach(theta.detach(), objective, theta, count, "as it is")
    torch.testing.assert_close(torch.autograd.grad(phi.sum(), theta)[0], torch.ones(3))
