"""A meta-step of every rule in plain torch: a loop over the tasks, dense algebra, an untouched model.

`account` uses nothing of the library. `check` holds a learner to it: its losses, its gradient, what it
adapts to and what it predicts, and that the user's module is afterwards what it was.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.utils import _pytree as pytree

import implicit_optim as iopt
from per_task import EXACT, flat

LR, STEPS, LAM = 0.1, 4, 2.0
RULES = {
    "implicit": EXACT,
    "unrolled": iopt.Unrolled(),
    "truncated": iopt.Truncated(2),
    "first order": iopt.FirstOrder(),
    "reptile": iopt.Reptile(),
}
every_rule = pytest.mark.parametrize("rule", RULES)
BATCH, FROZEN, PER_TASK = iopt.RunningStats
VMAP, LOOP, THREADS = (
    iopt.Batching(),
    iopt.Batching(chunk_size=1),
    iopt.Batching(chunk_size=1, threads=2),
)
FEW = {"rtol": 1e-8, "atol": 1e-10}


class Account(NamedTuple):
    """Query losses `[T]`, the gradient of their mean, phi `[T, n]`, outputs for the query inputs."""

    losses: Tensor
    gradient: Tensor
    phi: Tensor
    outputs: Tensor


# -- the oracle --------------------------------------------------------------------------------------


def task(episode, i):
    """One task of an episode: inputs (dictionaries too) and a target."""
    return pytree.tree_map(lambda t: t[i], tuple(episode))


def account(rule, output, theta, episodes, loss=F.mse_loss, lam=LAM, lr=LR, steps=STEPS):
    """What `rule` gives for `output(phi, inputs, support inputs or None) -> output of one task`."""
    support, query = episodes
    count = len(pytree.tree_leaves(support)[0])
    begin = {"unrolled": 0, "truncated": steps - 2}.get(rule, steps)  # first step with a graph
    losses, gradient, phis, outputs = [], torch.zeros_like(theta), [], []
    for (*x, y), (*xq, yq) in [(task(support, i), task(query, i)) for i in range(count)]:
        anchor = theta.detach().requires_grad_()
        fit = lambda phi, x=x, y=y: loss(output(phi, x, None), y)  # noqa: E731
        phi = anchor.clone()
        for k in range(steps + 1):
            if 0 < begin and k <= begin:
                phi = phi.detach().requires_grad_()
            if k < steps:
                (slope,) = grad(fit(phi), phi, create_graph=k >= begin)
                phi = phi - lr * (slope + lam * (phi - anchor))
        out = output(phi, xq, x)
        value = loss(out, yq)
        if rule in ("unrolled", "truncated"):
            (g,) = grad(value, anchor)
        elif rule == "reptile":
            g = (anchor - phi).detach()
        else:
            (g,) = grad(value, phi, retain_graph=True)
        if rule == "implicit":
            H = torch.autograd.functional.hessian(fit, phi.detach())
            g = lam * torch.linalg.solve(H + lam * torch.eye(len(H), dtype=H.dtype), g)
        gradient += g / count
        losses.append(value.detach())
        phis.append(phi.detach())
        outputs.append(out.detach())
    return Account(torch.stack(losses), gradient, torch.stack(phis), torch.stack(outputs))


def by_module(model):
    """`output` of a module, by `functional_call` with copies of its buffers."""
    _, by_name = flat(model)

    def output(phi, inputs, of=None):
        state = {k: b.clone() for k, b in model.named_buffers()} | by_name(phi)
        keywords = isinstance(inputs[0], dict)
        args = ((), inputs[0]) if keywords else (tuple(inputs),)
        return functional_call(model, state, *args)

    return output


# -- kinds of models ---------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Three numbers in, one out; what a kind is about is in `forward`, or in the layers."""

    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = nn.Linear(3, width), nn.Linear(width, 1)

    def hidden(self, x):
        return self.a(x).tanh()

    def forward(self, x):
        return self.b(self.hidden(x))


def sequential(width=4, outputs=1):
    """The same in torch's words: parameters in the same order."""
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs))


def patched():
    """Its `forward` is an attribute of its own, which closes over it."""
    model = Perceptron()
    model.forward = lambda x: model.b(model.a(x).tanh())
    return model


def vectors(n_in=3, tasks=2, support=5, query=4):
    return [(torch.randn(tasks, n, n_in), torch.randn(tasks, n, 1)) for n in (support, query)]


def images(channels=1, size=4, tasks=2, support=4, query=3):
    shape = (channels, size, size)
    return [(torch.randn(tasks, n, *shape), torch.randn(tasks, n, 1)) for n in (support, query)]


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        make: builds it.
        plain: builds another with the same parameters in the same order, for the oracle; by default the
            oracle calls one that `make` builds.
        output: the oracle's function, where no module of torch is right.
        data: `() -> (support, query)`.
        loss: of one task.
        sets: attributes that it sets itself when it is called.
        loops: whether vmap refuses it.
    """

    make: Callable[[], nn.Module]
    plain: Callable[[], nn.Module] | None = None
    output: Callable[..., Tensor] | None = None
    data: Callable[[], Any] = vectors
    loss: Callable[..., Tensor] = F.mse_loss
    sets: tuple[str, ...] = ()
    loops: bool = False

    def build(self):
        torch.manual_seed(1)
        return self.make()

    def account(self, rule, model, episodes, **settings):
        """The oracle's, at the parameters of `model`."""
        output = self.output
        if output is None:
            torch.manual_seed(1)
            output = by_module((self.plain or self.make)())
        return account(rule, output, flat(model)[0], episodes, self.loss, **settings)


def over(kinds, *names):
    return pytest.mark.parametrize("kind", [kinds[n] for n in names or kinds], ids=names or kinds)


# -- the library -------------------------------------------------------------------------------------


def learner(model, loss=F.mse_loss, rule="implicit", **settings):
    solver = iopt.gd(lr=LR, max_steps=STEPS)
    settings = {"solver": solver, "lam": LAM, "meta_gradient": RULES[rule]} | settings
    return iopt.MetaLearner(model, loss, **settings)


def adapting_of(model):
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def one_gradient(meta, support, query):
    meta(support, query).mean().backward()


def of_library(meta, support, query, adapting=None):
    """The learner's account of a meta-step; `adapting` where the model is in use elsewhere."""
    adapting = adapting or adapting_of(meta.model)
    losses = meta(support, query)
    gradients = torch.autograd.grad(losses.mean(), list(adapting.values()))
    with torch.no_grad():
        phi = meta.adapt(support)
        outputs = meta.predict(phi, *query[:-1])
    return Account(
        losses.detach(),
        torch.cat([g.reshape(-1) for g in gradients]),
        torch.cat([phi[k].reshape(len(losses), -1) for k in adapting], 1),
        outputs,
    )


def assert_equal(ours, theirs, **tolerances):
    for name, a, b in zip(Account._fields, ours, theirs, strict=True):
        say = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(a, b, **(tolerances or FEW), msg=say)


def snapshot(model, sets=()):
    """All about a module and those below that calling it must not change, and what keeps it alive."""
    facts, alive = {}, []

    def of_value(value):
        alive.append(value)
        if isinstance(value, Tensor):
            strides = value.stride() if value.layout == torch.strided else None
            state = (
                value._version,
                strides,
                value.requires_grad,
                value.is_leaf,
                value.grad is None,
            )
            return id(value), type(value), state
        if isinstance(value, (list, tuple)):
            return [of_value(v) for v in value]
        if isinstance(value, dict):
            return id(value), [(k, of_value(v)) for k, v in value.items()]
        return id(value)

    for name, module in model.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(module).items() if k not in sets}
        facts[name] = (id(module), type(module), {k: of_value(v) for k, v in own.items()})
    facts["values"] = [t.detach().to_dense().tolist() for t in model.state_dict().values()]
    return facts, alive


@contextlib.contextmanager
def said_once(times=1):
    """That the tasks are gone through one by one is said this often, and nothing else is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [w for w in caught if "one by one" in str(w.message)]
    assert len(found) == times and all(w.category is UserWarning for w in found)
    for w in caught:  # torch may say that its own loop under vmap is slow
        if w not in found and "performance drop" not in str(w.message):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def check(kind, rule="implicit", *, lam=LAM, tolerances=None, **settings):
    """Hold a learner of this kind of model to the oracle, and its module to what it was."""
    model = kind.build()
    torch.manual_seed(2)
    support, query = kind.data()
    meta = learner(model, kind.loss, rule, lam=lam, **settings)
    before, _alive = snapshot(model, kind.sets)
    falls_back = kind.loops and settings.get("batching") is None
    with said_once() if falls_back else contextlib.nullcontext():
        ours = of_library(meta, support, query)
    assert snapshot(model, kind.sets)[0] == before
    assert ("one by one" in str(meta.report())) == falls_back
    theirs = kind.account(rule, model, (support, query), lam=lam)
    assert_equal(ours, theirs, **(tolerances or {}))
    assert (theirs.phi - flat(model)[0]).abs().max() > 1e-3  # it adapts at all
    return meta, (support, query), ours
