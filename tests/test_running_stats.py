"""Batch and instance norm under each policy, against plain torch; the user's module stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from implicit_optim import RunningStats
from per_task import (
    EXACT,
    NEWTON,
    assert_same,
    expected,
    flat,
    implicit_maml,
    learned,
    slope_along,
    tasks_of,
)

LAM = 6.0

pytestmark = pytest.mark.usefixtures("double")


def dense(tracked=True, affine=True):
    norm = nn.BatchNorm1d(3, affine=affine, track_running_stats=tracked)
    return nn.Sequential(nn.Linear(2, 3), norm, nn.Tanh(), nn.Linear(3, 1))


def plain(tracked=True):
    return dense(tracked, affine=False)


def images(tracked=True):
    norm = nn.BatchNorm2d(2, track_running_stats=tracked)
    head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))
    return nn.Sequential(nn.Conv2d(1, 2, 2), norm, head)


def instances(tracked=True):
    norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=tracked)
    head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))
    return nn.Sequential(nn.Conv2d(1, 2, 2), norm, head)


NETS = {"1d": dense, "without affine": plain, "2d": images, "instance": instances}


VMAP, LOOP = iopt.Batching(), iopt.Batching(chunk_size=1)
CASES = [*((name, VMAP) for name in NETS), ("1d", LOOP), ("instance", LOOP)]


def build(name):
    """A network whose running statistics are not the initial ones, and its tasks."""
    model = NETS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
        model[1].num_batches_tracked += 3
    shape = (1, 3, 3) if model[1].num_features == 2 else (2,)
    episodes = [(torch.randn(2, n, *shape), torch.randn(2, n, 1)) for n in (6, 4)]
    return model, episodes


def learner(model, policy, **settings):
    settings = {"solver": NEWTON, "meta_gradient": EXACT, "lam": LAM} | settings
    return iopt.MetaLearner(model, F.mse_loss, running_stats=policy, **settings)


@pytest.mark.parametrize("name, batching", CASES)
def test_batch_is_a_layer_that_tracks_nothing(name, batching):
    model, episodes = build(name)
    untracked = NETS[name](tracked=False)
    untracked.load_state_dict(dict(model.named_parameters()))
    ours = learned(learner(model, RunningStats.BATCH, batching=batching), *episodes)
    assert_same(ours, expected(untracked, F.mse_loss, LAM, *episodes))
    model.eval()  # no matter
    assert_same(learned(learner(model, RunningStats.BATCH), *episodes), ours)


@pytest.mark.parametrize("name", NETS)
def test_frozen_is_eval(name):
    model, episodes = build(name)
    theirs = expected(copy.deepcopy(model).eval(), F.mse_loss, LAM, *episodes)
    assert_same(learned(learner(model, RunningStats.FROZEN), *episodes), theirs)
    assert_same(learned(learner(model.eval(), None), *episodes), theirs)


def by_hand(name, model):
    """Output for `x` under parameters by name, normalised by itself or by the support set."""
    over = {"instance": (2, 3), "2d": (0, 2, 3)}.get(name, (0,))

    def first(p, x):
        if x.ndim == 2:
            return x @ p["0.weight"].T + p["0.bias"]
        return F.conv2d(x, p["0.weight"], p["0.bias"])

    def output(p, x, support=None):
        h = first(p, x)
        if support is None:
            mean = h.mean(over, keepdim=True)
            var = ((h - mean) ** 2).mean(over, keepdim=True)
        else:
            g = first(p, support)
            count = g.numel() // g.shape[1] // (len(g) if name == "instance" else 1)
            mean = g.mean(over, keepdim=True)
            var = ((g - mean) ** 2).sum(over, keepdim=True) / (count - 1)
            mean, var = mean.mean(0, keepdim=True), var.mean(0, keepdim=True)
        h = (h - mean) / (var + 1e-5).sqrt()
        if "1.weight" in p:
            wide = (-1,) + (1,) * (h.ndim - 2)
            h = h * p["1.weight"].reshape(wide) + p["1.bias"].reshape(wide)
        head = "2.2" if h.ndim == 4 else "3"
        return h.tanh().flatten(1) @ p[f"{head}.weight"].T + p[f"{head}.bias"]

    return output


@pytest.mark.parametrize("name, batching", CASES)
def test_per_task_by_hand_and_by_finite_differences(name, batching):
    model, episodes = build(name)
    output = by_hand(name, model)
    theta, by_name = flat(model)

    def inner(phi, support):
        return F.mse_loss(output(by_name(phi), support[0]), support[1])

    def outer(phi, support, query):
        return F.mse_loss(output(by_name(phi), query[0], support[0]), query[1])

    meta = learner(model, RunningStats.PER_TASK, batching=batching)
    losses, gradient = learned(meta, *episodes)
    theirs = implicit_maml(inner, outer, theta, LAM, tasks_of(*episodes))
    assert_same((losses, gradient), theirs)

    if batching is LOOP:
        return
    direction = torch.randn_like(gradient)
    slope = slope_along(meta, *episodes, direction)
    torch.testing.assert_close(gradient @ direction, slope, rtol=1e-6, atol=1e-9)


def test_per_task_predicts_each_query_example_alone():
    model, (support, query) = build("2d")
    meta = learner(model, RunningStats.PER_TASK)
    with torch.no_grad():
        phi = meta.adapt(support)
        together = meta.predict(phi, query[0])
        alone = [meta.predict(phi, query[0][:, [i]]) for i in range(4)]
        batch = learner(model, RunningStats.BATCH)
        transductive = batch.predict(phi, query[0])
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-12, atol=1e-14)
    assert (together - transductive).abs().max() > 0.01
    assert phi["1.running_mean"].shape == (2, 2) and phi["1.running_var"].shape == (2, 2)


@pytest.mark.parametrize("policy", RunningStats)
def test_a_norm_layer_that_is_the_whole_model(policy):
    model = nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.5, 0.7]))
        model.running_mean.copy_(torch.tensor([0.3, -0.2]))
        model.running_var.copy_(torch.tensor([2.0, 0.5]))
    support, query = [(torch.randn(3, n, 2), torch.randn(3, n, 2)) for n in (5, 4)]

    def moments(x, of):
        if policy is RunningStats.FROZEN:
            return model.running_mean, model.running_var
        if policy is RunningStats.PER_TASK and of is not None:
            return of.mean(0), of.var(0, unbiased=True)
        return x.mean(0), x.var(0, unbiased=False)

    def fit(phi, batch, of=None):
        mean, var = moments(batch[0], of)
        return F.mse_loss((batch[0] - mean) / (var + 1e-5).sqrt() * phi[:2] + phi[2:], batch[1])

    theta, _ = flat(model)
    outer = lambda phi, support, query: fit(phi, query, support[0])  # noqa: E731
    theirs = implicit_maml(fit, outer, theta, LAM, tasks_of(support, query))
    assert_same(learned(learner(model, policy), support, query), theirs)


class Deep(nn.Module):
    """Norms at three depths, one of them under two names, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)))
        self.again = self.block[1][0]
        self.idle = nn.BatchNorm1d(5)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.again(self.block[0](x)).tanh())


def snapshot(model):
    """Everything about a module that adapting must not change."""
    modules = dict(model.named_modules(remove_duplicate=False))
    attributes = {
        k: {name: value for name, value in vars(m).items() if not name.startswith("_")}
        for k, m in modules.items()
    }
    hooks = {k: [list(v) for n, v in vars(m).items() if "hooks" in n] for k, m in modules.items()}
    inside = {k: (list(m._parameters), list(m._buffers)) for k, m in modules.items()}
    tensors = {k: (id(t), t._version) for k, t in model.state_dict(keep_vars=True).items()}
    ids = {k: id(m) for k, m in modules.items()}
    return attributes, hooks, inside, tensors, ids


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("batching", [VMAP, LOOP])
@pytest.mark.parametrize("policy", RunningStats)
def test_the_module_is_left_as_it_was(policy, batching, fails):
    model = Deep()
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    calls = []

    def loss(output, target):
        calls.append(None)
        if fails and len(calls) == 5:
            raise ArithmeticError("on purpose")
        return F.mse_loss(output, target)

    few = {"solver": iopt.gd(lr=0.1, max_steps=3), "meta_gradient": iopt.Implicit()}
    meta = learner(model, policy, batching=batching, on_solve=iopt.Ignore(), **few)
    meta.loss = loss
    support, query = [(torch.randn(2, 4, 2), torch.randn(2, 4, 1)) for _ in range(2)]
    if fails:
        with pytest.raises(ArithmeticError):
            meta(support, query).sum().backward()
    else:
        meta(support, query).sum().backward()
        meta.predict(meta.adapt(support), query[0])
    assert snapshot(model) == before
    assert all(torch.equal(t, values[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("policy", RunningStats)
def test_a_layer_under_two_names_and_an_idle_one_are_no_obstacle(policy):
    model = Deep()
    linear, inner = model.block
    plain = nn.Sequential(linear, inner[0], nn.Tanh(), model.head)  # the same parameters
    episodes = [(torch.randn(2, 5, 2), torch.randn(2, 5, 1)) for _ in range(2)]
    losses = learner(model, policy)(*episodes)
    theirs = learner(plain, policy)(*episodes)
    shared = list(plain.parameters())
    assert_same(
        (losses, *torch.autograd.grad(losses.mean(), shared)),
        (theirs, *torch.autograd.grad(theirs.mean(), shared)),
    )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.norm(self.norm(x).tanh()))


def test_a_layer_called_twice_has_no_statistics_of_its_own():
    episodes = [(torch.randn(2, 5, 2), torch.randn(2, 5, 1)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"norm is called twice .*PER_TASK .*RunningStats.BATCH"):
        learner(Twice(), RunningStats.PER_TASK)(*episodes)
    losses = learner(Twice(), RunningStats.BATCH)(*episodes)
    assert losses.isfinite().all()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_the_default_says_what_to_choose(kind):
    norm = kind(2, track_running_stats=True)
    model = nn.Sequential(nn.Sequential(norm), nn.Flatten(), nn.Linear(18, 1))
    support = query = (torch.randn(2, 3, 2, 3, 3), torch.randn(2, 3, 1))
    message = rf"0\.0 \({kind.__name__}\) would update its running statistics .*RunningStats\.BATCH"
    with pytest.raises(ValueError, match=message):
        learner(model, None)(support, query)
    norm.eval()
    assert learner(model, None)(support, query).shape == (2,)
