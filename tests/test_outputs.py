"""What models may return and take; Unrolled, against autograd by hand and `higher`."""

import dataclasses

import higher
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import implicit_optim as iopt
from per_task import EXACT, NEWTON, assert_same, expected, flat, learned, tasks_of

VMAP, LOOP = iopt.Batching(), iopt.Batching(chunk_size=1)
LAM = 5.0

pytestmark = pytest.mark.usefixtures("double")


def learner(model, loss=F.mse_loss, **settings):
    settings = {"solver": NEWTON, "meta_gradient": EXACT, "lam": LAM} | settings
    return iopt.MetaLearner(model, loss, **settings)


def episodes(inputs=1, targets=1):
    def batch(n):
        return (*(torch.randn(2, n, 3) for _ in range(inputs)), torch.randn(2, n, targets))

    return batch(5), batch(4)


# -- outputs and inputs ----------------------------------------------------------------------------


class Heads(nn.Module):
    """Two heads, as a dictionary or as what `kind` makes of them."""

    def __init__(self, kind=dict):
        super().__init__()
        self.body, self.kind = nn.Linear(3, 3), kind
        self.mean, self.scale = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x):
        h = self.body(x).tanh()
        return self.kind(mean=self.mean(h), log_scale=self.scale(h))


@dataclasses.dataclass
class Normal:
    mean: torch.Tensor
    log_scale: torch.Tensor


def likelihood(output, target):
    mean, log_scale = (
        output.values() if isinstance(output, dict) else (output.mean, output.log_scale)
    )
    return (log_scale + (target - mean) ** 2 / 2 * (-2 * log_scale).exp()).mean()


@pytest.mark.parametrize("batching", [VMAP, LOOP])
@pytest.mark.parametrize("kind", [dict, Normal])
def test_a_model_that_returns_a_structure(kind, batching):
    model, (support, query) = Heads(kind), episodes()
    ours = learned(learner(model, likelihood, batching=batching), support, query)
    assert_same(ours, expected(model, likelihood, LAM, support, query))


def test_predict_of_a_dictionary_is_a_dictionary():
    meta, (support, query) = learner(Heads(), likelihood), episodes()
    with torch.no_grad():
        phi = meta.adapt(support)
        outputs = meta.predict(phi, query[0])
    for i in range(2):
        alone = functional_call(meta.model, {k: p[i] for k, p in phi.items()}, (query[0][i],))
        for name in ("mean", "log_scale"):
            torch.testing.assert_close(outputs[name][i], alone[name], rtol=1e-12, atol=1e-14)


class Matcher(nn.Module):
    """Takes two inputs and returns two outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, a, b):
        return self.left(a).tanh(), self.right(b).tanh()


@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
def test_several_inputs_and_a_tuple_of_outputs(curvature):
    def loss(output, target):
        return F.mse_loss(output[0] - output[1], target)

    model, (support, query) = Matcher(), episodes(inputs=2, targets=2)
    rule = iopt.Implicit(EXACT.linear_solver, curvature)
    losses, gradient = learned(learner(model, loss, meta_gradient=rule), support, query)
    exact, theirs = expected(model, loss, LAM, support, query)
    torch.testing.assert_close(losses, exact, rtol=1e-10, atol=1e-12)
    if curvature is iopt.Hessian:
        assert_same((losses, gradient), (exact, theirs))
    else:  # biased, and no more than that
        assert torch.cosine_similarity(gradient, theirs, dim=0) > 0.95


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 1), reentrant

    def forward(self, x):
        h = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(h.tanh())


@pytest.mark.parametrize("batching", [VMAP, LOOP])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_module_is_an_error_that_says_so(reentrant, batching):
    support, query = episodes()
    if reentrant and batching is LOOP:  # no transform would see it: torch's own warning
        expected = pytest.warns(UserWarning, match="Gradients will be None")
    else:
        message = r"torch.func transforms do not support .*checkpoint.*turn it off"
        expected = pytest.raises(RuntimeError, match=message)
    with expected:
        learner(Checkpointed(reentrant), batching=batching)(support, query)


# -- Unrolled --------------------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def descended(model, theta, by_name, lr, task, momentum=0.0, steps=4):
    """Query loss after (accelerated) descent on the proximal objective, with its graph."""
    x, phi = theta, theta
    for _ in range(steps):
        fit = F.mse_loss(functional_call(model, by_name(phi), (task[0][0],)), task[0][1])
        value = fit + LAM / 2 * ((phi - theta) ** 2).sum()
        (slope,) = torch.autograd.grad(value, phi, create_graph=True)
        before, x = x, phi - lr * slope
        phi = x + momentum * (x - before)
    return F.mse_loss(functional_call(model, by_name(phi), (task[1][0],)), task[1][1])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_unrolled_is_plain_autograd_and_reaches_a_learned_lr(batching, momentum):
    model, (support, query) = network(), episodes()
    lr = torch.tensor(0.08, requires_grad=True)
    solver = iopt.gd(lr=lr, max_steps=4)
    if momentum:
        solver = iopt.agd(lr=lr, momentum=momentum, max_steps=4)
    meta = learner(model, solver=solver, meta_gradient=iopt.Unrolled(), batching=batching)
    losses = meta(support, query)
    *of_model, of_lr = torch.autograd.grad(losses.mean(), [*model.parameters(), lr])

    theta, by_name = flat(model)
    theta.requires_grad_()
    tasks = tasks_of(support, query)
    by_hand = [descended(model, theta, by_name, lr, task, momentum) for task in tasks]
    by_hand = torch.stack(by_hand)
    g, g_lr = torch.autograd.grad(by_hand.mean(), (theta, lr))
    ours = (losses, torch.cat([t.reshape(-1) for t in of_model]), of_lr)
    assert_same(ours, (by_hand, g, g_lr), rtol=1e-10, atol=1e-12)


def test_unrolled_gd_is_higher():
    model, (support, query) = network(), episodes()
    solver = iopt.gd(lr=0.08, max_steps=4)
    ours = learned(learner(model, solver=solver, meta_gradient=iopt.Unrolled()), support, query)
    losses, gradient = [], 0
    for (x, y), (xq, yq) in tasks_of(support, query):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.08)
        with higher.innerloop_ctx(model, optimizer, track_higher_grads=True) as (net, descent):
            theta = list(net.parameters(time=0))
            for _ in range(4):
                near = sum(
                    ((p - a) ** 2).sum() for p, a in zip(net.parameters(), theta, strict=True)
                )
                descent.step(F.mse_loss(net(x), y) + LAM / 2 * near)
            loss = F.mse_loss(net(xq), yq)
            g = torch.autograd.grad(loss, theta)
        losses.append(loss.detach())
        gradient = gradient + torch.cat([t.reshape(-1) for t in g]) / 2
    assert_same(ours, (torch.stack(losses), gradient), rtol=1e-10, atol=1e-12)


def test_unrolled_approaches_implicit():
    model, (support, query) = network(), episodes()
    exact = learned(learner(model), support, query)
    long = {"solver": iopt.gd(lr=0.12, max_steps=150), "meta_gradient": iopt.Unrolled()}
    assert_same(learned(learner(model, **long), support, query), exact, rtol=1e-7, atol=1e-9)


SOLVERS = {
    "newton_cg": iopt.newton_cg(max_steps=2),
    "from_torch, elementwise": iopt.from_torch(torch.optim.SGD, lr=0.1, max_steps=2),
    "from_torch": iopt.from_torch(torch.optim.LBFGS, max_steps=2),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_unrolled_refuses_steps_that_keep_no_graph(name):
    support, query = episodes()
    with pytest.raises(
        TypeError, match=r"Unrolled\(\) needs a solver .* gd or agd, .*Implicit\(\)"
    ):
        learner(network(), solver=SOLVERS[name], meta_gradient=iopt.Unrolled())(support, query)


def test_a_learned_lr_has_no_gradient_through_a_minimiser():
    lr = torch.tensor(0.1, requires_grad=True)
    (support, query), solver = episodes(), iopt.gd(lr=lr, max_steps=2)
    remedy = r"lr of gd requires grad, .*meta_gradient=Unrolled\(\)"
    with pytest.raises(ValueError, match=remedy):
        learner(network(), solver=solver)(support, query)
    with pytest.raises(ValueError, match=remedy):
        iopt.minimize(lambda phi, theta: phi @ phi, torch.ones(2), (), solver=solver)
    with torch.no_grad():  # nobody wants its gradient
        assert learner(network(), solver=solver)(support, query).shape == (2,)
