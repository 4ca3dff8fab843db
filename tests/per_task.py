"""Meta-gradients by a plain loop over the tasks, with dense Hessians: nothing of the library."""

import copy

import torch
from torch import nn
from torch.func import functional_call

import implicit_optim as iopt

# What the library is asked for where the oracle is exact.
EXACT = iopt.Implicit(iopt.CG(rtol=1e-11, max_steps=200))
NEWTON = iopt.newton_cg(linear_solver=iopt.CG(rtol=1e-5, max_steps=50), tol=1e-11, max_steps=40)
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def tasks_of(*episodes):
    """`(x [T, ...], y [T, ...]), ...` as a list of `((x, y), ...)`, one entry a task."""
    count = episodes[0][0].shape[0]
    return [tuple(tuple(t[i] for t in e) for e in episodes) for i in range(count)]


def flat(model):
    """The trainable parameters end to end, and the way back to their names."""
    named = [(k, p.detach()) for k, p in model.named_parameters() if p.requires_grad]

    def by_name(vector):
        pieces = vector.split([p.numel() for _, p in named])
        return {k: v.reshape(p.shape) for (k, p), v in zip(named, pieces, strict=True)}

    return torch.cat([p.reshape(-1) for _, p in named]), by_name


def loss_of(model, loss):
    """`(vector, (*inputs, target)) -> scalar` of a copy of the model."""
    model = copy.deepcopy(model)
    _, by_name = flat(model)
    return lambda vector, batch: loss(
        functional_call(model, by_name(vector), batch[:-1]), batch[-1]
    )


def minimiser(F, start):
    """Newton's method with the eigenvalues of the Hessian made positive, and step halving."""
    phi = start
    for _ in range(40):
        phi = phi.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F(phi), phi)
        if slope.norm() < 1e-12:
            return phi.detach()
        phi = phi.detach()
        values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(F, phi))
        step = vectors @ ((vectors.T @ slope) / values.abs().clamp(min=0.1))
        while F(phi - step) > F(phi) + 1e-14:
            step = step / 2
        phi = phi - step
    raise AssertionError(f"Newton stalled at a gradient of {slope.norm():.1e}")


def implicit_maml(inner, outer, theta, lam, tasks, starts=None):
    """Query losses and the gradient of their mean: `lam (H + lam I)^-1 grad L` of each task.

    `inner(phi, support)` and `outer(phi, support, query)` are scalar functions of a flat phi. `starts`,
    one a task, are where Newton's method begins instead of theta: near the end it takes less time.
    """
    losses, gradient = [], torch.zeros_like(theta)
    starts = [theta] * len(tasks) if starts is None else starts
    for (support, query), start in zip(tasks, starts, strict=True):

        def F(phi, support=support):
            return inner(phi, support) + lam / 2 * ((phi - theta) ** 2).sum()

        phi = minimiser(F, start).requires_grad_()
        loss = outer(phi, support, query)
        (v,) = torch.autograd.grad(loss, phi)
        H = torch.autograd.functional.hessian(F, phi.detach())
        gradient += lam * torch.linalg.solve(H, v) / len(tasks)
        losses.append(loss.detach())
    return torch.stack(losses), gradient


def expected(model, loss, lam, support, query, starts=None):
    """[`implicit_maml`][] of a module that does the same for support and query."""
    fit = loss_of(model, loss)
    theta, _ = flat(model)
    tasks = tasks_of(support, query)
    return implicit_maml(fit, lambda phi, _, batch: fit(phi, batch), theta, lam, tasks, starts)


def learned(meta, support, query):
    """The library's losses and the flat gradient of their mean."""
    losses = meta(support, query)
    parameters = [p for p in meta.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(losses.mean(), parameters)
    return losses.detach(), torch.cat([g.reshape(-1) for g in gradients])


def slope_along(meta, support, query, direction, eps=1e-5, seed=0):
    """Central finite difference of the mean loss along a flat direction in the parameters."""
    parameters = [p for p in meta.model.parameters() if p.requires_grad]
    pieces = direction.split([p.numel() for p in parameters])
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(parameters, pieces, strict=True):
                p += sign * eps * d.reshape(p.shape)
            torch.manual_seed(seed)
            ends.append(meta(support, query).mean())
            for p, d in zip(parameters, pieces, strict=True):
                p -= sign * eps * d.reshape(p.shape)
    return (ends[0] - ends[1]) / (2 * eps)


def assert_same(ours, theirs, **tolerances):
    """Losses and gradients of two accounts of one meta-step."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **(tolerances or CLOSE))


def plain(t):
    """What stands under the transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t.detach().clone()


class Shared(list):
    """One list for the copies of a network in several threads."""

    def __deepcopy__(self, memo):
        return self


class Recorder(nn.Module):
    """Dropout by a mask, of which it keeps every one it draws, by the task's examples."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.seen = Shared()

    def forward(self, x):
        h = self.first(x).tanh()
        mask = torch.bernoulli(torch.full_like(h, 0.5))
        examples, masks = plain(x), plain(mask)
        several = examples.ndim == 3  # tasks at once
        self.seen += zip(examples, masks, strict=True) if several else [(examples, masks)]
        return self.last(h * mask)

    def take(self, x):
        """The masks `[evaluations, examples, 4]` that each task of `x` has had; then forget them."""
        masks = [torch.stack([m for e, m in self.seen if torch.equal(e, task)]) for task in x]
        left = [(e, m) for e, m in self.seen if not any(torch.equal(e, task) for task in x)]
        self.seen[:] = left
        return masks
