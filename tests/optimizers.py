"""Every optimizer made and stepped in its own manner, and a small network to train."""

import io

import pytest
import torch
import torch.nn.functional as F

from implicit_optim.optim import (
    GD,
    NesterovAGD,
    NewtonCG,
    NonlinearCG,
    ProximalGradient,
    TrustRegion,
)

FIRST_ORDER = [GD, NesterovAGD, ProximalGradient]
SECOND_ORDER = (NewtonCG, TrustRegion)
JOINT = (*SECOND_ORDER, NonlinearCG)  # one group, one flat vector
CLASSES = [*FIRST_ORDER, *JOINT]
each = pytest.mark.parametrize("cls", CLASSES)
each_first_order = pytest.mark.parametrize("cls", FIRST_ORDER)
both_paths = pytest.mark.parametrize("foreach", [True, False])
X, Y = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(9, 4).sin(), torch.arange(9) % 3


def network(dtype=torch.float64):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return net.to(dtype)


def make(cls, params, **settings):
    if cls not in JOINT:
        settings = {"lr": 0.2, **settings}
    if cls is ProximalGradient:
        settings = {"l1": 0.0, **settings}
    if cls is TrustRegion:
        settings = {"radius": settings.pop("lr", 0.5), **settings}
    return cls(params, **settings)


def step(opt, loss):
    """One step in the manner of the class; returns what `step` does."""

    def closure():
        if isinstance(opt, SECOND_ORDER):
            return loss()
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return opt.step(closure)


def train(opt, net, steps):
    dtype = net[0].weight.dtype
    for _ in range(steps):
        step(opt, lambda: F.cross_entropy(net(X.to(dtype)), Y))
    return flat(net.parameters())


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def saved(state):
    """Through a file that may hold nothing but tensors and plain Python values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
