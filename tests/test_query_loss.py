"""Query losses that bring their gradient along: the numbers, and the graph, of plain autograd.

The oracles are a loop in plain torch, finite differences, and `Batching()`: one call for all tasks,
whose losses autograd records.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from memory import PeakMemory

CHUNKED = {
    "task by task": iopt.Batching(chunk_size=1),
    "in threads": iopt.Batching(chunk_size=1, threads=2),
    "two at a time": iopt.Batching(chunk_size=2),
}
RULES = [iopt.Implicit(), iopt.Unrolled(), iopt.FirstOrder()]


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Softplus(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2 * 3 * 3, 2)).double()


def episode(tasks=3):
    x = torch.randn(tasks, 4, 1, 5, 5, dtype=torch.float64)
    return x, torch.tensor([[0, 1, 1, 0]] * tasks)


def learner(model, batching, loss=F.cross_entropy, rule=None):
    return iopt.MetaLearner(
        model,
        loss,
        solver=iopt.gd(lr=0.1, max_steps=3),
        lam=2.0,
        meta_gradient=rule or iopt.Implicit(iopt.CG(max_steps=3)),
        batching=batching,
        on_solve=iopt.Ignore(),
    )


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("batching", CHUNKED.values(), ids=CHUNKED)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_losses_and_meta_gradient(batching, rule):
    model = network()
    support, query, weight = episode(), episode(), torch.tensor([1.0, -2.0, 3.0]).double()

    def run(batching):
        losses = learner(model, batching, rule=rule)(support, query)
        return losses.detach(), flat(torch.autograd.grad(losses @ weight, model.parameters()))

    for ours, plain in zip(run(batching), run(iopt.Batching()), strict=True):
        assert relative_error(ours, plain) < 1e-12


@pytest.mark.parametrize("batching", CHUNKED.values(), ids=CHUNKED)
def test_a_loop_in_plain_torch(batching):
    model = network()
    support, query, weight = episode(), episode(), torch.tensor([1.0, -2.0, 3.0]).double()
    names, theta = zip(*model.named_parameters(), strict=True)

    def loss(phi, x, y):
        state = dict(zip(names, phi, strict=True))
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

    losses, gradient = [], 0
    for x, y, xq, yq, factor in zip(*support, *query, weight, strict=True):
        phi = [t.detach().clone().requires_grad_() for t in theta]
        for _ in range(3):
            near = sum((p - t.detach()).square().sum() for p, t in zip(phi, theta, strict=True))
            slopes = torch.autograd.grad(loss(phi, x, y) + near, phi)  # lam / 2 = 1
            steps = zip(phi, slopes, strict=True)
            phi = [(p - 0.1 * g).detach().requires_grad_() for p, g in steps]
        losses.append(loss(phi, xq, yq))
        gradient = gradient + factor * flat(torch.autograd.grad(losses[-1], phi))
    ours = learner(model, batching, rule=iopt.FirstOrder())(support, query)
    assert relative_error(ours, torch.stack(losses)) < 1e-12
    assert relative_error(flat(torch.autograd.grad(ours @ weight, theta)), gradient) < 1e-12


def test_the_second_backward_is_a_finite_difference_of_the_first():
    model, support, query = network(), episode(), episode()
    theta = list(model.parameters())
    along = [torch.randn_like(p) for p in theta]

    def gradient(create_graph=False):
        losses = learner(model, CHUNKED["in threads"], rule=iopt.Unrolled())(support, query)
        return torch.autograd.grad(losses.square().sum(), theta, create_graph=create_graph)

    product = flat(torch.autograd.grad(gradient(create_graph=True), theta, along))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(theta, along, strict=True):
                p += step * d
        ends.append(flat(gradient()))
    assert relative_error(product, (ends[0] - ends[1]) / 2e-5) < 1e-7


def test_derivatives_of_the_meta_gradient():
    """A product with the Hessian of the meta-loss, through the second backward."""
    model = network()
    support, query = episode(), episode()

    def product(batching):
        losses = learner(model, batching)(support, query)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(losses.square().sum(), parameters, create_graph=True)
        along = flat(grads) @ torch.linspace(-1, 1, flat(grads).numel(), dtype=torch.float64)
        return flat(torch.autograd.grad(along, parameters))

    assert relative_error(product(CHUNKED["in threads"]), product(iopt.Batching())) < 1e-10


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, output, y):
        return F.cross_entropy(self.scale.exp() * output, y)


def test_a_loss_with_parameters_of_its_own_gets_their_gradient():
    """They are no part of phi: autograd records the losses, as it does without chunks."""
    model, loss = network(), Scaled()
    support, query = episode(), episode()
    grads = []
    for batching in (CHUNKED["in threads"], iopt.Batching()):
        losses = learner(model, batching, loss, iopt.FirstOrder())(support, query)
        grads.append(flat(torch.autograd.grad(losses.sum(), [loss.scale, *model.parameters()])))
    assert grads[1][0] != 0
    assert relative_error(*grads) < 1e-12


def test_learned_queries_get_their_gradient():
    model, (x, y), support = network(), episode(), episode()
    x.requires_grad_()
    grads = []
    for batching in (CHUNKED["in threads"], iopt.Batching()):
        losses = learner(model, batching)(support, (x.exp(), y))
        grads.append(flat(torch.autograd.grad(losses.sum(), [x, *model.parameters()])))
    assert relative_error(*grads) < 1e-12


def test_a_batch_of_cotangents():
    """`is_grads_batched`: the Jacobian of the losses in one call."""
    model, support, query = network(), episode(), episode()
    rows = []
    for batching in (CHUNKED["task by task"], iopt.Batching()):
        losses = learner(model, batching, rule=iopt.FirstOrder())(support, query)
        eye = torch.eye(3, dtype=torch.float64)
        jacobian = torch.autograd.grad(losses, list(model.parameters()), eye, is_grads_batched=True)
        rows.append(torch.cat([rows.flatten(1) for rows in jacobian], 1))
    assert relative_error(*rows) < 1e-12


def test_torch_func_differentiates_the_losses():
    model, support, query = network(), episode(), episode()
    meta = learner(model, CHUNKED["task by task"])
    theta = {name: p.detach() for name, p in meta.named_parameters()}

    def total(theta):
        return torch.func.functional_call(meta, theta, (support, query)).sum()

    ours = flat(torch.func.grad(total)(theta).values())
    losses = learner(model, iopt.Batching())(support, query)
    plain = flat(torch.autograd.grad(losses.sum(), model.parameters()))
    assert relative_error(ours, plain) < 1e-12


def test_the_memory_of_the_queries_is_that_of_a_chunk():
    """A graph of one task has the activations of its images; eight of them would be kept at once."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Softplus(), nn.Flatten())
    model.append(nn.Linear(8 * 16 * 16, 2))
    images = lambda n: (torch.randn(8, n, 1, 16, 16), torch.zeros(8, n, dtype=torch.long))  # noqa: E731
    support, query = images(1), images(32)
    peaks = []
    for chunk in (1, 8):
        meta = learner(model, iopt.Batching(chunk_size=chunk), rule=iopt.FirstOrder())
        with PeakMemory() as memory:
            torch.autograd.grad(meta(support, query).sum(), list(model.parameters()))
        peaks.append(memory.peak)
    assert peaks[0] < peaks[1] / 4
