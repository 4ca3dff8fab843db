"""Which inner solver, linear solver and curvature: performance profiles (Dolan & More 2002).

Every combination computes the meta-gradient of every problem of a zoo, one task at a time, float64,
with both tolerances tightened together until its error is below a bound. What it took is counted in
gradients: a product is two, a value without gradient a third. The reference is the implicit gradient of
the minimiser in whose basin the inner solver ended, by dense algebra. Wrong within every tolerance, or
over the budget, is not solved.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import implicit_optim as iopt
from benchmarks.measure import RESULTS, save, table
from benchmarks.zoo import F64, zoo

TOLERANCES = (1e-1, 1e-3, 1e-6, 1e-9)  # of the first gradient, and of ||v||
BOUNDS = (1e-2, 1e-6)  # relative error of the meta-gradient: training, checking
BUDGET = 1000  # gradients
SEEDS = 2
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7F7F7F", "#222222")


@dataclass
class Count:
    gradients: int = 0
    values: int = 0
    products: int = 0

    @property
    def total(self):
        return self.gradients + self.values / 3 + 2 * self.products


@dataclass(frozen=True)
class Counted(iopt.LinearSolver):
    """Another linear solver, with its products counted."""

    solver: iopt.LinearSolver
    count: Count = field(compare=False)

    @property
    def stats_names(self):
        return self.solver.stats_names

    @property
    def needs_symmetry(self):
        return self.solver.needs_symmetry

    def solve(self, operator, b):
        def mv(x):
            self.count.products += 1
            return operator.mv(x)

        low_rank = operator.low_rank
        if low_rank is not None:  # a pull back and a push forward make a product
            parts = operator.low_rank()

            def half(function):
                def counted(u):
                    self.count.products += 0.5
                    return function(u)

                return counted

            parts = replace(parts, pull=half(parts.pull), push=half(parts.push))
            low_rank = lambda: parts  # noqa: E731
        return self.solver.solve(replace(operator, mv=mv, low_rank=low_rank), b)


def counted_curvature(count, kind):
    """A curvature whose products are counted."""

    def counted(at):
        def mv(x):
            count.products += 1
            return at.mv(x)

        fallback = at.fallback and (lambda: counted(at.fallback()))
        return replace(at, mv=mv, fallback=fallback)

    class Counting(kind):
        def linearize(self):
            return counted(super().linearize())

    return Counting


NEWTON_CG = 20  # CG steps for a direction


def inner_solvers(tol, count, L):
    """Every inner solver, as a user would set it; `gd` and `agd` are told the smoothness L."""
    steps = 4 * BUDGET
    cg, counted = iopt.CG(max_steps=NEWTON_CG, rtol=0.1), partial(counted_curvature, count)
    newton = partial(iopt.newton_cg, max_steps=200, tol=tol, linear_solver=cg)
    return {
        "gd": lambda: iopt.gd(lr=1 / L, max_steps=steps, tol=tol),
        "agd": lambda: iopt.agd(lr=1 / L, momentum=0.9, max_steps=steps, tol=tol),
        "Adam": lambda: iopt.from_torch(torch.optim.Adam, lr=0.05, max_steps=steps, tol=tol),
        "lbfgs": lambda: iopt.lbfgs(max_steps=steps, tol=tol),
        "nonlinear_cg": lambda: iopt.nonlinear_cg(max_steps=steps, tol=tol),
        "trust_region": lambda: iopt.trust_region(
            max_steps=200, tol=tol, curvature=counted(iopt.Hessian)
        ),
        "newton_cg, Hessian": lambda: newton(curvature=counted(iopt.Hessian)),
        "newton_cg, GaussNewton": lambda: newton(curvature=counted(iopt.GaussNewton)),
        "newton_cg, Safeguarded": lambda: newton(curvature=counted(iopt.SafeguardedHessian)),
    }


def linear_solvers(rtol):
    return {
        "CG": iopt.CG(rtol=rtol),
        "MINRES": iopt.MINRES(rtol=rtol),
        "GMRES": iopt.GMRES(rtol=rtol),
        "Neumann": iopt.Neumann(rtol=rtol),
        "Cholesky": iopt.Cholesky(),
        "Woodbury": iopt.Woodbury(),
    }


CURVATURES = {
    "Hessian": iopt.Hessian,
    "GaussNewton": iopt.GaussNewton,
    "Safeguarded": iopt.SafeguardedHessian,
}


class OverBudget(Exception):
    pass


def smoothness(problem):
    """The Hessian's largest eigenvalue at the start: what a user would find by trying a few lr."""
    return 1.2 * torch.linalg.eigvalsh(torch.func.hessian(problem.value)(problem.anchor))[-1].item()


def counting(problem, count):
    """The problem as an objective whose evaluations are counted, with and without a gradient."""

    def predict(phi, x):
        if torch.is_grad_enabled():
            count.gradients += 1
        else:
            count.values += 1
        if count.total > BUDGET:
            raise OverBudget
        return problem.predict(phi, x)

    return iopt.Objective(predict, problem.loss, iopt.proximal)


def attempts(problem, name, L):
    """Costs and errors of one inner solver with every linear solver and curvature, as it tightens."""
    start = torch.func.grad(problem.value)(problem.anchor).norm().item()
    lam = torch.tensor(problem.lam, dtype=F64)
    for tol in TOLERANCES:
        count = Count()
        objective = counting(problem, count)
        solver = inner_solvers(tol * start, count, L)[name]()
        data = (problem.x, problem.y)
        try:
            phi = iopt.minimize(
                objective, problem.anchor, (problem.anchor, lam), *data, solver=solver
            ).value
        except OverBudget:
            return
        reference = problem.reference(phi)
        if reference is None:
            continue
        for linear, plain in linear_solvers(tol).items():
            for curvature, matrix in CURVATURES.items():
                if (linear == "Woodbury") != (curvature == "GaussNewton") and linear == "Woodbury":
                    continue
                own = replace(count)
                anchor = problem.anchor.clone().requires_grad_()
                attached = iopt.attach(
                    phi,
                    counting(problem, own),
                    (anchor, lam),
                    *data,
                    linear_solver=Counted(plain, own),
                    curvature=matrix,
                )
                try:
                    (got,) = torch.autograd.grad(problem.v @ attached, anchor)
                except OverBudget:
                    continue
                error = ((got - reference).norm() / reference.norm()).item()
                yield (linear, curvature), own.total, error


def costs(problem):
    """Cheapest count at which each combination is within each bound: `{bound: {combination: cost}}`."""
    best = {bound: {} for bound in BOUNDS}
    L = smoothness(problem)
    for name in inner_solvers(0.0, Count(), L):
        for (linear, curvature), cost, error in attempts(problem, name, L):
            for bound, found in best.items():
                key = f"{name} | {linear} | {curvature}"
                if error <= bound:
                    found[key] = min(round(cost, 1), found.get(key, math.inf))
    return best


def combinations():
    names = inner_solvers(0.0, Count(), 1.0)
    return [
        f"{name} | {linear} | {curvature}"
        for name in names
        for linear in linear_solvers(0.1)
        for curvature in CURVATURES
        if linear != "Woodbury" or curvature == "GaussNewton"
    ]


# -- profiles --------------------------------------------------------------------------------------

TITLES = ("inner solver", "linear solver", "curvature of the meta-gradient")


def ratios(results, keys):
    """Cost over the cheapest of `keys` on the same problem; inf where it was not solved."""
    found = {key: [] for key in keys}
    for costs in results:
        least = min((costs.get(key, math.inf) for key in keys), default=math.inf)
        for key in keys:
            cost = costs.get(key, math.inf)
            found[key].append(cost / least if math.isfinite(least) else math.inf)
    return found


def share(values, tau):
    return sum(r <= tau for r in values) / len(values)


def shares(values):
    solved = share(values, math.inf) - values.count(math.inf) / len(values)
    within = {"best": 1.0, "within 2": 2.0, "within 8": 8.0}
    return {name: share(values, tau) for name, tau in within.items()} | {"solved": solved}


def best_by_choice(results, place):
    """For each option at one place of the combination: its cheapest cost with the others free."""
    merged = []
    for costs in results:
        least = {}
        for key, cost in costs.items():
            option = key.split(" | ")[place]
            least[option] = min(cost, least.get(option, math.inf))
        merged.append(least)
    return merged


def by_choice(results):
    """Bound, what is chosen, and the ratios of its options with the best of all others."""
    every = combinations()
    for bound in BOUNDS:
        whole = [costs[bound] for costs in results]
        for place, title in enumerate(TITLES):
            options = list(dict.fromkeys(key.split(" | ")[place] for key in every))
            yield bound, title, ratios(best_by_choice(whole, place), options)


def choices(results):
    for bound, title, found in by_choice(results):
        for name, values in found.items():
            yield {"error": f"{bound:g}", "choice": title, "option": name} | shares(values)


def draw(results, path):
    fig, every = plt.subplots(
        2, 3, figsize=(12, 6.6), sharex=True, sharey=True, layout="constrained"
    )
    taus = [2 ** (i / 20) for i in range(141)]
    for axes, (bound, title, found) in zip(every.flat, by_choice(results), strict=True):
        for i, (name, values) in enumerate(found.items()):
            style = {"color": COLORS[i % len(COLORS)], "ls": "-" if i < len(COLORS) else "--"}
            axes.step(taus, [share(values, tau) for tau in taus], label=name, **style)
        axes.set(xscale="log", ylim=(0, 1.02), title=f"{title}, error {bound:g}")
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16, 32, 64, 128])
        axes.minorticks_off()
        axes.legend(fontsize=8, loc="lower right")
    for axes in every[:, 0]:
        axes.set_ylabel("share of the problems")
    for axes in every[1]:
        axes.set_xlabel("gradients, times those of the best")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(folder=RESULTS, seeds=SEEDS):
    torch.set_num_threads(1)
    problems = [(f"{name}, seed {s}", p) for s in range(seeds) for name, p in zoo(s)]
    results = []
    for name, problem in tqdm(problems, unit="problem"):
        results.append({"problem": name} | costs(problem))
    rows = []
    for bound in BOUNDS:
        found = ratios([r[bound] for r in results], combinations())
        for key, values in found.items():
            inner, linear, curvature = key.split(" | ")
            rows.append(
                {
                    "error": f"{bound:g}",
                    "inner solver": inner,
                    "linear solver": linear,
                    "curvature": curvature,
                }
                | shares(values)
            )
    saved = save("profiles", list(choices(results)), folder)
    picture = folder.parents[1] / "docs" / "pictures" / "profiles.png"
    draw(results, picture if folder == RESULTS else folder / "profiles.png")
    for bound in BOUNDS:
        own = [row for row in rows if row["error"] == f"{bound:g}"]
        print(table(sorted(own, key=lambda row: (-row["within 2"], -row["solved"]))[:12]), "\n")
    print(f"saved {saved}")
