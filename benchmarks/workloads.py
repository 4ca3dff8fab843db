"""The problems that are timed."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import Workload
from implicit_optim.tasks import MLP, ConvNet, sinusoids


def sinusoid(tasks):
    support, query = sinusoids(tasks=tasks, shots=10, queries=10).sample()
    return Workload(f"sinusoid MLP, T = {tasks}", MLP(1, (40, 40), 1), F.mse_loss, support, query)


def omniglot(tasks, ways, shots):
    """Images of Omniglot's size: what they show does not change the time."""

    def batch(examples):
        x = torch.rand(tasks, ways * examples, 1, 28, 28)
        return x, torch.arange(ways).repeat_interleave(examples).expand(tasks, -1)

    name = f"conv, {ways}-way {shots}-shot, T = {tasks}"
    queries = batch(15 if ways == 5 else 5)
    return Workload(name, ConvNet(ways), F.cross_entropy, batch(shots), queries)


class Quadratic(nn.Module):
    """The paper's synthetic problem (F.1): linear regression, one vector of parameters."""

    def __init__(self, n):
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return x @ self.phi


def quadratic(n, tasks, examples=None, lr=0.01):
    examples = examples or n
    scale = torch.linspace(0.1, 1, n)

    def batch():
        x = torch.randn(tasks, examples, n) * scale
        return x, (x * torch.randn(tasks, 1, n)).sum(-1)

    name = f"quadratic, n = {n}, T = {tasks}"
    return Workload(name, Quadratic(n), F.mse_loss, batch(), batch(), lr=lr)


WORKLOADS = {
    "sinusoid": lambda: sinusoid(32),
    "conv-4": lambda: omniglot(4, 5, 1),
    "conv-16": lambda: omniglot(16, 5, 1),
    "conv-32": lambda: omniglot(32, 5, 1),
    "conv-5shot-4": lambda: omniglot(4, 5, 5),
    "conv-20way-1": lambda: omniglot(1, 20, 5),
    "conv-20way-4": lambda: omniglot(4, 20, 5),
    "quadratic-50": lambda: quadratic(50, 1),
    "quadratic-50x64": lambda: quadratic(50, 64),
    "quadratic-1e3": lambda: quadratic(1_000, 1, 200),
    "quadratic-1e5": lambda: quadratic(100_000, 1, 50, lr=2e-4),
    "quadratic-1e3x64": lambda: quadratic(1_000, 64, 50),
}
