"""A meta-step of any model in plain torch, and whether a module is still what it was.

The oracle calls the untouched model by `torch.func.functional_call` and goes through the tasks one by
one. The inner steps and conjugate gradients are written out: nothing of the library is in them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import implicit_optim as iopt

INNER, CG = 2, 3


def part(tree, i):
    """One task of a tree of tensors that lead with the tasks."""
    return pytree.tree_map(lambda t: t[i] if isinstance(t, torch.Tensor) else t, tree)


def stacked(tasks):
    """Trees of tensors, one a task, as one tree that leads with the tasks."""
    return pytree.tree_map(lambda *each: torch.stack(each), *tasks)


def called(model, inputs):
    """The model's output; a dict among the inputs holds keywords of `forward`."""
    keywords = {k: v for i in inputs if isinstance(i, dict) for k, v in i.items()}
    with torch.no_grad():
        return model(*(i for i in inputs if not isinstance(i, dict)), **keywords)


def settled(model, inputs):
    """The model with running statistics that it has seen, without which a deep one overflows."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes, momenta = modes_of(model), [m.momentum for m in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    called(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.1)  # channels that were silent
    set_modes(model, modes)
    return model


def modes_of(model):
    return [m.training for m in model.modules()]


def set_modes(model, modes):
    model.train(modes[0])  # some do more in it than set a flag
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def relative_error(a, b):
    """NaN where something is not finite, so that no comparison with a tolerance passes."""
    return ((a - b).norm() / b.norm()).item()


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def combined(a, scale, b):
    return [x + scale * y for x, y in zip(a, b, strict=True)]


def _weight_norm(v, g, dim=0):
    others = [d for d in range(v.ndim) if d != dim]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


class TwiceDifferentiable(TorchFunctionMode):
    """Written out: functions of which torch has no second derivative, or a wrong one."""

    FORMULAS = {
        F.hardsigmoid: lambda x, inplace=False: F.relu6(x + 3) / 6,
        F.hardswish: lambda x, inplace=False: x * F.relu6(x + 3) / 6,
        torch._weight_norm: _weight_norm,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.FORMULAS.get(function, function)(*args, **kwargs or {})


@dataclass(frozen=True)
class Plain:
    """The oracle: lists of tensors, autograd, a loop over the tasks.

    Attributes:
        model: a module that the library has never seen.
        loss: `(output, target) -> scalar`.
        lam: strength of the proximal term.
        lr: of the inner steps.
    """

    model: nn.Module
    loss: object
    lam: float = 1.0
    lr: float = 0.1

    @classmethod
    def well_conditioned(cls, model, loss, support):
        """With a lam as large as the curvature: otherwise rounding decides what CG and GD make of it."""
        values = [p.detach() for p in trainable(model).values()]
        product = cls(model, loss, lam=0.0).curvature(values, part(support, 0))
        v = [torch.randn_like(t) for t in values]
        for _ in range(3):
            size = dot(v, v).sqrt()
            v = product([t / size for t in v])
        lam = max(dot(v, v).sqrt().item(), 0.1)
        return cls(model, loss, lam, 0.2 / max(lam, 1))

    def fit(self, values, batch):
        """The loss under other parameters; a dict among the inputs holds keywords of `forward`."""
        *inputs, target = batch
        keywords = {k: v for i in inputs if isinstance(i, dict) for k, v in i.items()}
        inputs = tuple(i for i in inputs if not isinstance(i, dict))
        # Batch norm writes into its buffers in training mode: into a copy that is thrown away.
        state = {name: b.clone() for name, b in self.model.named_buffers()}
        state |= dict(zip(trainable(self.model), values, strict=True))
        with TwiceDifferentiable():
            output = functional_call(self.model, state, inputs, keywords)
        return self.loss(output, target)

    def slope(self, values, batch, *, create_graph=False):
        values = [v if v.requires_grad else v.detach().requires_grad_() for v in values]
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad(
                self.fit(values, batch), values, create_graph=create_graph, materialize_grads=True
            )

    def curvature(self, values, batch):
        """The map `v -> (H + lam I) v` of one task; one graph for all products."""
        values = [v.detach().requires_grad_() for v in values]
        slope = self.slope(values, batch, create_graph=True)

        def product(v):
            Hv = torch.autograd.grad(slope, values, v, retain_graph=True, materialize_grads=True)
            return combined(Hv, self.lam, v)

        return product

    def hessian_products(self, phi, support, direction):
        """`(H_i + lam I) d_i` of each task; `phi` and `direction` are dicts that lead with the tasks."""
        tasks = len(next(iter(phi.values())))
        each = ([part(list(d.values()), i) for d in (phi, direction)] for i in range(tasks))
        products = [
            self.curvature(values, part(support, i))(v) for i, (values, v) in enumerate(each)
        ]
        return torch.stack([flat(p) for p in products])

    def meta_gradient(self, support, query):
        """Gradient of the mean query loss: `lam w`, where CG(3) solves `(H + lam I) w = grad L`."""
        tasks, total = len(support[-1]), 0
        theta = [p.detach() for p in trainable(self.model).values()]
        for i in range(tasks):
            phi = theta
            for _ in range(INNER):
                slope = self.slope(phi, part(support, i))
                near = combined(phi, -1, theta)
                phi = combined(phi, -self.lr, combined(slope, self.lam, near))
            v = self.slope(phi, part(query, i))
            w = conjugate_gradients(self.curvature(phi, part(support, i)), v, self.lam)
            total = total + self.lam * flat(w) / tasks
        return total


def conjugate_gradients(product, b, lam):
    """Three steps from zero; where the matrix is not positive definite it keeps what it has."""
    x, r, p = [torch.zeros_like(t) for t in b], list(b), list(b)
    rr = dot(r, r)
    for k in range(CG):
        if rr == 0:
            break
        Ap = product(p)
        curvature = dot(p, Ap)
        if curvature <= 0:
            return x if k else [t / lam for t in b]  # the first-order direction
        x, r = combined(x, rr / curvature, p), combined(r, -rr / curvature, Ap)
        rr, before = dot(r, r), rr
        p = combined(r, rr / before, p)
    return x


# ------------------------------------------------------------------------------------ the library


def learner(model, plain, **settings):
    """The library's account of what `plain` computes."""
    rule = iopt.Implicit(iopt.CG(max_steps=CG, min_curvature=0.0))
    solver = iopt.gd(lr=plain.lr, max_steps=INNER)
    settings = {"meta_gradient": rule, "on_solve": iopt.Ignore()} | settings
    return iopt.MetaLearner(model, plain.loss, solver=solver, lam=plain.lam, **settings)


def hessian_products(meta, phi, support, direction):
    """The same products, through the curvature that the linear solver would be given."""
    theta = ({name: p.detach() for name, p in meta.anchor().items()}, meta.proximal())
    how = {} if meta.batching is None else {"batching": meta.batching}
    problem = iopt.InnerProblem.bind(meta.objective, phi, theta, *support, batch_ndim=1, **how)
    with torch.no_grad():
        operator = iopt.Hessian(problem, problem.layout.ravel(phi))
        return operator.mv(problem.layout.ravel(direction))


def meta_gradient(meta, support, query):
    losses = meta(support, query)
    return flat(torch.autograd.grad(losses.mean(), list(meta.anchor().values())))


def points(model, tasks):
    """Another phi for each task, near the model's own, and a direction to go from there."""
    near, direction = {}, {}
    for name, p in trainable(model).items():
        noise, v = torch.randn(2, tasks, *p.shape, dtype=p.dtype)
        near[name], direction[name] = p.detach() + 0.01 * noise, v
    return near, direction


def errors(meta, plain, support, query):
    """Relative errors of Hessian products, without lam's part in them, and of the meta-gradient."""
    phi, direction = points(plain.model, len(support[-1]))
    ours, theirs = meta_gradient(meta, support, query), plain.meta_gradient(support, query)
    gradient = relative_error(ours, theirs)
    ours = hessian_products(meta, phi, support, direction)
    theirs = plain.hessian_products(phi, support, direction)
    of_lam = plain.lam * torch.cat([v.reshape(len(v), -1) for v in direction.values()], 1)
    return relative_error(ours - of_lam, theirs - of_lam), gradient


# --------------------------------------------------------------------------- is it what it was?


class Remembered:
    """What a module is: numbers, memory order, flags, classes, hooks, attributes, and what it returns.

    Args:
        model: the module, which has been called before: what a first call leaves behind is its own.
        inputs: of one task.
    """

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs
        self.before = self._look()

    def changes(self):
        """Kinds of things that are no longer what they were."""
        now = self._look()
        return [kind for kind, was in self.before.items() if not _same(was, now[kind])]

    def _look(self):
        model, modules = self.model, dict(self.model.named_modules())
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return {
            "numbers": {k: t.detach().clone() for k, t in (tensors | model.state_dict()).items()},
            "objects": {k: id(t) for k, t in tensors.items()},
            "strides": {k: t.stride() for k, t in tensors.items()},
            "flags": [{k: m.training for k, m in modules.items()}, list(trainable(model))],
            "classes": {k: (type(m), id(m)) for k, m in modules.items()},
            "hooks": {k: _hooks(m) for k, m in modules.items()},
            "attributes": {k: sorted(vars(m)) for k, m in modules.items()},
            "outputs": self._outputs(),
        }

    def _outputs(self):
        modes = modes_of(self.model)
        output = called(self.model.eval(), self.inputs)
        set_modes(self.model, modes)
        return [t for t in pytree.tree_leaves(_fields(output)) if isinstance(t, torch.Tensor)]


def _fields(output):
    """What is in an output that torch does not know as a tree."""
    return list(vars(output).values()) if hasattr(output, "__dict__") else output


def _hooks(module):
    return {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v is not None}


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
