"""Policies for running statistics where the function is called, whoever calls it, by hand.

A norm is `F.batch_norm` or `F.instance_norm` with running statistics, from a layer of torch's, a
subclass, a patched or compiled one, an fx graph or a plain call with the module's buffers.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from plainly import (
    BATCH,
    FROZEN,
    LOOP,
    PER_TASK,
    Kind,
    check,
    every_rule,
    flat,
    images,
    learner,
    vectors,
)

LAM = 8.0
POLICIES = {"batch": BATCH, "frozen": FROZEN, "per task": PER_TASK}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)

pytestmark = pytest.mark.usefixtures("double")


class Net(nn.Module):
    """A layer, a norm over three features or channels, and a head."""

    def __init__(self, norm, convolve=False):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 2) if convolve else nn.Linear(2, 3)
        self.norm, self.head = norm, nn.Linear(3, 1)
        self.convolve = convolve
        with torch.no_grad():
            for p in self.norm.parameters():
                p += 0.3 * torch.randn_like(p)
        for name, buffer in self.norm.named_buffers():
            if "num" not in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)

    def forward(self, x):
        h = self.norm(self.first(x)).tanh()
        return self.head(h.flatten(2).mean(-1) if self.convolve else h)


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


class ActivatedImages(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class ActivatedInstances(nn.InstanceNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def hooked(norm):
    """Twice the output, for a layer of exactly this class."""
    kind = type(norm)
    norm.register_forward_hook(lambda m, args, out: 2 * out if type(m) is kind else None)
    norm.register_forward_pre_hook(lambda m, args: (args[0] + 1 * (type(m) is not kind),))
    return norm


def patched(norm):
    own = norm.forward
    norm.forward = lambda x: own(input=x).relu()
    return norm


class Functional(nn.Module):
    """The plain function, with buffers under names of their own."""

    def __init__(self, function, **settings):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.function, self.settings = function, settings

    def forward(self, x):
        given = (self.mean, self.var, self.weight, self.bias)
        return self.function(x, *given, True, **self.settings).relu()


def by_keyword(x, mean, var, weight, bias, training, eps):
    settings = {"running_mean": mean, "running_var": var, "training": training, "eps": eps}
    return F.batch_norm(input=x, weight=weight, bias=bias, **settings)


def normal(h, policy, buffers, of, instance, eps):
    """Without weights; `of` is what the layer saw of the support set."""
    wide = (1, -1) + (1,) * (h.ndim - 2)
    if policy is FROZEN:
        mean, var = (b.reshape(wide) for b in buffers)
    elif policy is PER_TASK and of is not None:
        over = (2, 3) if instance else [d for d in range(h.ndim) if d != 1]
        mean, var = of.mean(over, keepdim=True), of.var(over, keepdim=True)  # the unbiased one
        mean, var = mean.mean(0, keepdim=True), var.mean(0, keepdim=True)
    else:
        over = (2, 3) if instance else [d for d in range(h.ndim) if d != 1]
        mean = h.mean(over, keepdim=True)
        var = h.var(over, keepdim=True, unbiased=False)
    return (h - mean) / (var + eps).sqrt()


def by_hand(model, policy, after, instance=False, eps=1e-5):
    """The network under a policy; `after` follows the norm."""
    core = getattr(model, "_orig_mod", model)
    buffers = [b.clone() for k, b in core.norm.named_buffers() if "num" not in k]
    shapes = [(k.removeprefix("_orig_mod."), p.shape) for k, p in model.named_parameters()]

    def output(phi, inputs, of=None):
        sizes = [shape.numel() for _, shape in shapes]
        pieces = zip(shapes, phi.split(sizes), strict=True)
        p = {k: v.reshape(shape) for (k, shape), v in pieces}
        first = F.conv2d if p["first.weight"].ndim == 4 else F.linear
        before = lambda x: first(x, p["first.weight"], p["first.bias"])  # noqa: E731
        h = before(inputs[0])
        wide = (1, -1) + (1,) * (h.ndim - 2)
        h = normal(h, policy, buffers, None if of is None else before(of[0]), instance, eps)
        h = h * p["norm.weight"].reshape(wide) if "norm.weight" in p else h
        h = h + p["norm.bias"].reshape(wide) if "norm.bias" in p else h
        h = after(h).tanh()
        h = h.flatten(2).mean(-1) if h.ndim == 4 else h
        return h @ p["head.weight"].T + p["head.bias"]

    return output


def same(h):
    return h


def twice(h):
    return 2 * h


def dense(norm):
    return lambda: Net(norm())


def conv(norm):
    return lambda: Net(norm(), convolve=True)


def instances():
    return nn.InstanceNorm2d(3, affine=True, track_running_stats=True)


# what makes the model, what follows the norm, whether it normalises instances
NORMS = {
    "plain": (dense(lambda: nn.BatchNorm1d(3)), same),
    "subclass": (dense(lambda: Activated(3)), torch.relu),
    "subclass of images": (conv(lambda: ActivatedImages(3)), torch.relu),
    "subclass of instances": (
        conv(lambda: ActivatedInstances(3, affine=True, track_running_stats=True)),
        torch.relu,
        True,
    ),
    "hook": (dense(lambda: hooked(nn.BatchNorm1d(3))), twice),
    "hook on instances": (conv(lambda: hooked(instances())), twice, True),
    "patched": (dense(lambda: patched(nn.BatchNorm1d(3))), torch.relu),
    "function": (dense(lambda: Functional(F.batch_norm, eps=0.1)), torch.relu, False, 0.1),
    "function of images": (conv(lambda: Functional(F.batch_norm)), torch.relu),
    "function of instances": (conv(lambda: Functional(F.instance_norm)), torch.relu, True),
    "by keyword": (dense(lambda: Functional(by_keyword, eps=0.1)), torch.relu, False, 0.1),
    "no bias": (dense(lambda: nn.BatchNorm1d(3, bias=False)), same),
    "no weights": (dense(lambda: nn.BatchNorm1d(3, affine=False)), same),
    "average": (dense(lambda: nn.BatchNorm1d(3, momentum=None)), same),
    "compiled": (lambda: torch.compile(Net(nn.BatchNorm1d(3)), backend="eager"), same),
    "fx": (lambda: fx.symbolic_trace(Net(Functional(F.batch_norm))), torch.relu),
}


def kind_of(name, policy):
    make, after, *how = NORMS[name]
    data = (lambda: images(size=4, support=5)) if "images" in name or "inst" in name else None
    kind = Kind(make, data=data or (lambda: vectors(2, support=6)))
    return replace(kind, output=by_hand(kind.build(), policy, after, *how))


@every_rule
@every_policy
@pytest.mark.parametrize("name", NORMS)
def test_by_hand(name, policy, rule):
    check(kind_of(name, policy), rule, lam=LAM, running_stats=policy)


@every_policy
@pytest.mark.parametrize("name", ["subclass", "hook on instances", "function of images"])
def test_by_hand_one_by_one(name, policy):
    check(kind_of(name, policy), lam=LAM, running_stats=policy, batching=LOOP)


@every_policy
def test_by_hand_where_vmap_refuses(policy):
    make, after = NORMS["subclass"]

    def refusing():
        net = make()
        net.first.register_forward_hook(lambda m, args, out: out + 0 * out.sum().item())
        return net

    kind = Kind(refusing, data=lambda: vectors(2, support=6), loops=True)
    check(replace(kind, output=by_hand(kind.build(), policy, after)), lam=LAM, running_stats=policy)


@pytest.mark.parametrize("name", ["hook", "function", "function of instances", "no bias"])
def test_statistics_of_the_support_set_are_returned_by_the_name_of_the_buffer(name):
    kind = kind_of(name, PER_TASK)
    meta, (support, _), account = check(kind, lam=LAM, running_stats=PER_TASK)
    phi, instance = meta.adapt(support), "instances" in name
    mean, var = [k for k, _ in meta.model.named_buffers() if "num" not in k]
    assert set(phi) == {mean, var} | {k for k, _ in meta.model.named_parameters()}
    for i, x in enumerate(support[0]):
        p = {k: v[i].detach() for k, v in phi.items()}
        first = F.conv2d if x.ndim == 4 else F.linear
        h = first(x, p["first.weight"], p["first.bias"])
        axes = (2, 3) if instance else [d for d in range(h.ndim) if d != 1]
        of_batch = (h.mean(axes), h.var(axes))
        m, v = (t.mean(0) for t in of_batch) if instance else of_batch
        torch.testing.assert_close(p[mean], m, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(p[var], v, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["subclass", "function", "function of instances", "compiled"])
def test_without_a_policy_it_is_an_error_that_says_what_to_choose(name):
    """Nothing is written into the buffers of the user's module."""
    kind = kind_of(name, BATCH)
    model = kind.build()
    before = {k: b.clone() for k, b in model.named_buffers()}
    with pytest.raises(ValueError, match=r"running_stats=iopt\.RunningStats\.BATCH"):
        learner(model)(*kind.data())
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())


@every_rule
def test_in_eval_mode_there_is_no_choice(rule):
    make, after = NORMS["subclass"]
    kind = Kind(lambda: make().eval(), data=lambda: vectors(2, support=6))
    kind = replace(kind, output=by_hand(kind.build(), FROZEN, after))
    check(kind, rule, lam=LAM)
    assert flat(kind.build())[0].numel() == 19
