"""Dropout: one mask for all evaluations of a meta-step, from one draw of torch's generator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from per_task import CLOSE, EXACT, NEWTON, Recorder, learned, slope_along

VMAP, LOOP = iopt.Batching(), iopt.Batching(chunk_size=1)
THREADS = iopt.Batching(chunk_size=1, threads=2)
FEW = iopt.gd(lr=0.1, max_steps=3)
DRAWS = r"draws random numbers .*minimize and attach the same seed=.*MetaLearner stochastic=True"

pytestmark = pytest.mark.usefixtures("double")


def episodes(tasks=2, support=5, query=4):
    return [(torch.randn(tasks, n, 3), torch.randn(tasks, n, 1)) for n in (support, query)]


def net():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 1))


def learner(model, **settings):
    settings = {"solver": NEWTON, "meta_gradient": EXACT, "lam": 4.0, "stochastic": True} | settings
    return iopt.MetaLearner(model, F.mse_loss, **settings)


@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
@pytest.mark.parametrize("batching", [VMAP, LOOP, THREADS])
def test_every_evaluation_of_a_meta_step_has_the_same_mask(batching, curvature):
    model = Recorder()
    rule = iopt.Implicit(iopt.CG(max_steps=3), curvature)
    meta = learner(model, solver=FEW, meta_gradient=rule, batching=batching)
    support, query = episodes(tasks=3)
    support[0].requires_grad_()  # one more evaluation, for the mixed derivative
    each = []
    for _ in range(2):
        meta(support, query).mean().backward()
        masks = model.take(support[0].detach())
        assert all(len(m) == 5 and torch.equal(m, m[:1].expand_as(m)) for m in masks)
        each.append(([m[0] for m in masks], [m[0] for m in model.take(query[0])]))
        assert not model.seen
    (one, asked), (two, asked_again) = each
    assert len({bytes(m.numpy()) for m in (*one, *two)}) == 6  # each task and step has its own
    assert len({bytes(m.numpy()) for m in (*asked, *asked_again)}) == 6
    assert not any(torch.equal(m[:4], a) for m in one for a in asked)  # the query others


@pytest.mark.parametrize("batching", [VMAP, LOOP, THREADS])
def test_gradient_is_a_finite_difference_with_the_seed_held(batching):
    meta, (support, query) = learner(net(), batching=batching), episodes()
    torch.manual_seed(7)
    _, gradient = learned(meta, support, query)
    direction = torch.randn_like(gradient)
    slope = slope_along(meta, support, query, direction, seed=7)
    torch.testing.assert_close(gradient @ direction, slope, rtol=1e-6, atol=1e-9)


def test_the_loss_is_that_of_the_masked_model():
    """The recorded masks, put into a plain loop over the tasks with gradient descent."""
    model = Recorder()
    meta = learner(model, solver=FEW)
    support, query = episodes()
    losses = meta(support, query)
    of_support, of_query = ([m[0] for m in model.take(x)] for x in (support[0], query[0]))
    for i in range(2):
        phi = [p.detach().clone() for p in model.parameters()]
        anchor = [p.clone() for p in phi]

        def loss(phi, batch, mask):
            w, b, v, c = phi
            return F.mse_loss(((batch[0] @ w.T + b).tanh() * mask) @ v.T + c, batch[1])

        for _ in range(3):
            phi = [p.requires_grad_() for p in phi]
            near = sum(((p - a) ** 2).sum() for p, a in zip(phi, anchor, strict=True))
            value = loss(phi, [t[i] for t in support], of_support[i]) + 2.0 * near
            slopes = torch.autograd.grad(value, phi)
            phi = [(p - 0.1 * g).detach() for p, g in zip(phi, slopes, strict=True)]
        expected = loss(phi, [t[i] for t in query], of_query[i])
        torch.testing.assert_close(losses[i], expected, rtol=1e-12, atol=1e-14)


def test_manual_seed_makes_it_reproducible():
    meta, (support, query) = learner(net(), solver=FEW, on_solve=iopt.Ignore()), episodes()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(learned(meta, support, query))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("running_stats", [None, iopt.RunningStats.PER_TASK])
@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_torchs_generator_has_drawn_once(batching, running_stats):
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 4), nn.Tanh())
    norm = nn.BatchNorm1d(4, track_running_stats=running_stats is not None)
    model.extend([norm, nn.Linear(4, 1)])
    meta = learner(
        model, batching=batching, running_stats=running_stats, solver=FEW, on_solve=iopt.Ignore()
    )
    support, query = episodes()
    torch.manual_seed(3)
    torch.randint(2**62, ())
    once = torch.get_rng_state()

    torch.manual_seed(3)
    losses = meta(support, query)
    assert torch.equal(torch.get_rng_state(), once)
    losses.mean().backward()
    assert torch.equal(torch.get_rng_state(), once)
    torch.manual_seed(3)
    phi = meta.adapt(support)
    assert torch.equal(torch.get_rng_state(), once)
    torch.manual_seed(3)
    meta.predict(phi, query[0])
    assert torch.equal(torch.get_rng_state(), once)


def test_the_generator_is_given_back_when_the_model_fails():
    class Failing(nn.Linear):
        def forward(self, x):
            F.dropout(x)
            raise ArithmeticError("on purpose")

    meta, (support, query) = learner(Failing(3, 1)), episodes()
    torch.manual_seed(3)
    torch.randint(2**62, ())
    once = torch.get_rng_state()
    torch.manual_seed(3)
    with pytest.raises(ArithmeticError):
        meta(support, query)
    assert torch.equal(torch.get_rng_state(), once)


@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_without_stochastic_it_is_an_error_that_says_so(batching):
    support, query = episodes()
    with pytest.raises(RuntimeError, match=DRAWS):
        learner(net(), stochastic=False, batching=batching)(support, query)
    quiet = learner(net().eval(), stochastic=False, batching=batching)
    assert quiet(support, query).isfinite().all()


def test_a_solver_may_draw_where_the_objective_may_not():
    """Whether somebody drew is looked at once a solve; who it was, in each evaluation of another."""

    class Langevin(iopt.Solver):
        def step(self, problem, phi, at, state):
            return phi - 0.1 * at.grad + 1e-3 * torch.randn_like(phi), state, None

    noisy = Langevin(max_steps=300, tol=0.0)
    parabola = lambda phi, theta: ((phi - theta) ** 2).sum()  # noqa: E731
    phi = iopt.minimize(parabola, torch.zeros(3), torch.ones(3), solver=noisy).value
    torch.testing.assert_close(phi, torch.ones(3), rtol=0.0, atol=0.05)

    def always(phi, theta):  # of a value that never changes: the numbers drawn are lost
        return parabola(phi, theta) + 0 * torch.rand(()).item()

    with pytest.raises(RuntimeError, match=DRAWS):
        iopt.minimize(always, torch.zeros(3), torch.ones(3), solver=noisy)

    def near(phi, theta):  # only there, so that one more evaluation at the start would not tell
        return parabola(phi, theta) + 0 * (torch.rand(()) if phi.detach().sum() > 1 else 0.0)

    for solver in (noisy, iopt.gd(lr=0.1, max_steps=20)):
        with pytest.raises(RuntimeError, match=DRAWS):
            iopt.minimize(near, torch.zeros(3), torch.ones(3), solver=solver)


def ridge(phi, theta, x, y):
    return F.mse_loss(F.dropout(x, 0.4) @ phi, y) + iopt.proximal(phi, theta)


def masked_ridge(theta, lam, x, y, seed):
    """The closed form, with the mask that torch draws from this seed."""
    torch.manual_seed(seed)
    z = F.dropout(x, 0.4)
    A = 2 / len(z) * z.T @ z + lam * torch.eye(z.shape[1])
    return torch.linalg.solve(A, 2 / len(z) * z.T @ y + lam * theta)


def test_attach_and_minimize_without_a_batch_take_a_seed():
    theta, lam, y = torch.randn(3, requires_grad=True), torch.tensor(0.7), torch.randn(8)
    x = torch.randn(8, 3, requires_grad=True)
    exact = {"linear_solver": EXACT.linear_solver}
    with pytest.raises(RuntimeError, match=DRAWS):
        iopt.minimize(ridge, torch.zeros(3), (theta, lam), x, y, solver=NEWTON)
    phi = iopt.minimize(ridge, torch.zeros(3), (theta, lam), x, y, solver=NEWTON, seed=5).value
    with pytest.raises(RuntimeError, match=DRAWS):
        iopt.attach(phi, ridge, (theta, lam), x, y, **exact).sum().backward()

    state = torch.get_rng_state()
    phi = iopt.attach(phi, ridge, (theta, lam), x, y, seed=5, **exact)
    v = torch.tensor([1.0, -2.0, 0.5])
    ours = torch.autograd.grad(phi @ v, (theta, x))
    assert torch.equal(torch.get_rng_state(), state)
    closed = masked_ridge(theta, lam, x, y, 5)
    torch.testing.assert_close(phi, closed, **CLOSE)
    for a, b in zip(ours, torch.autograd.grad(closed @ v, (theta, x)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("batching", [VMAP, LOOP, THREADS, iopt.Batching(chunk_size=2)])
def test_a_batch_takes_a_seed(batching):
    """With the seed held the solution is a function of theta: against finite differences."""
    x, y, lam = torch.randn(3, 8, 3), torch.randn(3, 8), torch.tensor(0.7)
    theta, direction = torch.randn(3, requires_grad=True), torch.randn(3)
    common = {"batch_ndim": 1, "batching": batching, "seed": 5}

    def solved(theta):
        start = torch.zeros(3, 3)
        return iopt.minimize(ridge, start, (theta, lam), x, y, solver=NEWTON, **common).value

    phi = iopt.attach(
        solved(theta), ridge, (theta, lam), x, y, linear_solver=EXACT.linear_solver, **common
    )
    slope = torch.autograd.grad(phi.sum(), theta)[0] @ direction
    with torch.no_grad():
        ends = [solved(theta + eps * direction).sum() for eps in (1e-5, -1e-5)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-7, atol=1e-9)
