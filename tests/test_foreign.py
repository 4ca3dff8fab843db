"""Tensors that come from elsewhere: names, other parameters, hidden ones, and ones that nothing reaches.

A learner is a function of its parameters: which of them adapt is fixed when it is made. What wants a
gradient has all of it, by finite differences of the whole pipeline, or is an error that names it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp, vmap

import implicit_optim as iopt
from per_task import EXACT, NEWTON, implicit_maml
from plainly import (
    LOOP,
    RULES,
    Kind,
    by_module,
    check,
    every_rule,
    flat,
    learner,
    of_library,
    one_gradient,
    sequential,
    task,
    vectors,
)

pytestmark = pytest.mark.usefixtures("double")


def net():
    return sequential(2)


def slope(f, tensors, directions, eps=1e-5):
    """Central finite difference of a function of tensors by name."""
    ends = [f({k: t + sign * eps * directions[k] for k, t in tensors.items()}) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * eps)


def detached(module):
    return {k: p.detach().clone() for k, p in module.named_parameters()}


def like(tensors):
    return {k: torch.randn_like(t) for k, t in tensors.items()}


# -- names (findings, part 1, rows 16 and 17) --------------------------------------------------------


@every_rule
def test_predict_wants_exactly_the_names_that_adapt(rule):
    (x, y), (xq, _) = vectors()
    meta = learner(net(), rule=rule)
    with torch.no_grad():
        phi = meta.adapt((x, y))
        meta.predict(phi, xq)
        for wrong in ({"2.wieght": phi["2.weight"]}, {"module.0.bias": phi["0.bias"]}):
            with pytest.raises((ValueError, KeyError), match=next(iter(wrong)).replace(".", r"\.")):
                meta.predict(phi | wrong, xq)
        with pytest.raises((ValueError, KeyError), match=r"0\.bias"):
            meta.predict({k: p for k, p in phi.items() if k != "0.bias"}, xq)
        with pytest.raises((ValueError, KeyError), match=r"0\.weight"):
            meta.predict({f"module.{k}": p for k, p in phi.items()}, xq)


def test_predict_wants_the_statistics_too():
    (x, y), (xq, _) = vectors()
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    meta = learner(model, running_stats=iopt.RunningStats.PER_TASK, lam=8.0)
    with torch.no_grad():
        phi = meta.adapt((x, y))
        del phi["1.running_var"]
        with pytest.raises((ValueError, KeyError), match=r"1\.running_var"):
            meta.predict(phi, xq)


@every_rule
def test_a_learner_is_a_function_of_detached_tensors(rule):
    """The same as a learner that has them as parameters, wherever it was made."""
    support, query = vectors()
    meta, other = learner(net(), rule=rule), net()
    theirs = Kind(net).account(rule, other, (support, query))
    names = {f"model.{k}": p for k, p in detached(other).items()}
    with torch.no_grad():
        losses = functional_call(meta, names, (support, query))
    torch.testing.assert_close(losses, theirs.losses, rtol=1e-9, atol=1e-12)
    assert not functional_call(meta, names, (support, query)).requires_grad

    leaves = {k: t.requires_grad_() for k, t in names.items()}
    losses = functional_call(meta, leaves, (support, query))
    gradient = torch.autograd.grad(losses.mean(), list(leaves.values()))
    gradient = torch.cat([g.reshape(-1) for g in gradient])
    torch.testing.assert_close(gradient, theirs.gradient, rtol=1e-8, atol=1e-10)


# Where the value is what the rule differentiates, so that finite differences are an oracle.
TRUE = {
    "implicit": {"solver": NEWTON, "meta_gradient": EXACT, "lam": 6.0},
    "unrolled": {"rule": "unrolled"},
}
either_rule = pytest.mark.parametrize("settings", TRUE.values(), ids=TRUE)


def as_function(settings):
    """A learner with one frozen layer as a function of its parameters by name, and these."""
    model = net()
    model[0].weight.requires_grad_(False)
    support, query = vectors()
    meta = learner(model, **settings)
    theta = {f"model.{k}": t for k, t in detached(model).items() if k != "0.weight"}
    return lambda theta: functional_call(meta, theta, (support, query)), theta


@either_rule
def test_forward_mode_and_gradients_of_a_function_of_theta(settings):
    f, theta = as_function(settings)
    along = like(theta)
    losses, tangent = jvp(f, (theta,), (along,))
    with torch.no_grad():
        expected = slope(f, theta, along)
        torch.testing.assert_close(losses, f(theta), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-9)
    pulled = torch.func.grad(lambda theta: f(theta).sum())(theta)
    total = sum((pulled[k] * along[k]).sum() for k in theta)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-6, atol=1e-9)


# Under vmap nobody sees that a solve is done: few steps.
FEW_STEPS = {"meta_gradient": iopt.Implicit(iopt.CG(max_steps=6))}


@pytest.mark.parametrize("settings", [FEW_STEPS, *({"rule": r} for r in RULES if r != "implicit")])
def test_a_batch_of_thetas(settings):
    f, theta = as_function(settings)
    thetas = {k: t + 0.3 * torch.randn(2, *t.shape) for k, t in theta.items()}
    each = [{k: t[i] for k, t in thetas.items()} for i in range(2)]
    gradient = torch.func.grad(lambda theta: f(theta).mean())
    torch.testing.assert_close(vmap(f)(thetas), torch.stack([f(t) for t in each]))
    ours, theirs = vmap(gradient)(thetas), [gradient(t) for t in each]
    for k in theta:
        expected = torch.stack([g[k] for g in theirs])
        torch.testing.assert_close(ours[k], expected, rtol=1e-6, atol=1e-9)


@every_rule
def test_which_parameters_adapt_is_fixed_when_it_is_made(rule):
    model, (support, query) = net(), vectors()
    meta = learner(model, rule=rule)
    before = of_library(meta, support, query)
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        phi = meta.adapt(support)
    assert set(phi) == {k for k, _ in model.named_parameters()}
    ours = torch.cat([phi[k].flatten(1) for k, _ in model.named_parameters()], 1)
    torch.testing.assert_close(ours, before.phi, rtol=1e-12, atol=1e-14)


# -- parameters of the loss, and of the data (row 15) ------------------------------------------------


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.power = nn.Parameter(torch.tensor(1.3)), nn.Linear(1, 1)

    def forward(self, output, target):
        return self.w * F.mse_loss(output, self.power(target))


@pytest.mark.parametrize("batching", [None, LOOP], ids=["default", "loop"])
@either_rule
def test_parameters_of_a_loss_have_their_whole_gradient(settings, batching):
    model, (support, query) = net(), vectors()
    meta = learner(model, Weighted(), batching=batching, **settings)
    assert {"loss.w", "loss.power.weight"} <= set(dict(meta.named_parameters()))
    every = dict(meta.named_parameters())
    losses = meta(support, query)
    gradients = dict(zip(every, torch.autograd.grad(losses.mean(), every.values()), strict=True))
    assert not any(k.startswith("loss") for k in meta.adapt(support))

    def f(parameters):
        with torch.no_grad():
            return functional_call(meta, parameters, (support, query)).mean()

    now = detached(meta)
    for names in (["loss.w"], ["loss.power.weight", "loss.power.bias"], ["model.0.weight"]):
        along = {k: torch.randn_like(t) * (k in names) for k, t in now.items()}
        ours = sum((gradients[k] * along[k]).sum() for k in names)
        torch.testing.assert_close(ours, slope(f, now, along), rtol=1e-6, atol=1e-9)


def test_parameters_of_a_loss_have_the_direct_part_of_first_order_maml():
    model, (support, query) = net(), vectors()
    loss = Weighted()
    meta = learner(model, loss, "first order")
    ours = torch.autograd.grad(meta(support, query).mean(), list(loss.parameters()))
    phi, output = meta.adapt(support), by_module(net())
    values = []
    for i in range(2):
        p = torch.cat([phi[k][i].detach().reshape(-1) for k, _ in model.named_parameters()])
        *x, y = task(query, i)
        values.append(loss(output(p, x), y))
    theirs = torch.autograd.grad(torch.stack(values).mean(), list(loss.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@either_rule
def test_data_have_their_whole_gradient(settings):
    model, ((x, y), query) = net(), vectors()
    meta = learner(model, **settings)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(meta((leaf, y), query).sum(), leaf)
    along = {"x": torch.randn_like(x)}
    with torch.no_grad():
        theirs = slope(lambda d: meta((d["x"], y), query).sum(), {"x": x}, along)
    torch.testing.assert_close((gradient * along["x"]).sum(), theirs, rtol=1e-6, atol=1e-9)


class Hiding(nn.Module):
    """Holds a tensor where no module looks."""

    def __init__(self, place):
        super().__init__()
        self.layers, self.place = net(), place
        hidden = torch.full((7, 1), 1.5, requires_grad=True)
        self.temperature = {"attribute": hidden, "list": [hidden], "dict": {"t": hidden}}[place]

    def forward(self, x):
        t = self.temperature
        t = {"attribute": lambda: t, "list": lambda: t[0], "dict": lambda: t["t"]}[self.place]()
        return self.layers(x) * t.mean()


NAMED = r"(?is)(?=.*requires.grad)(?=.*(temperature|7, 1))"


@pytest.mark.parametrize("batching", [None, LOOP], ids=["default", "loop"])
@every_rule
@pytest.mark.parametrize("place", ["attribute", "list", "dict"])
def test_a_tensor_hidden_in_a_model_is_an_error(place, rule, batching):
    with pytest.raises((ValueError, RuntimeError), match=NAMED):
        one_gradient(learner(Hiding(place), rule=rule, batching=batching), *vectors())


class Remembers(nn.Module):
    """Keeps a list with a parameter of its own: what adapts is another tensor."""

    def __init__(self):
        super().__init__()
        self.layers = net()
        self.penalised = [self.layers[2].weight]

    def forward(self, x):
        return self.layers(x) + self.penalised[0].square().sum()


@every_rule
def test_a_parameter_that_is_read_past_its_name_is_an_error(rule):
    with pytest.raises((ValueError, RuntimeError), match="requires.grad"):
        one_gradient(learner(Remembers(), rule=rule), *vectors())


@pytest.mark.parametrize("batching", [None, LOOP], ids=["default", "loop"])
@every_rule
def test_a_tensor_that_a_loss_closes_over_is_an_error(rule, batching):
    w = torch.tensor(1.5, requires_grad=True)
    loss = lambda output, target: w * F.mse_loss(output, target)  # noqa: E731
    with pytest.raises((ValueError, RuntimeError), match="requires.grad"):
        one_gradient(learner(net(), loss, rule, batching=batching), *vectors())


@pytest.mark.parametrize("tasks", [0, 1])
def test_a_tensor_that_an_objective_closes_over_is_an_error(tasks):
    w, theta = torch.tensor(2.0, requires_grad=True), torch.ones(3, requires_grad=True)
    objective = lambda phi, theta: w * (phi**2).sum() + ((phi - theta) ** 2).sum()  # noqa: E731
    phi = theta.detach() / 3
    with pytest.raises((ValueError, RuntimeError), match="requires.grad"):
        phi = phi.expand(2, 3) if tasks else phi
        iopt.attach(phi, objective, theta, batch_ndim=tasks).sum().backward()
    with torch.no_grad():  # nobody asks
        assert torch.equal(iopt.attach(phi, objective, theta, batch_ndim=tasks), phi)


# -- parameters that the loss does not reach ---------------------------------------------------------


class Reaching(nn.Module):
    """A network beside layers that are not called."""

    def __init__(self, how):
        super().__init__()
        self.idle, self.layers, self.how = nn.Linear(2, 2), net(), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.layers(x)
        h = self.layers(x)
        return {"all": h, "detach": h.detach(), "zero": 0 * h, "constant": x[..., :1]}[self.how]


@pytest.mark.parametrize("batching", [None, LOOP], ids=["default", "loop"])
@every_rule
@pytest.mark.parametrize("how", ["no_grad", "detach", "zero", "constant"])
def test_a_loss_that_does_not_reach_what_adapts_is_an_error(how, rule, batching):
    with pytest.raises(ValueError, match="does not reach"):
        one_gradient(learner(Reaching(how), rule=rule, batching=batching), *vectors())


@every_rule
def test_some_layers_may_be_idle(rule):
    """They stay where they are, and get no gradient but what the proximal term gives: none."""
    meta, _, ours = check(Kind(lambda: Reaching("all")), rule)
    idle = sum(p.numel() for p in meta.model.idle.parameters())
    # The query does not depend on them, and theta moves them only through the anchor.
    assert torch.equal(ours.gradient[:idle], torch.zeros(idle))
    assert torch.equal(ours.phi[:, :idle], flat(meta.model.idle)[0].expand(2, -1))


@every_rule
def test_one_task_may_have_nothing_to_learn(rule):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -0.3, 0.2]))

        def forward(self, x):
            return (x @ self.w).unsqueeze(-1)

    def data():
        (x, y), query = vectors()
        return (x * torch.tensor([0.0, 1.0]).reshape(2, 1, 1), y), query

    check(Kind(Scale, data=data), rule)


def test_the_oracle_agrees_with_the_other_one():
    """`plainly.account` at a minimiser is `per_task.implicit_maml`."""
    model, episodes = net(), vectors()
    theta, output = flat(model)[0], by_module(net())
    fit = lambda phi, batch: F.mse_loss(output(phi, batch[:-1]), batch[-1])  # noqa: E731
    tasks = [(task(episodes[0], i), task(episodes[1], i)) for i in range(2)]
    theirs = implicit_maml(fit, lambda phi, _, batch: fit(phi, batch), theta, 4.0, tasks)
    ours = Kind(net).account("implicit", model, episodes, lam=4.0, steps=200)
    torch.testing.assert_close(ours[:2], theirs, rtol=1e-9, atol=1e-11)


def test_predict_tells_swapped_arguments_where_statistics_are_kept():
    (x, y), (xq, _) = vectors()
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    meta = learner(model, running_stats=iopt.RunningStats.PER_TASK, lam=8.0)
    with torch.no_grad(), pytest.raises(ValueError, match="phi must hold .* got Tensor"):
        meta.predict(xq, meta.adapt((x, y)))
