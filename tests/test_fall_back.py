"""How the tasks are gone through: all at once, one by one where vmap refuses, in threads if asked for.

The default goes one by one by itself, exactly, and says so once; an explicit `Batching` never does.
Threads have copies of the model that follow it or are an error; two learners of one model take turns.
"""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from plainly import (
    LOOP,
    THREADS,
    VMAP,
    Kind,
    Perceptron,
    adapting_of,
    assert_equal,
    check,
    every_rule,
    images,
    learner,
    of_library,
    one_gradient,
    over,
    patched,
    said_once,
    sequential,
    snapshot,
    vectors,
)

pytestmark = pytest.mark.usefixtures("double")


class Net(Perceptron):
    """With something between its layers, or after them, that a kind is about."""

    def __init__(self, inside=lambda x, h: h, after=lambda out: out):
        super().__init__(3)
        self.inside, self.after = inside, after

    def forward(self, x):
        return self.after(self.b(self.inside(x, self.hidden(x))))


# -- what vmap refuses (findings, part 1, rows 9 and 11) ---------------------------------------------


def item(x, h):
    return h * x.abs().max().item()


def branch(x, h):
    return 2 * h if x[0, 0] > x[1, 0] else h


def mask(x, h):
    return h + h[x[:, 0] > x[:, 0].median()].mean(0)


def query_only(x, h):
    """The query set alone is refused, which is smaller."""
    return item(x, h) if len(x) == 3 else h


class Cube(torch.autograd.Function):
    """Of the old kind: without `setup_context`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def twice_back(h):
    """The textbook way to scale a gradient; the hook acts on second derivatives as well."""
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g)
    return h


def with_backward_hook(model, last):
    hook = lambda m, into, out: tuple(2 * g for g in into)  # noqa: E731
    model.get_submodule(last).register_full_backward_hook(hook)
    return model


class Sparse(Net):
    """A graph a task, whose adjacency is made of its edges."""

    def forward(self, x, edges):
        size, ones = (len(x), len(x)), torch.ones(edges.shape[-1])
        near = torch.sparse_coo_tensor(edges, ones, size, check_invariants=False)
        h = self.a(x).tanh()
        return self.b(h + torch.sparse.mm(near, h))


class Counts(Net):
    """Writes what it sees into a buffer, which it then uses."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.ones(3))

    def forward(self, x):
        self.seen.add_(x.detach().mean(0))
        return self.b(self.a(x).tanh() * self.seen)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.cells, self.head = kind(1, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.cells(x.unsqueeze(-1))[0][:, -1])


def graphs():
    edges = lambda n: torch.randint(0, n, (2, 2, 6))  # noqa: E731
    return [(x, edges(x.shape[1]), y) for x, y in vectors()]


def classes():
    return [(torch.randn(2, n, 3), torch.randint(0, 2, (2, n))) for n in (5, 4)]


def two_outputs():
    return sequential(3, outputs=2)


def smoothed(output, target):
    weight = torch.tensor([0.3, 0.7])
    return F.cross_entropy(output, target, weight=weight, label_smoothing=0.1)


def gaussian(output, target):
    return F.gaussian_nll_loss(output[..., :1], target, output[..., 1:].exp())


def refused(make, **settings):
    return Kind(make, loops=True, **settings)


REFUSED = {
    "item": refused(lambda: Net(item)),
    "branch": refused(lambda: Net(branch)),
    "mask": refused(lambda: Net(mask)),
    "query only": refused(lambda: Net(query_only), data=lambda: vectors(query=3)),
    "sparse": refused(Sparse, data=graphs),
    "buffer": refused(Counts),
    "custom function": refused(lambda: Net(lambda x, h: h + Cube.apply(h))),
    "tensor hook": refused(lambda: Net(after=twice_back)),
    "backward hook": refused(lambda: with_backward_hook(nn.Sequential(Net(), nn.Identity()), "1")),
    "gaussian": refused(two_outputs, loss=gaussian),
}
# Without a symmetric matrix that a conjugate gradient solve could be held to.
HOOKED = {
    "tensor hook inside": refused(lambda: Net(lambda x, h: twice_back(h))),
    "backward hook inside": refused(lambda: with_backward_hook(Net(), "b")),
}
# Right, whether vmap or a replaced operation takes it or not.
EITHER = {
    "lstm": Kind(Recurrent),
    "gru": Kind(lambda: Recurrent(nn.GRU)),
    "smoothed": Kind(two_outputs, data=classes, loss=smoothed),
}


@every_rule
@over(REFUSED)
def test_one_by_one_by_itself(kind, rule):
    check(kind, rule)


@pytest.mark.parametrize("rule", ["unrolled", "truncated", "first order", "reptile"])
@over(HOOKED)
def test_hooks_act_as_they_do_in_plain_torch(kind, rule):
    check(kind, rule)


@every_rule
@over(EITHER)
def test_one_by_one_or_not(kind, rule):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*one by one")
        model = kind.build()
        meta, episodes = learner(model, kind.loss, rule), kind.data()
        before, _alive = snapshot(model)
        ours = of_library(meta, *episodes)
    assert snapshot(model)[0] == before
    assert_equal(ours, kind.account(rule, model, episodes))


@over(REFUSED | HOOKED | EITHER)
def test_one_by_one_because_it_was_asked_for_says_nothing(kind):
    check(kind, "first order", batching=LOOP)


@over(REFUSED | HOOKED)
def test_an_explicit_batching_does_not_fall_back(kind):
    """Not even where vmap itself would ignore a hook."""
    model = kind.build()
    meta = learner(model, kind.loss, "first order", batching=VMAP)
    before, _alive = snapshot(model)
    with pytest.raises((RuntimeError, ValueError)):
        meta(*kind.data())
    assert snapshot(model)[0] == before


def test_it_is_said_once_a_learner():
    kind = REFUSED["item"]
    support, query = kind.data()
    for _ in range(2):
        meta = learner(kind.build())
        with said_once():
            for _ in range(3):
                one_gradient(meta, support, query)
                meta.predict(meta.adapt(support), query[0])
        assert "one by one" in str(meta.report())
    kind = REFUSED["query only"]
    meta = learner(kind.build())
    with torch.no_grad():
        phi = meta.adapt(kind.data()[0])
        with said_once():
            meta.predict(phi, kind.data()[1][0])


def test_random_numbers_are_those_of_one_by_one():
    model = Net(lambda x, h: F.dropout(item(x, h), 0.5))
    support, query = vectors()
    accounts = []
    for batching in (None, LOOP):
        meta = learner(model, rule="unrolled", stochastic=True, batching=batching)
        torch.manual_seed(3)
        with said_once(batching is None):
            accounts.append((*of_library(meta, support, query), torch.rand(3)))
    for a, b in zip(*accounts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_an_error_of_the_models_own_is_that_error():
    support, query = vectors()
    for error in (ArithmeticError("mine"), RuntimeError("mine"), ValueError("mine")):

        def inside(x, h, error=error):
            raise error

        with said_once(0), pytest.raises(type(error), match="mine"):
            learner(Net(inside))(support, query)
    with said_once(0), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        learner(nn.Linear(4, 1))(support, query)


# -- threads -----------------------------------------------------------------------------------------


class Keeps(Net):
    """A list of layers and a bound method of itself."""

    def __init__(self):
        super().__init__()
        self.layers, self.go = [self.a, torch.tanh], self.run

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x):
        return self.b(self.go(x))


class Stores(Net):
    """A hook that closes over nothing; the attribute is its layer's own."""

    def __init__(self):
        super().__init__()
        self.a.register_forward_hook(lambda layer, args, out: setattr(layer, "kept", out))

    def forward(self, x):
        self.a(x)
        return self.b(self.a.kept.tanh())


def scan():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))


FOLLOW = {
    "plain": Kind(Net),
    "lists and methods": Kind(Keeps, Net),
    "a hook of a layer": Kind(Stores, Net, sets=("kept",)),
    "images": Kind(scan, data=images),
    "item": Kind(lambda: Net(item)),
}


@every_rule
@over(FOLLOW)
def test_copies_in_threads_follow(kind, rule):
    check(kind, rule, batching=iopt.Batching(chunk_size=1, threads=2))
    if kind is not FOLLOW["item"]:
        check(kind, rule, batching=THREADS)


def closes_over_itself():
    model = Net()
    model.inside = lambda x, h: model.a(x).tanh()
    return model


class StoresInItself(Net):
    def __init__(self):
        super().__init__()
        self.store = {}
        self.a.register_forward_hook(lambda m, args, out: self.store.__setitem__("f", out))

    def forward(self, x):
        self.a(x)
        return self.b(self.store["f"].tanh())


@pytest.mark.parametrize("make", [closes_over_itself, patched, StoresInItself])
def test_a_closure_cannot_follow_into_threads_and_says_so(make):
    support, query = vectors()
    with pytest.raises((RuntimeError, ValueError), match="threads"):
        one_gradient(learner(make(), batching=THREADS), support, query)


# -- two learners at once ----------------------------------------------------------------------------


def together(*jobs, seconds=60):
    """Run jobs in threads of their own; their errors are ours."""
    errors = []

    def safely(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=safely, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "the learners wait for each other"
    assert not errors, errors


OF = {"one module": lambda net: net, "a part of it": lambda net: net.b}


@pytest.mark.parametrize("batching", [None, LOOP, THREADS], ids=["default", "loop", "threads"])
@pytest.mark.parametrize("part", OF)
def test_two_learners_of_one_model_do_not_disturb_each_other(part, batching):
    net, (support, query) = Net(), vectors()
    other = learner(OF[part](net), rule="first order", batching=batching, lam=1.0)
    metas, calls = [learner(net, batching=batching), other], 8
    serial = [of_library(meta, support, query) for meta in metas]
    before, _alive = snapshot(net)
    results = [[], []]

    def job(meta, result):
        own = adapting_of(meta.model)
        return lambda: result.extend(of_library(meta, support, query, own) for _ in range(calls))

    together(*[job(m, r) for m, r in zip(metas, results, strict=True)])
    assert snapshot(net)[0] == before
    for expected, result in zip(serial, results, strict=True):
        assert len(result) == calls
        for ours in result:
            assert_equal(ours, expected, rtol=1e-12, atol=1e-14)
    theirs = Kind(Net).account("implicit", net, (support, query))
    assert_equal(serial[0], theirs)
