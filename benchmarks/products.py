"""Fewer products for the same accuracy: what helps plain conjugate gradients, and what does not.

Relative error of x in (H + lam I) x = v (of the meta-gradient lam x just as well), the median over the
tasks of a meta-batch, against all the Hessian-vector products that one task pays for: those of CG, those
that build a preconditioner, that of the residual of a guess. A product for one task that serves T tasks
counts 1 / T, one that serves several meta-steps is divided by their number; labels say so.

Where a method rests on the previous meta-step, theta moved by one Adam step of 1e-3 and nothing else
changed: same tasks, same examples. On the quadratics v is random, no two tasks share any of it, and H
does not depend on theta; task by task their eigenvectors are common ones plus 10 % of the task's own.
The inner solver is 16 GD steps and one of Newton-CG (ConvNet) or three of Newton-CG (MLP), with five CG
steps each; what the last one leaves costs nothing. Networks use Gauss-Newton.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.linalg import eigh, qr, solve, vector_norm

import implicit_optim as iopt
from benchmarks.measure import save, table
from benchmarks.workloads import omniglot
from implicit_optim.tasks import MLP, ConvNet, sinusoids

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

LEVELS = (1e-1, 1e-2, 1e-4)
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "products.png"
KEPT = 10  # meta-steps that the sketch at theta is kept for
KRYLOV = 5  # CG steps of the last inner step
COLOURS = {"f": ["k"], "a": ["k"], "b": ["C1"], "c": ["C0", "C9", "C4"], "d": ["C2"], "e": ["C3"]}


@dataclass
class Problem:
    """A x = v per task, A = H + lam I, and everything that the methods may start from."""

    name: str
    budget: int
    lam: float
    mv: object  # A x at the solution of every task
    at_theta: object  # the same for other tasks of the kind, at the theta of one meta-step before
    v: Tensor
    x: Tensor  # the solution
    previous: Tensor  # solutions of the same tasks one meta-step before
    previous_cg: Tensor  # the same by KRYLOV steps of CG only
    others: Tensor  # solutions of other tasks
    krylov: tuple  # directions P of the last inner step and A P, at the inner iterate before
    diagonal: Tensor | None = None


def dot(a, b):
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def apply(matrix, x):
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def cg(mv, v, precondition=lambda r: r, x=None, kept=None):
    """Preconditioned CG, endlessly: the iterate after 0, 1, 2, ... products."""
    r = v
    if x is not None:
        yield x
        r = v - mv(x)
    x = torch.zeros_like(v) if x is None else x
    yield x
    p = z = precondition(r)
    rz = dot(r, z)
    while True:
        Ap = mv(p)
        if kept is not None:
            kept.append((p, Ap))
        alpha = torch.where(rz > 1e-200, rz / dot(p, Ap), 0.0)
        x, r = x + alpha * p, r - alpha * Ap
        yield x
        z = precondition(r)
        rz, before = dot(r, z), rz
        p = z + torch.where(before > 1e-200, rz / before, 0.0) * p


def after(products, iterates):
    return next(islice(iterates, products, None))


def krylov(mv, v):
    """Directions and products of CG, [T, n, KRYLOV] each, and its solution."""
    kept = []
    x = after(KRYLOV, cg(mv, v, kept=kept))
    P, AP = (torch.stack(t, -1) for t in zip(*kept, strict=True))
    return (P, AP), x


def galerkin(P, AP, v):
    return apply(P, solve(P.mT @ AP, apply(P.mT, v)))


def low_rank(U, values, rest=None):
    """The inverse of a matrix with these eigenpairs and one value for the rest: default, the last."""
    rest = values[..., -1:] if rest is None else rest
    return lambda r: (r + apply(U, (rest / values - 1) * apply(U.mT, r))) / rest


def ritz(P, AP):
    """Eigenpairs of A on the span of P, largest first."""
    Q, R = qr(P)
    AQ = torch.linalg.solve_triangular(R, AP, upper=True, left=False)
    values, W = eigh((Q.mT @ AQ + AQ.mT @ Q) / 2)
    return (Q @ W).flip(-1), values.flip(-1)


def nystrom(Y, omega, lam):
    """Eigenpairs of H + lam from the sketch Y = H omega: Frangella, Tropp & Udell 2021."""
    gram, V = eigh((omega.mT @ Y + Y.mT @ omega) / 2)
    usable = gram > 1e-12 * gram[..., -1:]  # where H has a lower rank than the sketch
    scale = torch.where(usable, gram.clamp(min=1e-300).rsqrt(), 0.0).unsqueeze(-2)
    U, root, _ = torch.linalg.svd(Y @ (V * scale), full_matrices=False)
    return U, root.square() + lam


def sketch(mv, omega, T, lam):
    """H omega for every task."""
    columns = [mv(w.expand(T, -1).contiguous()) for w in omega.unbind(-1)]
    return torch.stack(columns, -1) - lam * omega


def methods(p, ranks=(5, 10, 20), probes=10):
    """By label: products spent before the first iterate, and the iterates."""
    (T, n), free = p.v.shape, {}
    signs = [torch.randint(0, 2, p.v.shape).to(p.v) * 2 - 1 for _ in range(probes)]
    estimate = (sum(s * p.mv(s) for s in signs) / probes).clamp(min=p.lam)
    free["a plain CG"] = {}
    free["b Jacobi, exact diagonal for free"] = {"precondition": lambda r: r / p.diagonal}
    paid = {f"b Jacobi, {probes} probes ({probes})": (probes, lambda r: r / estimate)}
    for r in ranks:
        omega = qr(torch.randn(n, r)).Q
        own, theta = (sketch(mv, omega, T, p.lam) for mv in (p.mv, p.at_theta))
        kept = f"mean at theta, kept {KEPT} meta-steps ({r}/{KEPT})"
        for label, cost, Y in (
            (f"each task ({r})", r, own),
            (f"of one task ({r}/{T})", r / T, own[0]),
            (kept, r / KEPT, theta.mean(0)),  # a product of the mean is one of every task
        ):
            paid[f"c Nystrom {r}, {label}"] = cost, low_rank(*nystrom(Y, omega, p.lam))
    free["d same tasks' last solution"] = {"x": p.previous}
    free[f"d same tasks' last {KRYLOV} CG steps"] = {"x": p.previous_cg}
    free["d mean solution of other tasks"] = {"x": p.others.mean(0).expand(T, -1)}
    pairs, guess = ritz(*p.krylov), galerkin(*p.krylov, p.v)
    free["e Galerkin guess"] = {"x": guess}
    free["e Galerkin guess, v / lam elsewhere"] = {"x": low_rank(*pairs, p.lam)(p.v)}
    free["e Ritz preconditioner"] = {"precondition": low_rank(*pairs)}
    free["e Galerkin + Ritz"] = {"x": guess, "precondition": low_rank(*pairs)}
    out = {"first order, v / lam": (0, iter([p.v / p.lam]))}
    out |= {label: (0, cg(p.mv, p.v, **start)) for label, start in free.items()}
    out |= {label: (cost, cg(p.mv, p.v, inverse)) for label, (cost, inverse) in paid.items()}
    return {label: out[label] for label in sorted(out, key=lambda k: (k[0] != "f", k[0]))}


def error(p, x):
    return (vector_norm(x - p.x, dim=-1) / vector_norm(p.x, dim=-1)).median().item()


def curves(p):
    for label, (cost, iterates) in methods(p).items():
        count = max(0, math.floor(p.budget - cost) + 1)
        errors = []
        for x in islice(iterates, count):
            errors.append(float(f"{error(p, x):.3g}"))
            if errors[-1] < 1e-9:
                break
        products = [cost + i for i in range(len(errors))]
        yield {"problem": p.name, "method": label, "products": products, "errors": errors}


def quadratic(name, eigenvalues, T=16, lam=1.0, budget=200):
    """F = phi.H phi / 2 - b.phi + lam / 2 |phi - theta|^2; the query loss has the same H."""
    n = len(eigenvalues)
    Q = qr(qr(torch.randn(n, n)).Q + 0.1 / math.sqrt(n) * torch.randn(2 * T, n, n)).Q
    A, A_other = ((Q * (eigenvalues + lam)) @ Q.mT).split(T)
    v, v_other, first_gradient = torch.randn(3, T, n).unbind(0)
    x = solve(A, v)
    step = (1e-3 * lam * x.mean(0).sign()).expand(T, -1)  # of lam theta, by Adam's first step
    before = v + step - lam * solve(A, step)  # phi moves by A^-1 of that, v by H of that

    name = f"{name}, kappa = {(eigenvalues.max() + lam) / (eigenvalues.min() + lam):.0e}, T = {T}"
    mv, at_theta = partial(apply, A), partial(apply, A_other)
    previous, short, others = solve(A, before), krylov(mv, before)[1], solve(A_other, v_other)
    last = krylov(mv, first_gradient)[0]
    p = Problem(name, budget, lam, mv, at_theta, v, x, previous, short, others, last)
    p.diagonal = A.diagonal(dim1=-2, dim2=-1)
    return p


def bulk(n):
    """Ten outliers of 1e3 to 1e4 over a bulk of 1e-2 to 10."""
    return torch.cat([torch.logspace(4, 3, 10), torch.logspace(1, -2, n - 10)])


def noise(tasks):
    """5-way 1-shot tasks of random images."""
    workload = omniglot(tasks, 5, 1)
    return workload.support, workload.query


def digits(tasks):
    """5-way 1-shot tasks of the 8x8 digits, enlarged; 15 queries a class."""
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images = F.interpolate(images.reshape(-1, 1, 8, 8) / 16, (28, 28), mode="bilinear")
    classes = [torch.randperm(10)[:5] for _ in range(tasks)]
    drawn = [[(w := images[labels == c])[torch.randperm(len(w))[:16]] for c in t] for t in classes]
    x, y = torch.stack([torch.stack(t) for t in drawn]), torch.arange(5).expand(tasks, -1)
    return (x[:, :, 0], y), (x[:, :, 1:].flatten(1, 2), y.repeat_interleave(15, dim=1))


def waves(tasks):
    return [
        [t.double() for t in part] for part in sinusoids(tasks=tasks, shots=10, queries=10).sample()
    ]


def adapted(model, lam, meta, support, query, newton):
    """GD, then Newton-CG: the operators there and at theta, v, x, and what the last step leaves."""
    parameters = {k: p.detach().clone() for k, p in model.named_parameters()}
    init = {k: p.expand(len(support[0]), *p.shape) for k, p in parameters.items()}
    theta = (parameters, torch.tensor(lam))
    inner, outer = (
        iopt.InnerProblem.bind(meta.objective, init, theta, *data, batch_ndim=1)
        for data in (support, query)
    )
    start = phi = inner.layout.ravel(init).clone()
    for _ in range(0 if newton > 1 else 16):
        phi = phi - 0.1 * inner.grad(phi)
    for _ in range(newton):
        last, step = krylov(iopt.GaussNewton(inner, phi).linearize().mv, -inner.grad(phi))
        value, length = inner.values(phi), torch.ones_like(phi[:, :1])
        while (worse := inner.values(phi + length * step) > value).any():
            length = torch.where(worse.unsqueeze(-1), length / 2, length)
        phi = (phi + length * step).detach()
    phi.requires_grad_()
    (v,) = torch.autograd.grad(outer.fits(phi).sum(), phi)
    operator, at_theta = (iopt.GaussNewton(inner, q) for q in (phi.detach(), start))
    x = iopt.linear_solve(operator, v, iopt.CG(max_steps=200, rtol=1e-10)).value
    return operator.linearize().mv, at_theta.linearize().mv, v, x, last, inner.layout


def network(name, model, loss, lam, batch, T=4, newton=1, meta_steps=0, budget=25):
    rule = iopt.Implicit(iopt.CG(max_steps=5), curvature=iopt.GaussNewton)
    solver = iopt.newton_cg(max_steps=newton, curvature=iopt.GaussNewton)
    solver = solver if newton > 1 else iopt.gd(lr=0.1, max_steps=16)
    meta = iopt.MetaLearner(model, loss, solver=solver, lam=lam, meta_gradient=rule)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(meta_steps):
        adam.zero_grad()
        meta(*batch(T)).mean().backward()
        adam.step()
    same, other = batch(T), batch(T)
    mv, _, v, previous, _, layout = adapted(model, lam, meta, *same, newton)
    short = krylov(mv, v)[1]
    _, at_theta, _, others, _, _ = adapted(model, lam, meta, *other, newton)
    slopes = layout.unravel(lam * previous.mean(0))
    for key, parameter in model.named_parameters():
        parameter.grad = slopes[key].clone()
    adam.step()
    mv, _, v, x, last, _ = adapted(model, lam, meta, *same, newton)
    p = Problem(name, budget, lam, mv, at_theta, v, x, previous, short, others, last)
    # Softmax over 5 ways and 5 examples: Gauss-Newton has rank 20 (waves: 10); a sketch of 24 is exact.
    omega = qr(torch.randn(v.shape[-1], 24)).Q
    U, values = nystrom(sketch(mv, omega, T, lam), omega, lam)
    assert vector_norm(low_rank(U, values, lam)(v) - x) < 1e-6 * vector_norm(x)
    p.diagonal = lam + apply(U.square(), values - lam)
    return p


def check():
    """Every method and its parts against a dense solve, so that no bug looks like "does not pay"."""
    n, T = 20, 3
    p, basis = quadratic("tiny", torch.linspace(1, 10, n), T), torch.eye(n)
    A = sketch(p.mv, basis, T, 0)
    assert torch.allclose(p.x, solve(A, p.v))
    for steps in (5, 12):
        theirs = iopt.linear_solve(iopt.Dense(A), p.v, iopt.CG(max_steps=steps)).value
        assert (theirs - after(steps, cg(p.mv, p.v))).abs().max() < 1e-8
    for label, (_, iterates) in methods(p).items():
        assert "first" in label or error(p, after(n + 1, iterates)) < 1e-6, label
    # One step: with a sketch of all of H, and with the diagonal of a diagonal matrix.
    whole = nystrom(sketch(p.mv, basis, T, p.lam), basis, p.lam)
    assert error(p, after(1, cg(p.mv, p.v, low_rank(*whole)))) < 1e-6
    d = torch.linspace(1, 100, n)
    assert torch.allclose(after(1, cg(lambda x: d * x, p.v, lambda r: r / d)), p.v / d)
    # The Galerkin guess for the right-hand side that made the space is what CG found there.
    (P, AP), x = krylov(p.mv, p.v)
    assert torch.allclose(galerkin(P, AP, p.v), x)
    U, values = ritz(P, AP)
    assert torch.allclose(U.mT @ A @ U, torch.diag_embed(values))


def compare(p):
    """The residual of the solution, and iopt.CG against ours."""
    assert (vector_norm(p.v - p.mv(p.x), dim=-1) / vector_norm(p.v, dim=-1)).max() < 1e-9
    theirs = iopt.CG(max_steps=KRYLOV).solve(iopt.Linearized(p.mv, lambda r: r), p.v).value
    assert vector_norm(theirs - krylov(p.mv, p.v)[1]) < 1e-8 * vector_norm(theirs)


def needed(row, budget):
    """Products to each of `LEVELS`."""
    pairs = list(zip(row["products"], row["errors"], strict=True))
    first = [next((f"{k:.3g}" for k, e in pairs if e <= to), f"not in {budget}") for to in LEVELS]
    return {"method": row["method"]} | {f"{to:.0e}": k for to, k in zip(LEVELS, first, strict=True)}


def picture(panels):
    fig, axes = plt.subplots(2, 3, figsize=(18, 10))
    for ax, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        rows = [r for r in rows if "Nystrom" not in r["method"] or "Nystrom 10" in r["method"]]
        for i, row in enumerate(rows):
            kind = row["method"][0]
            place, colours = [r["method"][0] for r in rows[:i]].count(kind), COLOURS[kind]
            style = {"color": colours[place % len(colours)], "marker": "*" if kind == "f" else None}
            style["linestyle"] = ["-", "--", ":", "-."][place // len(colours)]
            style["linewidth"] = 3 if kind == "a" else 1.3
            ax.semilogy(row["products"], row["errors"], **style, label=row["method"][2:])
        ax.set(ylim=(1e-7, 3))
        ax.set_title(name, fontsize=9)
        ax.set(xlabel="Hessian-vector products per task", ylabel="relative error of x")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    labels[0] = "first order, v / lam"
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles, labels, loc="center", fontsize=10)
    fig.tight_layout()
    fig.savefig(PICTURE, dpi=72)
    plt.close(fig)
    return PICTURE


def problems():
    yield quadratic("quadratic, log-uniform spectrum", torch.logspace(4, 0, 200) - 1)
    yield quadratic("quadratic, 10 outliers + bulk", bulk(200))
    name = "ConvNet, random images, lam = 2, T = 4"
    yield network(name, ConvNet(5), F.cross_entropy, 2.0, noise)
    name = "ConvNet, 16 filters, digits, 40 meta-steps, lam = 0.5, T = 4"
    small = ConvNet(5, filters=16)
    yield network(name, small, F.cross_entropy, 0.5, digits, meta_steps=40)
    name = "MLP, sinusoids, 100 meta-steps, 3 Newton steps, lam = 0.5, T = 16"
    mlp = MLP(1, (40, 40), 1)
    yield network(name, mlp, F.mse_loss, 0.5, waves, 16, newton=3, meta_steps=100)


def main():
    dtype, panels, rows = torch.get_default_dtype(), {}, []
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        torch.set_num_threads(1)  # with more, LU of a batch fails inside MKL from n = 200 on
        check()
        print("Products per task until the median relative error of x is below:")
        for p in problems():
            compare(p)
            panels[p.name] = list(curves(p))
            found = [needed(row, p.budget) for row in panels[p.name]]
            rows += [{"problem": p.name} | row for row in found]
            print(f"\n{p.name}:\n\n{table(found)}")
    finally:
        torch.set_default_dtype(dtype)
    path = save("products", rows)
    print(f"\nsaved {path} and {picture(panels)}")
