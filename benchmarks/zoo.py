"""Inner problems from easy to hard, each with the exact meta-gradient by dense algebra, float64."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """`F(phi) = loss(predict(phi, x), y) + lam/2 ||phi - anchor||^2`, and v = d outer loss / d phi."""

    predict: object
    loss: object
    anchor: torch.Tensor
    lam: float
    x: torch.Tensor
    y: torch.Tensor
    v: torch.Tensor

    def value(self, phi):
        prox = self.lam / 2 * (phi - self.anchor).square().sum()
        return self.loss(self.predict(phi, self.x), self.y) + prox

    def reference(self, phi):
        """The meta-gradient of the minimiser near phi, or None if there is none that near."""
        phi = phi.clone()
        for _ in range(50):
            H = torch.func.hessian(self.value)(phi)
            step = torch.linalg.solve(H, torch.func.grad(self.value)(phi))
            if not step.norm() < 1 + phi.norm():
                return None
            phi = phi - step
            if step.norm() <= 1e-12 * (1 + phi.norm()):
                definite = torch.linalg.eigvalsh(H)[0] > 0
                return self.lam * torch.linalg.solve(H, self.v) if definite else None
        return None


def mlp(width, phi, x):
    """One hidden layer of tanh, one output."""
    inputs = x.shape[-1]
    W, w = phi[: width * inputs].reshape(width, inputs), phi[width * inputs :]
    return torch.tanh(x @ W.mT) @ w


def softmax(classes, phi, x):
    return x @ phi.reshape(x.shape[-1], classes)


def linear(phi, x):
    return x @ phi


def zoo(seed):
    """Name and problem: linear, logistic and softmax regression, small networks; easy and hard."""
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator, dtype=F64)

    def made(predict, loss, n, lam, x, y, scale=0.0):
        return Problem(predict, loss, scale * randn(n), lam, x, y, randn(n))

    def spread(rows, n, kappa):
        """Inputs whose Hessian in a mean squared error has eigenvalues from 1 down to 1 / kappa."""
        q, r = torch.linalg.qr(randn(rows, n))[0], torch.linalg.qr(randn(n, n))[0]
        return (rows / 2) ** 0.5 * q * torch.logspace(0, -math.log10(kappa) / 2, n, dtype=F64) @ r

    for kappa in (10, 1e2, 1e4):
        x = spread(60, 30, kappa)
        yield f"ridge, kappa {kappa:g}", made(linear, F.mse_loss, 30, 1 / kappa, x, randn(60))
    for lam in (1.0, 1e-2):
        x = randn(40, 30)
        y = (x @ randn(30) > 0).double()
        name = f"logistic, lam {lam:g}"
        yield name, made(linear, F.binary_cross_entropy_with_logits, 30, lam, x, y)
    for lam in (0.5, 1e-2):
        x, y = randn(20, 10), torch.randint(0, 4, (20,), generator=generator)
        yield (
            f"softmax, lam {lam:g}",
            made(partial(softmax, 4), F.cross_entropy, 40, lam, x, y),
        )
    for lam, noise in ((0.5, 0.1), (0.05, 0.1), (0.05, 1.0), (0.01, 1.0)):
        x = randn(10, 3)
        y = torch.sin(2 * x[:, 0]) + noise * randn(10)
        name = f"network, lam {lam:g}, noise {noise:g}"
        yield name, made(partial(mlp, 8), F.mse_loss, 32, lam, x, y, scale=0.5)
