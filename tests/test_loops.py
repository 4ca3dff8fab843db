"""Loops as people have them: another optimizer in one line, `attach` behind one's own loop, `higher`."""

import copy

import higher
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import implicit_optim as iopt
from per_task import EXACT, assert_same, learned, tasks_of

LAM, LR = 5.0, 0.08

pytestmark = pytest.mark.usefixtures("double")


def end_to_end(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


# -- only the optimizer changes --------------------------------------------------------------------

DROP_INS = {
    "GD": (lambda p: torch.optim.SGD(p, lr=0.1), lambda p: iopt.GD(p, lr=0.1)),
    "NesterovAGD": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: iopt.NesterovAGD(p, lr=0.1, momentum=0.9),
    ),
}


@pytest.mark.parametrize("name", DROP_INS)
def test_a_loop_over_minibatches(name):
    """Three epochs with shuffling, dropout, batch norm and clipping: the same weights as with SGD."""
    data = TensorDataset(torch.randn(26, 4), torch.randint(0, 3, (26,)))

    def train(make):
        torch.manual_seed(1)
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
        net = nn.Sequential(*layers)
        opt, points = make(net.parameters()), []
        for _ in range(3):
            for x, y in DataLoader(data, batch_size=8, shuffle=True):
                opt.zero_grad()
                F.cross_entropy(net(x), y).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                opt.step()
                points.append(end_to_end(net.state_dict().values()))
        return torch.stack(points)

    theirs, ours = (train(make) for make in DROP_INS[name])
    assert theirs.shape[0] == 12 and (theirs[-1] - theirs[0]).norm() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_gd_follows_a_schedule_as_sgd_does():
    x, y = torch.randn(20, 4), torch.randn(20, 2)

    def train(make):
        torch.manual_seed(1)
        net = nn.Linear(4, 2)
        opt = make(net.parameters())
        schedule = lr_scheduler.CosineAnnealingLR(opt, T_max=15)
        for _ in range(15):
            opt.zero_grad()
            F.mse_loss(net(x), y).backward()
            opt.step()
            schedule.step()
        return end_to_end(net.parameters())

    theirs, ours = (train(make) for make in DROP_INS["GD"])
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
def test_newton_cg_comes_to_where_lbfgs_comes(curvature):
    """Logistic regression with weight decay, which has one minimum."""
    x, y, decay = torch.randn(40, 5), torch.randint(0, 3, (40,)), 0.1

    def loss_of(net):
        output = net(x)
        far = sum(p.square().sum() for p in net.parameters())
        return F.cross_entropy(output, y) + decay / 2 * far, output

    torch.manual_seed(1)
    theirs = nn.Linear(5, 3)
    ours = copy.deepcopy(theirs)
    exact = {"tolerance_grad": 1e-12, "tolerance_change": 0.0, "max_iter": 200}
    opt = torch.optim.LBFGS(theirs.parameters(), line_search_fn="strong_wolfe", **exact)

    def closure():
        opt.zero_grad()
        loss, _ = loss_of(theirs)
        loss.backward()
        return loss

    opt.step(closure)
    damping = {"curvature": curvature, "damping": decay} if curvature is iopt.GaussNewton else {}
    newton = iopt.NewtonCG(ours.parameters(), linear_solver=iopt.CG(rtol=1e-8), **damping)
    for _ in range(8):
        newton.step(lambda: loss_of(ours) if damping else loss_of(ours)[0])
    assert newton.state[ours.weight]["grad_norm"] < 1e-10
    a, b = end_to_end(ours.parameters()), end_to_end(theirs.parameters())
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # LBFGS compares losses: half the digits


# -- one's own loop, and attach --------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def episodes():
    return [(torch.randn(2, n, 3), torch.randn(2, n, 1)) for n in (5, 4)]


def objective_of(model):
    def objective(phi, theta, x, y):
        fit = F.mse_loss(functional_call(model, phi, (x,)), y)
        return fit + iopt.proximal(phi, (theta, torch.tensor(LAM)))

    return objective


def test_attach_behind_a_loop_of_ones_own_is_a_long_unroll():
    """SGD with momentum and early stopping; the unroll is gradient descent in plain autograd."""
    model, (support, query) = network(), episodes()
    objective, theta = objective_of(model), dict(model.named_parameters())
    fixed = {k: p.detach() for k, p in theta.items()}
    ours, theirs = [], []
    for (x, y), (xq, yq) in tasks_of(support, query):
        net = copy.deepcopy(model)
        inner = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5, nesterov=True)
        for steps in range(1000):  # noqa: B007
            inner.zero_grad()
            objective(dict(net.named_parameters()), fixed, x, y).backward()
            if end_to_end(p.grad for p in net.parameters()).norm() < 1e-12:
                break
            inner.step()
        assert steps < 999
        phi = {k: p.detach() for k, p in net.named_parameters()}
        exact = EXACT.linear_solver
        phi = iopt.attach(phi, objective, theta, x, y, linear_solver=exact, on_solve=iopt.Raise())
        loss = F.mse_loss(functional_call(model, phi, (xq,)), yq)
        ours.append(end_to_end(torch.autograd.grad(loss, list(theta.values()))))

        phi = theta
        for _ in range(120):
            value = objective(phi, theta, x, y)
            slopes = torch.autograd.grad(value, list(phi.values()), create_graph=True)
            phi = {k: p - 0.12 * g for (k, p), g in zip(phi.items(), slopes, strict=True)}
        loss = F.mse_loss(functional_call(model, phi, (xq,)), yq)
        theirs.append(end_to_end(torch.autograd.grad(loss, list(theta.values()))))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-8, atol=1e-10)


# -- higher ----------------------------------------------------------------------------------------


class HigherGD(higher.optim.DifferentiableOptimizer):
    """`GD` for higher: the same rule, out of place."""

    def _update(self, grouped_grads, **kwargs):
        for group, grads in zip(self.param_groups, grouped_grads, strict=True):
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is not None:
                    group["params"][i] = p - group["lr"] * g


class HigherAGD(higher.optim.DifferentiableOptimizer):
    """`NesterovAGD` for higher."""

    def _update(self, grouped_grads, **kwargs):
        groups = zip(self.param_groups, grouped_grads, self.state, strict=True)
        for group, grads, state in groups:
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is not None:
                    before = state[i].get("x", p)
                    state[i]["x"] = after = p - group["lr"] * g
                    group["params"][i] = after + group["momentum"] * (after - before)


@pytest.fixture
def registered():
    """Higher's table is as it was afterwards."""
    table = higher.optim._opt_mapping
    before = dict(table)
    higher.register_optim(iopt.GD, HigherGD)
    higher.register_optim(iopt.NesterovAGD, HigherAGD)
    yield
    table.clear()
    table.update(before)


def by_higher(model, optimizer, support, query, override=None):
    """Query losses and the gradients of their mean in the parameters and what is overridden."""
    losses, anchor = [], list(model.parameters())
    extra = [t for ts in (override or {}).values() for t in ts]
    for (x, y), (xq, yq) in tasks_of(support, query):
        settings = {"copy_initial_weights": False, "override": override}
        with higher.innerloop_ctx(model, optimizer, **settings) as (net, inner):
            for _ in range(4):
                pairs = zip(net.parameters(), anchor, strict=True)
                near = sum(((p - a) ** 2).sum() for p, a in pairs)
                inner.step(F.mse_loss(net(x), y) + LAM / 2 * near)
            losses.append(F.mse_loss(net(xq), yq))
    losses = torch.stack(losses)
    return losses.detach(), end_to_end(torch.autograd.grad(losses.mean(), [*anchor, *extra]))


PAIRS = {
    "GD": (iopt.GD, {}, iopt.gd),
    "NesterovAGD": (iopt.NesterovAGD, {"momentum": 0.5}, iopt.agd),
}


@pytest.mark.parametrize("name", PAIRS)
def test_our_optimizers_in_highers_loop(registered, name):
    """Registered, they are higher's SGD, and what `Unrolled` computes of all tasks at once."""
    kind, settings, rule = PAIRS[name]
    model, (support, query) = network(), episodes()
    ours = by_higher(model, kind(model.parameters(), lr=LR, **settings), support, query)
    nesterov = {"nesterov": True, **settings} if settings else {}
    sgd = torch.optim.SGD(model.parameters(), lr=LR, **nesterov)
    assert_same(ours, by_higher(model, sgd, support, query), rtol=1e-11, atol=1e-13)
    solver = rule(lr=LR, max_steps=4, **settings)
    meta = iopt.MetaLearner(
        model, F.mse_loss, solver=solver, lam=LAM, meta_gradient=iopt.Unrolled()
    )
    assert_same(learned(meta, support, query), ours, rtol=1e-11, atol=1e-13)


def test_higher_reaches_a_learned_lr_of_ours(registered):
    model, (support, query) = network(), episodes()
    lr = torch.tensor(LR, requires_grad=True)
    opt = iopt.GD(model.parameters(), lr=LR)
    losses, gradient = by_higher(model, opt, support, query, {"lr": [lr]})
    meta = iopt.MetaLearner(
        model,
        F.mse_loss,
        solver=iopt.gd(lr=lr, max_steps=4),
        lam=LAM,
        meta_gradient=iopt.Unrolled(),
    )
    ours = meta(support, query)
    gradients = torch.autograd.grad(ours.mean(), [*model.parameters(), lr])
    assert_same((ours, end_to_end(gradients)), (losses, gradient), rtol=1e-11, atol=1e-13)


def test_higher_goes_on_from_the_state_of_a_run(registered):
    """Steps that the optimizer has taken before count, the look-ahead point included.

    The iterates are SGD's. The gradients are not: what is held while the parameters vary is the last
    point here, and the last move there.
    """
    model, (support, query) = network(), episodes()
    twin = copy.deepcopy(model)
    ours = iopt.NesterovAGD(model.parameters(), lr=LR, momentum=0.5)
    sgd = torch.optim.SGD(twin.parameters(), lr=LR, momentum=0.5, nesterov=True)
    for net, opt in ((model, ours), (twin, sgd)):
        for _ in range(3):
            opt.zero_grad()
            F.mse_loss(net(support[0][0]), support[1][0]).backward()
            opt.step()
    losses, _ = by_higher(model, ours, support, query)
    theirs, _ = by_higher(twin, sgd, support, query)
    torch.testing.assert_close(losses, theirs, rtol=1e-11, atol=1e-13)
    fresh = torch.optim.SGD(twin.parameters(), lr=LR, momentum=0.5, nesterov=True)
    assert (by_higher(twin, fresh, support, query)[0] - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [iopt.GD, iopt.NewtonCG])
def test_higher_asks_for_what_is_not_registered(kind):
    model = network()
    opt = kind(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="Optimizer type .* not supported by higher"):
        with higher.innerloop_ctx(model, opt):
            pass
