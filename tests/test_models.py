"""Attention, recurrent nets, dictionaries, several inputs: meta-gradients against a dense oracle."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from per_task import EXACT, NEWTON, assert_same, expected, flat, implicit_maml, learned, tasks_of

VMAP, LOOP = iopt.Batching(), iopt.Batching(chunk_size=1)
LAM = 6.0
SWITCHES = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "mem_efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}

pytestmark = pytest.mark.usefixtures("double")


def switches():
    """Every switch of torch's for kernels that the library touches."""
    kernels = {k: getattr(torch.backends.cuda, f"{k}_sdp_enabled")() for k in SWITCHES}
    kernels["fast path"] = torch.backends.mha.get_fastpath_enabled()
    libraries = {"cudnn library": torch.backends.cudnn, "mkldnn": torch.backends.mkldnn}
    return kernels | {k: library.enabled for k, library in libraries.items()}


@pytest.fixture(autouse=True)
def switches_are_left_alone():
    before = switches()
    yield
    assert switches() == before


def learner(model, loss=F.mse_loss, **settings):
    settings = {"solver": NEWTON, "meta_gradient": EXACT, "lam": LAM} | settings
    return iopt.MetaLearner(model, loss, **settings)


def sequences(tasks=2, outputs=1, dtype=None):
    def batch(n):
        x, y = torch.randn(tasks, n, 3, 2), torch.randn(tasks, n, outputs)
        return x.to(dtype), y.to(dtype)

    return batch(3), batch(2)


# -- attention -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One head by torch's fused function, as it is called by default."""

    def __init__(self, causal=False):
        super().__init__()
        self.project, self.head, self.causal = nn.Linear(2, 6), nn.Linear(2, 1), causal

    def forward(self, x):
        q, k, v = self.project(x).unsqueeze(-3).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(h.squeeze(-3).tanh().mean(-2))


class Block(nn.Module):
    """A transformer block with `nn.MultiheadAttention`."""

    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(2), nn.Linear(2, 1)
        self.need_weights = need_weights

    def forward(self, x):
        h, _ = self.attention(x, x, x, need_weights=self.need_weights)
        return self.head(self.norm(x + h).tanh().mean(-2))


def softmax_attention(q, k, v, causal=False):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def attention_by_hand(p, x, causal):
    q, k, v = (x @ p["project.weight"].T + p["project.bias"]).chunk(3, -1)
    h = softmax_attention(q, k, v, causal)
    return h.tanh().mean(-2) @ p["head.weight"].T + p["head.bias"]


def block_by_hand(p, x):
    q, k, v = (x @ p["attention.in_proj_weight"].T + p["attention.in_proj_bias"]).chunk(3, -1)
    heads = [softmax_attention(q[..., [i]], k[..., [i]], v[..., [i]]) for i in range(2)]
    h = torch.cat(heads, -1) @ p["attention.out_proj.weight"].T + p["attention.out_proj.bias"]
    h = x + h
    h = h - h.mean(-1, keepdim=True)
    h = h / ((h**2).mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    return h.tanh().mean(-2) @ p["head.weight"].T + p["head.bias"]


ATTENTION = {
    "attention": (lambda: Attention(), lambda p, x: attention_by_hand(p, x, False)),
    "causal": (lambda: Attention(True), lambda p, x: attention_by_hand(p, x, True)),
    "block": (lambda: Block(False), block_by_hand),
    "block with weights": (lambda: Block(True), block_by_hand),
}


@pytest.mark.parametrize(
    "name, batching, train",
    [
        *((name, batching, True) for name in ATTENTION for batching in (VMAP, LOOP)),
        ("block", VMAP, False),  # where torch would take a path of its own for inference
        ("block with weights", LOOP, False),
    ],
)
def test_attention_with_the_default_kernels(name, batching, train):
    make, by_hand = ATTENTION[name]
    model, (support, query) = make().train(train), sequences()
    theta, by_name = flat(model)
    fit = lambda phi, batch: F.mse_loss(by_hand(by_name(phi), batch[0]), batch[1])  # noqa: E731
    theirs = implicit_maml(
        fit, lambda phi, _, batch: fit(phi, batch), theta, LAM, tasks_of(support, query)
    )
    assert_same(learned(learner(model, batching=batching), support, query), theirs)


@pytest.mark.parametrize("off", SWITCHES)
def test_the_users_choice_of_kernels_is_put_back(off):
    kernel = SWITCHES[off]
    kernel(False)
    try:
        chosen = switches()
        meta = learner(Attention(), solver=iopt.gd(lr=0.1, max_steps=2), on_solve=iopt.Ignore())
        support, query = sequences()
        losses = meta(support, query)
        assert switches() == chosen
        losses.mean().backward()
        assert switches() == chosen
    finally:
        kernel(True)


@pytest.mark.parametrize("model", [Attention, lambda: Recurrent(nn.LSTM)])
def test_kernels_are_put_back_when_something_fails(model):
    """The n-th call of the loss fails, for every n that a meta-step has."""
    support, query = sequences()
    before, fails_at = switches(), 0
    while True:
        fails_at += 1
        calls = []

        def loss(output, target, calls=calls, fails_at=fails_at):
            calls.append(None)
            if len(calls) == fails_at:
                raise ArithmeticError("on purpose")
            return F.mse_loss(output, target)

        meta = learner(model(), loss, solver=iopt.gd(lr=0.1, max_steps=2), batching=LOOP)
        meta.on_solve = iopt.Ignore()
        if fails_at > 10:
            break
        with pytest.raises(ArithmeticError):
            meta(support, query).mean().backward()
            assert len(calls) < fails_at
            raise ArithmeticError("a meta-step has no more calls than that")
        assert switches() == before


def test_unrolled_attention_is_plain_autograd_by_hand():
    model, (support, query) = Attention(), sequences()
    few = {"solver": iopt.gd(lr=0.1, max_steps=3), "meta_gradient": iopt.Unrolled()}
    ours = learned(learner(model, **few), support, query)
    theta, by_name = flat(model)
    theta.requires_grad_()
    losses = []
    for task, asked in tasks_of(support, query):
        fit = lambda phi, b: F.mse_loss(attention_by_hand(by_name(phi), b[0], False), b[1])  # noqa: E731
        phi = theta
        for _ in range(3):
            value = fit(phi, task) + LAM / 2 * ((phi - theta) ** 2).sum()
            phi = phi - 0.1 * torch.autograd.grad(value, phi, create_graph=True)[0]
        losses.append(fit(phi, asked))
    losses = torch.stack(losses)
    theirs = (losses.detach(), torch.autograd.grad(losses.mean(), theta)[0])
    assert_same(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", [Attention, lambda: Recurrent(nn.LSTM)])
def test_two_threads_throw_the_switches_together(model):
    """Each gets what it would get alone; afterwards everything is as it was."""
    support, query = sequences()
    few = {"solver": iopt.gd(lr=0.1, max_steps=2), "on_solve": iopt.Ignore(), "batching": LOOP}
    results, before = {}, switches()

    def work(name, meta):
        results[name] = [
            learned(learner(meta.model, **few, meta_gradient=rule), support, query)
            for _ in range(5)
            for rule in (iopt.Implicit(), iopt.FirstOrder())
        ]

    one, two = learner(model(), **few), learner(model(), **few)
    work("one alone", one)
    work("two alone", two)
    threads = [
        threading.Thread(target=work, args=pair, daemon=True)
        for pair in (("one", one), ("two", two))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert switches() == before
    for name in ("one", "two"):
        for ours, alone in zip(results[name], results[f"{name} alone"], strict=True):
            assert_same(ours, alone, rtol=1e-12, atol=1e-14)


# -- recurrent nets --------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, hidden=2, **settings):
        super().__init__()
        self.cells = kind(2, hidden, batch_first=True, **settings)
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


RECURRENT = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "two ways": lambda: Recurrent(nn.GRU, hidden=1, bidirectional=True),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_nets_task_by_task(name):
    model, (support, query) = RECURRENT[name](), sequences()
    theirs = expected(model, F.mse_loss, LAM, support, query)
    assert_same(learned(learner(model, batching=LOOP), support, query), theirs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_nets_in_threads(kind):
    """`nn.LSTM` keeps its weights in a second place, which threads must not share."""
    model, (support, query) = Recurrent(kind), sequences(tasks=8)
    few = {"solver": iopt.gd(lr=0.1, max_steps=8), "on_solve": iopt.Ignore()}
    alone = learned(learner(model, batching=LOOP, **few), support, query)
    for _ in range(4):
        threads = iopt.Batching(chunk_size=1, threads=4)
        together = learned(learner(model, batching=threads, **few), support, query)
        assert_same(together, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_nets_in_single_precision(kind):
    """There torch has fused kernels, which have no second derivative."""
    model, (support, query) = Recurrent(kind), sequences()
    exact = expected(model, F.mse_loss, LAM, support, query)
    single = {
        "solver": iopt.newton_cg(max_steps=5),
        "meta_gradient": iopt.Implicit(iopt.CG(max_steps=20)),
    }
    meta = learner(model.float(), batching=LOOP, **single)
    ours = learned(meta, *(tuple(t.float() for t in e) for e in (support, query)))
    assert_same([t.double() for t in ours], exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_nets_under_vmap_name_the_remedy(kind):
    support, query = sequences()
    with pytest.raises(
        RuntimeError, match=r"cannot be batched .*batching=iopt\.Batching\(chunk_size=1\)"
    ):
        learner(Recurrent(kind), batching=VMAP)(support, query)


@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
@pytest.mark.parametrize("rule", [iopt.Implicit, iopt.FirstOrder, iopt.Unrolled])
def test_loop_is_vmap(rule, curvature):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2))
    support, query = sequences(outputs=2)
    few = {"solver": iopt.gd(lr=0.1, max_steps=5), "on_solve": iopt.Ignore()}
    few["meta_gradient"] = iopt.Implicit(curvature=curvature) if rule is iopt.Implicit else rule()
    ours, theirs = (
        learned(learner(model, batching=b, **few), support, query) for b in (LOOP, VMAP)
    )
    assert_same(ours, theirs, rtol=1e-12, atol=1e-13)
