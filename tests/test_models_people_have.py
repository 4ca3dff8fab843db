"""Models as people have them, held to dense algebra, finite differences or a plain torch loop."""

import copy
import dataclasses

import pytest
import torch
import torch.export
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import implicit_optim as iopt
from per_task import (
    CLOSE,
    EXACT,
    NEWTON,
    assert_same,
    expected,
    flat,
    implicit_maml,
    learned,
    minimiser,
    slope_along,
    tasks_of,
)

VMAP, LOOP = iopt.Batching(), iopt.Batching(chunk_size=1)
LAM = 8.0

pytestmark = pytest.mark.usefixtures("double")


def learner(model, loss, **settings):
    settings = {"solver": NEWTON, "meta_gradient": EXACT, "lam": LAM} | settings
    return iopt.MetaLearner(model, loss, **settings)


def end_to_end(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def adapted(meta, support):
    """Where the library arrives, task by task: dense algebra that begins there is sooner done."""
    with torch.no_grad():
        phi = meta.adapt(support)
    return [end_to_end(p[i] for p in phi.values()) for i in range(len(support[0]))]


# -- a transformer with dropout --------------------------------------------------------------------


class Encoder(nn.Module):
    """Dropout in four places: the attention weights, its output, and twice in the feed-forward part."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(2, 4), nn.Linear(4, 1)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.3, "gelu", batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)).mean(-2))


def sequences():
    return [(torch.randn(2, n, 3, 2), torch.randn(2, n, 1)) for n in (4, 3)]


def test_a_transformer_in_training_mode_against_dense_solves_with_the_same_masks():
    """The loop over tasks is the user's, and the query set is seen in eval mode."""
    model, episodes, seed = Encoder(), sequences(), 5
    quiet = copy.deepcopy(model).eval()
    tasks, parameters = tasks_of(*episodes), dict(model.named_parameters())
    predict = lambda phi, x: functional_call(model, phi, (x,))  # noqa: E731
    objective = iopt.Objective(predict, F.mse_loss, iopt.proximal)
    losses, found = [], []
    for support, (x, y) in tasks:
        theta = (parameters, torch.tensor(LAM))
        start = {k: p.detach() for k, p in parameters.items()}
        phi = iopt.minimize(objective, start, theta, *support, solver=NEWTON, seed=seed).value
        exact = EXACT.linear_solver
        phi = iopt.attach(phi, objective, theta, *support, linear_solver=exact, seed=seed)
        losses.append(F.mse_loss(functional_call(quiet, phi, (x,)), y))
        found.append(end_to_end(phi.values()))
    losses = torch.stack(losses)
    gradient = end_to_end(torch.autograd.grad(losses.mean(), list(parameters.values())))
    anchor, by_name = flat(model)

    def inner(phi, support, model=model):
        torch.manual_seed(seed)
        return F.mse_loss(functional_call(model, by_name(phi), support[:1]), support[1])

    def outer(phi, _, query):
        return inner(phi, query, quiet)

    with sdpa_kernel(SDPBackend.MATH):
        assert_same((losses, gradient), implicit_maml(inner, outer, anchor, LAM, tasks, found))
    values = [inner(found[0], tasks[0][0], net) for net in (model, quiet)]
    assert (values[0] - values[1]).abs() > 1e-3  # the masks matter


@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_a_transformer_in_training_mode_against_finite_differences(batching):
    meta = learner(Encoder(), F.mse_loss, stochastic=True, batching=batching)
    support, query = sequences()
    torch.manual_seed(7)
    _, gradient = learned(meta, support, query)
    direction = torch.randn_like(gradient)
    slope = slope_along(meta, support, query, direction, seed=7)
    torch.testing.assert_close(gradient @ direction, slope, rtol=1e-6, atol=1e-9)


# -- forward(input_ids, attention_mask, labels) -> an object with logits ---------------------------


@dataclasses.dataclass
class ClassifierOutput:
    """What models of text return: unused fields are `None`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    attentions: torch.Tensor | None = None


@dataclasses.dataclass
class Unregistered(ClassifierOutput):
    pass


torch.export.register_dataclass(ClassifierOutput)


class TextClassifier(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.words = kind, nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.classifier = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        h, padding = self.words(input_ids), None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        padding = attention_mask == 0
        h = h + self.attention(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        share = attention_mask / attention_mask.sum(-1, keepdim=True)
        logits = self.classifier((h.tanh() * share.unsqueeze(-1)).sum(-2))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self.kind(loss=loss, logits=logits, attentions=None)


def texts():
    def batch(n):
        ids, length = torch.randint(0, 7, (2, n, 4)), torch.randint(2, 5, (2, n, 1))
        return ids, (torch.arange(4) < length).long(), torch.randint(0, 3, (2, n))

    return batch(5), batch(4)


def read_logits(output, target):
    logits = output["logits"] if isinstance(output, dict) else output.logits
    return F.cross_entropy(logits, target)


OUTPUTS = {"dict": dict, "registered": ClassifierOutput, "unregistered": Unregistered}


@pytest.mark.parametrize("batching", [VMAP, LOOP])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_loss_that_reads_the_logits(kind, batching):
    model, (support, query) = TextClassifier(OUTPUTS[kind]), texts()
    meta = learner(model, read_logits, batching=batching)
    found = adapted(meta, support)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = expected(model, read_logits, LAM, support, query, found)
    assert_same(learned(meta, support, query), theirs)


def gauss_newton_maml(model, support, query, starts):
    """Like `implicit_maml`, with ``J^T H_out J + lam I`` of the logits as the matrix."""
    theta, by_name = flat(model)
    losses, gradient = [], torch.zeros_like(theta)
    tasks = tasks_of(support, query)
    for ((*inputs, y), (*asked, answer)), start in zip(tasks, starts, strict=True):

        def logits(phi, inputs):
            output = functional_call(model, by_name(phi), tuple(inputs))
            return output["logits"] if isinstance(output, dict) else output.logits

        def inner(phi, inputs=inputs, y=y):
            near = ((phi - theta) ** 2).sum()
            return F.cross_entropy(logits(phi, inputs), y) + LAM / 2 * near

        phi = minimiser(inner, start).requires_grad_()
        loss = F.cross_entropy(logits(phi, asked), answer)
        (v,) = torch.autograd.grad(loss, phi)
        phi = phi.detach()
        J = jacrev(logits)(phi, inputs).reshape(-1, theta.numel())
        z = logits(phi, inputs)
        H = hessian(lambda z, y=y: F.cross_entropy(z, y))(z).reshape(z.numel(), z.numel())
        matrix = J.T @ H @ J + LAM * torch.eye(theta.numel())
        gradient += LAM * torch.linalg.solve(matrix, v) / len(support[0])
        losses.append(loss.detach())
    return torch.stack(losses), gradient


@pytest.mark.parametrize("batching", [VMAP, LOOP])
@pytest.mark.parametrize("kind", ["dict", "registered"])
def test_gauss_newton_of_the_logits(kind, batching):
    """Fields that are `None` have no part in the matrix."""
    model, (support, query) = TextClassifier(OUTPUTS[kind]), texts()
    rule = iopt.Implicit(EXACT.linear_solver, iopt.GaussNewton)
    meta = learner(model, read_logits, meta_gradient=rule, batching=batching)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = gauss_newton_maml(model, support, query, adapted(meta, support))
    ours = learned(meta, support, query)
    assert_same(ours, theirs)
    _, exact = learned(learner(model, read_logits, batching=batching), support, query)
    assert (ours[1] - exact).norm() > 1e-4 * exact.norm()  # another matrix, indeed


@pytest.mark.parametrize("batching", [VMAP, LOOP])
@pytest.mark.parametrize("kind", ["dict", "registered"])
def test_predict_returns_what_the_model_returns(kind, batching):
    model, (support, query) = TextClassifier(OUTPUTS[kind]), texts()
    meta = learner(model, read_logits, batching=batching)
    ids, mask, _ = query
    with torch.no_grad():
        phi = meta.adapt(support)
        output = meta.predict(phi, ids, mask)
        alone = [
            functional_call(model, {k: p[i] for k, p in phi.items()}, (ids[i], mask[i]))
            for i in range(2)
        ]
    assert type(output) is OUTPUTS[kind]
    output, *alone = (o if kind == "dict" else vars(o) for o in (output, *alone))
    assert output["loss"] is None and output["attentions"] is None
    logits = torch.stack([o["logits"] for o in alone])
    torch.testing.assert_close(output["logits"], logits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_a_class_that_torch_cannot_take_apart_is_an_error_that_says_so(batching):
    model, (support, query) = TextClassifier(Unregistered), texts()
    rule = iopt.Implicit(iopt.CG(max_steps=2), iopt.GaussNewton)
    meta = learner(model, read_logits, meta_gradient=rule, batching=batching)
    remedy = r"output holds .* Unregistered: .*register_dataclass\(Unregistered\) once"
    with pytest.raises(TypeError, match=remedy):
        meta(support, query).mean().backward()
    with torch.no_grad(), pytest.raises(TypeError, match=remedy):
        meta.predict(meta.adapt(support), *query[:2])


# -- adapters in a frozen network ------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen linear layer plus ``up @ down`` of low rank, which starts at zero."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 2)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def with_adapters():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))
    for i in (0, 2, 4):
        model[i] = LowRank(model[i], rank=1)
    return model


def regression(n_in=6):
    return [(torch.randn(2, n, n_in), torch.randn(2, n, 1)) for n in (5, 4)]


@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_only_the_adapters_adapt_and_learn(batching):
    model, (support, query) = with_adapters(), regression()
    before = {k: (t.clone(), t._version) for k, t in model.state_dict(keep_vars=True).items()}
    meta = learner(model, F.mse_loss, batching=batching)
    assert_same(learned(meta, support, query), expected(model, F.mse_loss, LAM, support, query))

    meta(support, query).mean().backward()
    adapters = {f"{i}.{side}" for i in (0, 2, 4) for side in ("down", "up")}
    assert {k for k, p in model.named_parameters() if p.grad is not None} == adapters
    assert model[0].up.grad.norm() > 0
    after = model.state_dict(keep_vars=True)
    assert all(torch.equal(after[k], t) and after[k]._version == v for k, (t, v) in before.items())


def test_phi_is_as_large_as_the_adapters():
    """Not so much as one number a task of the frozen layers, in the solution or in what is kept."""
    model, (support, query) = with_adapters(), regression()
    adapters = (6 + 8) + (8 + 5) + (5 + 1)
    assert sum(p.numel() for p in model.parameters()) > 4 * adapters
    sizes = []
    meta = learner(model, F.mse_loss, on_solve=lambda _, found: sizes.append(found.value.shape))
    meta(support, query).mean().backward()
    assert sizes == [(2, adapters), (2, adapters)]
    phi = meta.adapt(support)
    assert sum(p.numel() for p in phi.values()) == 2 * adapters


def test_the_base_learns_without_adapting():
    """As a part of theta: through the inner problem and through the query loss; dense oracle."""
    model, (support, query) = with_adapters(), regression()
    theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    base = {k: p for k, p in theta.items() if "base" in k}
    anchor = {k: p for k, p in theta.items() if "base" not in k}
    lam = torch.tensor(LAM)

    def objective(phi, theta, x, y):
        anchor, base = theta
        fit = F.mse_loss(functional_call(model, phi | base, (x,)), y)
        return fit + iopt.proximal(phi, (anchor, lam))

    def plain(tree):
        return {k: p.detach() for k, p in tree.items()}

    start = {k: p.expand(2, *p.shape) for k, p in plain(anchor).items()}
    fixed = (plain(anchor), plain(base))
    common = {"batch_ndim": 1}
    phi = iopt.minimize(objective, start, fixed, *support, solver=NEWTON, **common).value
    exact = EXACT.linear_solver
    phi = iopt.attach(phi, objective, (anchor, base), *support, linear_solver=exact, **common)
    losses = torch.stack([
        F.mse_loss(functional_call(model, {k: p[i] for k, p in phi.items()} | base, (x,)), y)
        for i, (x, y) in enumerate(zip(*query, strict=True))
    ])  # fmt: skip
    ours = end_to_end(torch.autograd.grad(losses.mean(), [*anchor.values(), *base.values()]))

    of_anchor, by_name = flat(model)
    for p in model.parameters():
        p.requires_grad_(not p.requires_grad)
    of_base, base_by_name = flat(model)
    theirs, theirs_base, values = 0, 0, []
    for (x, y), (xq, yq) in tasks_of(support, query):

        def fit(phi, base, x, y):
            return F.mse_loss(functional_call(model, by_name(phi) | base_by_name(base), (x,)), y)

        def inner(phi, base=of_base, x=x, y=y):
            return fit(phi, base, x, y) + LAM / 2 * ((phi - of_anchor) ** 2).sum()

        found = minimiser(inner, of_anchor)
        values.append(fit(found, of_base, xq, yq))
        w = torch.linalg.solve(hessian(inner)(found), jacrev(fit)(found, of_base, xq, yq))
        mixed = jacrev(jacrev(inner), argnums=1)(found, of_base)
        theirs = theirs + LAM * w / 2
        theirs_base = theirs_base + (jacrev(fit, 1)(found, of_base, xq, yq) - mixed.T @ w) / 2
    torch.testing.assert_close(losses.detach(), torch.stack(values), **CLOSE)
    torch.testing.assert_close(ours, torch.cat([theirs, theirs_base]), **CLOSE)
