"""Newton-CG as the inner solver (Hessian-free implicit MAML) against gradient descent.

    python examples/newton_cg_inner.py        # prints a table, saves a picture in runs/newton_cg_inner

The implicit gradient is that of a minimiser, so it is as good as the inner solution. The tasks are
five classes of scikit-learn's digits, five images each; the inner problem is a softmax regression held
to theta, convex and ill-conditioned. The solvers are compared at an equal number of gradient
evaluations, all tasks at once: a Hessian-vector product counts two, a trial of the line search one. The
descents have the best of five learning rates each. Errors are relative to the tight solution.
"""

import functools

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gallery
import implicit_optim as iopt

TASKS, WAYS, SHOTS, QUERIES, LAM, CG_STEPS = 16, 5, 5, 15, 0.01, 10
NEWTON_STEPS, RATES = (1, 2, 3, 4, 6, 8), (0.03, 0.1, 0.3, 1.0, 3.0)
TIGHT = iopt.newton_cg(linear_solver=iopt.CG(rtol=1e-3, max_steps=300), tol=1e-11, max_steps=50)
NEWTON, AGD, GD = "Newton-CG", "accelerated descent", "gradient descent"
COLORS = {NEWTON: gallery.BLUE, AGD: gallery.GREY, GD: gallery.ORANGE}


def episode(seed):
    """Support and query, `(x [T, N, 65], y [T, N])` each; every task has five classes of its own."""
    generator = torch.Generator().manual_seed(seed)
    ((x, y),) = gallery.digits(generator)
    tasks = []
    for _ in range(TASKS):
        places = [(y == c).nonzero()[:, 0] for c in torch.randperm(10, generator=generator)[:WAYS]]
        order = [torch.randperm(len(p), generator=generator)[: SHOTS + QUERIES] for p in places]
        tasks.append(torch.stack([p[o] for p, o in zip(places, order, strict=True)]))
    images = gallery.with_intercept(x)[torch.stack(tasks)]
    labels = torch.arange(WAYS)[:, None].expand(images.shape[:-1])
    halves = slice(SHOTS), slice(SHOTS, None)
    return [(images[:, :, h].flatten(1, 2), labels[:, :, h].flatten(1, 2)) for h in halves]


class Problem:
    """The inner problem of all tasks, and a count of the evaluations of its loss."""

    def __init__(self, seed):
        self.support, self.query = episode(seed)
        anchor = torch.randn(65, WAYS).double() / 10
        self.theta = (anchor.requires_grad_(), torch.tensor(LAM).double())
        self.start = anchor.detach().expand(TASKS, -1, -1)
        self.objective = iopt.Objective(lambda phi, x: x @ phi, self.loss, iopt.proximal)
        self.evaluations = 0

    def loss(self, output, target):
        self.evaluations += 1  # of all tasks at once
        return F.cross_entropy(output, target)

    def solve(self, solver):
        """Where the solver ends, and how many times its loss was evaluated."""
        before, data = self.evaluations, (self.theta, *self.support)
        found = iopt.minimize(self.objective, self.start, *data, solver=solver, batch_ndim=1)
        return found.value, self.evaluations - before

    def meta_gradient(self, phi):
        """Of the mean query loss with respect to theta, by a tight linear solve."""
        how = {"linear_solver": iopt.CG(rtol=1e-10, max_steps=500), "on_solve": iopt.Raise()}
        phi = iopt.attach(phi, self.objective, self.theta, *self.support, batch_ndim=1, **how)
        loss = F.cross_entropy((self.query[0] @ phi).mT, self.query[1])
        return torch.autograd.grad(loss, self.theta[0])[0]

    def norm(self, phi):
        """Mean norm of the inner gradient; inf where the solver diverged."""
        flat = iopt.InnerProblem.bind(self.objective, phi, self.theta, *self.support, batch_ndim=1)
        return flat.grad(flat.layout.ravel(phi)).norm(dim=-1).mean().nan_to_num(torch.inf).item()


def compare(problem):
    """For each solver rows of evaluations, norm of the inner gradient, error of the meta-gradient."""
    cg, found = iopt.CG(max_steps=CG_STEPS), {NEWTON: []}
    for k in NEWTON_STEPS:
        phi, calls = problem.solve(iopt.newton_cg(linear_solver=cg, max_steps=k))
        found[NEWTON].append((calls + 2 * CG_STEPS * k, phi))
    budgets = [count for count, _ in found[NEWTON]]
    for name, rule in {AGD: functools.partial(iopt.agd, momentum=0.9), GD: iopt.gd}.items():
        tried = {lr: problem.solve(rule(lr=lr, max_steps=budgets[-1]))[0] for lr in RATES}
        rate = min(RATES, key=lambda lr, tried=tried: problem.norm(tried[lr]))
        found[name] = [(k, problem.solve(rule(lr=rate, max_steps=k))[0]) for k in budgets]
    exact = problem.meta_gradient(problem.solve(TIGHT)[0])

    def row(count, phi):
        error = (problem.meta_gradient(phi) - exact).norm() / exact.norm()
        return count, problem.norm(phi), error.item()

    return {name: [row(*run) for run in tqdm(runs, desc=name)] for name, runs in found.items()}


def draw(found, path):
    fig, axes = gallery.panels(2)
    titles = "norm of the inner gradient", "relative error of the meta-gradient"
    for column, (axis, title) in enumerate(zip(axes, titles, strict=True), 1):
        for name, rows in found.items():
            points = [(row[0], row[column]) for row in rows]
            axis.plot(*zip(*points, strict=True), "o-", color=COLORS[name], lw=2.2, label=name)
        axis.set(title=title, xlabel="gradient evaluations", yscale="log", xlim=(0, None))
    axes[0].legend(frameon=False)
    gallery.save(fig, path)


def main():
    args = gallery.arguments(__doc__, "newton_cg_inner")
    found = compare(Problem(args.seed))
    print(f"\n{'':26}{'evaluations':>12}{'||gradient||':>14}{'error of the meta-gradient':>28}")
    for name, rows in found.items():
        for count, norm, error in rows:
            print(f"{name:26}{count:12}{norm:14.1e}{error:28.1e}")
    draw(found, args.out / "newton_cg_inner.png")


if __name__ == "__main__":
    main()
