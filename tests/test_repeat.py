"""The same numbers again: run to run, after a restart, beside another thread."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from per_task import Recorder

VMAP, LOOP = iopt.Batching(), iopt.Batching(chunk_size=1)


def episodes(seed, shape=(3,)):
    """An episode that draws nothing from torch's own generator."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, n, *shape, generator=g), torch.randn(2, n, 1, generator=g)) for n in (6, 4)
    ]


def perceptron():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))


def normed():
    norm = nn.BatchNorm1d(5)
    return nn.Sequential(nn.Linear(3, 5), norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        h, _ = self.attention(x, x, x, need_weights=False)
        return self.head((x + h).mean(-2))


def learner(make, **settings):
    model = make()
    settings = {"solver": iopt.gd(lr=0.1, max_steps=3), "on_solve": iopt.Ignore()} | settings
    return iopt.MetaLearner(model, F.mse_loss, **settings)


RULES = {
    "implicit": {"meta_gradient": iopt.Implicit()},
    "to a tolerance": {"meta_gradient": iopt.Implicit(iopt.CG(rtol=1e-4))},
    "Gauss-Newton": {"meta_gradient": iopt.Implicit(curvature=iopt.GaussNewton)},
    "newton_cg": {"solver": iopt.newton_cg(max_steps=2)},
    "unrolled": {"meta_gradient": iopt.Unrolled()},
    "loop": {"batching": LOOP},
    "threads": {"batching": iopt.Batching(chunk_size=1, threads=2)},
}


@pytest.mark.parametrize("name", RULES)
def test_the_same_seed_gives_the_same_bits(name):
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        meta = learner(
            normed, stochastic=True, running_stats=iopt.RunningStats.PER_TASK, **RULES[name]
        )
        losses = meta(*episodes(0))
        losses.mean().backward()
        runs.append([losses, *(p.grad for p in meta.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(t.isfinite().all() for t in runs[0])


# -- a restart -------------------------------------------------------------------------------------


class Training:
    """Everything that a run consists of, and nothing else."""

    def __init__(self, policy):
        prox = iopt.Proximal(2.0, learned=True)
        make = perceptron if policy is None else normed
        self.meta = learner(make, lam=prox, stochastic=True, running_stats=policy)
        self.optimizer = torch.optim.Adam(self.meta.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=6)
        self.done = 0

    def step(self):
        self.optimizer.zero_grad()
        loss = self.meta(*episodes(self.done)).mean()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.done += 1
        return loss.detach()

    def save(self, path):
        parts = ("meta", "optimizer", "scheduler")
        state = {name: getattr(self, name).state_dict() for name in parts}
        torch.save(state | {"done": self.done, "random": torch.get_rng_state()}, path)

    def load(self, path):
        state = torch.load(path, weights_only=True)
        for name in ("meta", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.done = state["done"]
        torch.set_rng_state(state["random"])


@pytest.mark.parametrize("policy", [None, *iopt.RunningStats])
def test_a_run_that_was_stopped_ends_as_if_nothing_had_happened(policy, tmp_path):
    torch.manual_seed(1)
    whole = Training(policy)
    losses = [whole.step() for _ in range(6)]

    torch.manual_seed(1)
    first = Training(policy)
    again = [first.step() for _ in range(3)]
    first.save(tmp_path / "run.pt")
    torch.manual_seed(99)  # another process
    second = Training(policy)
    second.load(tmp_path / "run.pt")
    again += [second.step() for _ in range(3)]

    assert torch.equal(torch.stack(again), torch.stack(losses))
    one, two = whole.meta.state_dict(), second.meta.state_dict()
    assert one.keys() == two.keys() and "proximal.lam" in one
    assert all(torch.equal(t, two[k]) for k, t in one.items())
    assert one["proximal.lam"] != torch.tensor(2.0).log()  # it was learned
    assert whole.scheduler.get_last_lr() == second.scheduler.get_last_lr() != [0.01]


# -- another thread --------------------------------------------------------------------------------


def trained(meta, data, steps=12):
    """Parameters after every one of some meta-steps."""
    optimizer = torch.optim.SGD(meta.parameters(), lr=0.05)
    path = []
    for i in range(steps):
        optimizer.zero_grad()
        losses = meta(*data[i % len(data)])
        losses.mean().backward()
        optimizer.step()
        path.append([losses.detach(), *(p.detach().clone() for p in meta.parameters())])
    return path


PAIRS = {
    "attention, dropout with batch norm": (
        (Attention, (3, 4), {}),
        (normed, (3,), {"stochastic": True, "running_stats": iopt.RunningStats.PER_TASK}),
    ),
    "watched loop, dropout": (
        (lambda: nn.Linear(3, 1), (3,), {"batching": LOOP}),
        (perceptron, (3,), {"stochastic": True, "batching": LOOP}),
    ),
}


@pytest.fixture
def busy_threads():
    """Threads that take turns more often than they would."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", PAIRS)
def test_two_learners_in_two_threads_are_each_as_if_alone(name, busy_threads):
    """Only one of them draws: two would share the one generator, in an order that nobody knows."""
    metas, data, alone, beside = [], [], [], {}
    for make, shape, settings in PAIRS[name]:
        torch.manual_seed(2)
        metas.append(learner(make, **settings))
        data.append([episodes(seed, shape) for seed in range(3)])
        before = {k: t.clone() for k, t in metas[-1].state_dict().items()}
        torch.manual_seed(5)
        alone.append(trained(metas[-1], data[-1]))
        metas[-1].load_state_dict(before)

    ready = threading.Barrier(2)

    def work(i):
        ready.wait()
        beside[i] = trained(metas[i], data[i])

    torch.manual_seed(5)
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for ours, theirs in zip(beside[i], alone[i], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_two_learners_that_both_draw_do_not_disturb_each_other(batching, busy_threads):
    """Which seeds each of them gets is chance; but one meta-step still has one mask."""
    model, data = Recorder(), episodes(0)
    meta = learner(lambda: model, stochastic=True, batching=batching)
    other = learner(perceptron, stochastic=True)
    phi, done, masks = other.adapt(data[0]), threading.Event(), []

    def draw_all_the_time():
        while not done.is_set():
            other.predict(phi, data[1][0])

    thread = threading.Thread(target=draw_all_the_time, daemon=True)
    thread.start()
    try:
        for _ in range(30):
            meta(*data).mean().backward()
            masks.append(model.take(data[0][0]))
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(m, m[:1].expand_as(m)) for step in masks for m in step)
    assert len({bytes(m[0].numpy()) for step in masks for m in step}) == 60


def test_one_learner_in_two_threads_is_one_learner(busy_threads):
    """Parameters are put into the module for a moment, in which no other learner sees it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    meta = iopt.MetaLearner(model, F.mse_loss, solver=iopt.gd(lr=0.1, max_steps=10))
    batch = torch.randn(3, 5, 4), torch.randn(3, 5, 1)
    alone, before = meta(batch, batch).detach(), [p.clone() for p in model.parameters()]

    def work(_):
        return all(torch.equal(meta(batch, batch).detach(), alone) for _ in range(15))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2), timeout=100))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class Counting(nn.Linear):
    """Counts its calls in a buffer and multiplies by the count: another function at every call."""

    def __init__(self):
        super().__init__(4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.calls * super().forward(x)


@pytest.mark.parametrize("batching", [iopt.Batching(chunk_size=1), iopt.Batching(1, threads=2)])
def test_buffers_that_a_model_updates_are_left_alone(batching):
    """Every evaluation starts from the user's buffers, so that all are of the same function."""
    torch.manual_seed(0)
    counting, plain = Counting(), nn.Linear(4, 1)
    plain.load_state_dict(counting.state_dict(), strict=False)
    batch = torch.randn(3, 5, 4), torch.randn(3, 5, 1)
    results = []
    for model in (counting, plain):
        meta = iopt.MetaLearner(
            model, F.mse_loss, solver=iopt.gd(lr=0.1, max_steps=4), batching=batching
        )
        losses = meta(batch, batch)
        results.append((losses, *torch.autograd.grad(losses.sum(), list(model.parameters()))))
    assert counting.calls == 0
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
