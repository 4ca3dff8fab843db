"""Methods since the paper at equal time: Omniglot, 5-way 1-shot, so many processor seconds each.

    python -m benchmarks.paper methods --data DIR

Every method has the same network, inner problem, optimizer and test tasks, and draws tasks until its
processor time is spent; validation and test do not count. AmIGO and SOBA go on from what they
remember of a task, so they see a fixed pool of tasks, as does the first method once more for comparison.
Killed, the same command goes on with the method that was not finished.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import implicit_optim as iopt
from benchmarks.measure import RESULTS, machine, table
from benchmarks.paper.few_shot import Diverged, Run, accuracy, comparison
from benchmarks.paper.points import Points
from benchmarks.shine import Shine, refined, through
from implicit_optim.tasks import ConvNet, Episodes, omniglot, omniglot_splits

TITLES = {
    "cg-5": "iMAML, CG(5)",
    "cg-2": "iMAML, CG(2)",
    "gauss-newton": "iMAML, CG(5), Gauss-Newton",
    "neumann-5": "iMAML, Neumann(5)",
    "truncated-5": "truncated, 5 steps",
    "truncated-1": "one step",
    "first-order": "first order, Jacobian-free",
    "maml": "MAML",
    "moreau": "Moreau envelope",
    "shine": "SHINE",
    "shine-refined": "SHINE, 3 products more",
    "hoag": "HOAG",
    "hoag-gauss-newton": "HOAG, Gauss-Newton",
    "cg-5-pool": "iMAML, CG(5), pool",
    "amigo": "AmIGO, pool",
    "soba": "SOBA, pool",
    "soba-gauss-newton": "SOBA, Gauss-Newton, pool",
}
POOLED = ("cg-5-pool", "amigo", "soba", "soba-gauss-newton")
MARKS = 3  # validations


def arguments(parser):
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240, help="of the processor, a method")
    parser.add_argument("--methods", choices=TITLES, nargs="+", default=list(TITLES))
    parser.add_argument("--tasks", type=int, default=8, help="in a meta-step")
    parser.add_argument("--pool", type=int, default=64, help="tasks of the methods with a memory")
    parser.add_argument("--test-tasks", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1, help="torch's intra-op threads")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))


def settings(args):
    """What ends a run is its time."""
    return comparison(args, steps=None, validate_every=None)


# ---------------------------------------------------------------------------- rules with a memory


class Pool:
    """Tasks that come back, a few at a time, and what is remembered of each.

    Args:
        support, query: the examples of all tasks, as `Episodes` gives them.
        tasks: how many are drawn at a time.
        seed: of the drawing.
    """

    def __init__(self, support, query, tasks, seed):
        self.support, self.query, self.tasks = support, query, tasks
        self.generator, self.kept = torch.Generator().manual_seed(seed), {}

    def sample(self):
        order = torch.randperm(len(self.support[0]), generator=self.generator)
        self.chosen = order[: self.tasks].tolist()
        return tuple(tuple(t[self.chosen] for t in part) for part in (self.support, self.query))

    def recall(self, name, new):
        """What is kept of the tasks last drawn, `new [tasks, n]` of those without."""
        rows = zip(self.chosen, new, strict=True)
        return torch.stack([self.kept.get((name, i), row) for i, row in rows])

    def keep(self, name, values):
        for i, row in zip(self.chosen, values, strict=True):
            self.kept[name, i] = row.clone()


@dataclass(frozen=True)
class Amigo(iopt.MetaGradient):
    """phi and w in ``A w = v`` go on from the task's last visit, see Arbel & Mairal 2022.

    Of phi the offset from theta is kept: between two visits theta moves, and takes phi with it.
    """

    pool: Pool
    products: int

    def adapt(self, problem, start, solver, on_solve):
        fixed, layout = problem.detach(), problem.layout
        solution = iopt.minimize(
            fixed.objective,
            layout.unravel(start + self.pool.recall("offset", torch.zeros_like(start))),
            fixed.theta,
            *fixed.data,
            solver=solver,
            batch_ndim=1,
            batching=fixed.evaluator.batching,
        )
        phi = layout.ravel(solution.value)
        self.pool.keep("offset", phi - start)

        def inverse(v):
            w = self.pool.recall("w", fixed.precondition(v))

            def solve(part, tasks):
                A = iopt.Hessian(part, phi[tasks]).linearize()
                return refined(A, w[tasks], v[tasks], self.products)

            w = torch.cat(fixed.parts(solve, len(v)))
            self.pool.keep("w", w)
            return w

        return through(problem, phi, inverse)


@dataclass(frozen=True)
class Soba(iopt.MetaGradient):
    """phi, w and theta take one step each, from the same point, see Dagreou et al. 2022.

    Those of phi and w have the learning rate of the solver, which is `gd`. As in `Amigo` the offset of
    phi from theta is kept.
    """

    pool: Pool
    curvature: type[iopt.Operator] = iopt.Hessian

    def adapt(self, problem, start, solver, on_solve):
        fixed, offset = problem.detach(), self.pool.recall("offset", torch.zeros_like(start))
        phi = start + offset

        def inverse(v):
            w = self.pool.recall("w", fixed.precondition(v))

            def step(part, tasks):
                A = self.curvature(part, phi[tasks]).linearize()
                return A.gradient, A.mv(w[tasks]) - v[tasks]

            slope, residual = (torch.cat(t) for t in zip(*fixed.parts(step, len(v)), strict=True))
            self.pool.keep("offset", offset - solver.lr * slope)
            self.pool.keep("w", w - solver.lr * residual)
            return w

        return through(problem, phi, inverse)


# -------------------------------------------------------------------------------- the comparison


def plan(name, s, pool):
    """What a method takes at a meta-step: a function of its number to the inner solver and the rule."""
    gd = iopt.gd(lr=s.inner_lr, max_steps=s.inner_steps)
    few = iopt.gd(lr=s.inner_lr, max_steps=s.inner_steps // 4)
    quasi = iopt.lbfgs(max_steps=s.inner_steps - 4, memory=5)  # 12 steps are 16 gradients, by count
    implicit = lambda k: iopt.Implicit(iopt.CG(max_steps=k))  # noqa: E731
    neumann = iopt.Neumann(max_steps=5, step=s.lam * s.inner_lr)  # that of gd, in units of 1 / lam

    def hoag(step):
        level = max(0.05, 0.5 * 0.98**step)
        solver = iopt.gd(lr=s.inner_lr, max_steps=4 * s.inner_steps, tol=level)
        curvature = iopt.Hessian if name == "hoag" else iopt.GaussNewton
        return solver, iopt.Implicit(iopt.CG(max_steps=4 * s.cg_steps, rtol=level), curvature)

    constant = {
        "cg-2": (gd, implicit(2)),
        "cg-5": (gd, implicit(5)),
        "cg-5-pool": (gd, implicit(5)),
        "gauss-newton": (gd, iopt.Implicit(iopt.CG(max_steps=5), iopt.GaussNewton)),
        "neumann-5": (gd, iopt.Implicit(neumann)),
        "truncated-1": (gd, iopt.Truncated(1)),
        "truncated-5": (gd, iopt.Truncated(5)),
        "first-order": (gd, iopt.FirstOrder()),
        "moreau": (gd, iopt.Reptile()),
        "maml": (gd, iopt.Unrolled()),
        "shine": (quasi, Shine()),
        "shine-refined": (quasi, Shine(3)),
        "amigo": (few, Amigo(pool, 3)),
        "soba": (few, Soba(pool)),
        "soba-gauss-newton": (few, Soba(pool, iopt.GaussNewton)),
    }
    return hoag if name.startswith("hoag") else lambda step: constant[name]


class Timed(Run):
    """The meta-training of one method, for so many seconds of the processor."""

    def __init__(self, name, s, split, model, folder, seconds, pool_size):
        super().__init__(s, split, model, folder)
        self.name, self.seconds = name, seconds
        every = Episodes(
            split.train,
            ways=s.way,
            shots=s.train_shot,
            queries=s.queries,
            tasks=pool_size,
            seed=s.seed,
        )
        pool = Pool(*every.sample(), s.tasks, s.seed)
        self.plan = plan(name, s, pool)
        self.tasks = pool if name in POOLED else self.episodes

    def _train(self):
        s, history, step = self.s, self.history, 0
        with tqdm(total=self.seconds, desc=TITLES[self.name], unit="s") as bar:
            while history["seconds"] < self.seconds:
                began = time.process_time()
                self.meta.solver, self.meta.meta_gradient = self.plan(step)
                try:
                    self._step(*self.tasks.sample(), step)
                except Diverged as diverged:
                    history["diverged"] = str(diverged)
                    return
                spent = time.process_time() - began
                step, history["seconds"] = step + 1, history["seconds"] + spent
                if history["seconds"] >= self.seconds * (len(history["validation"]) + 1) / MARKS:
                    reached = accuracy(self.model, s, self.split.val, 100, s.seed + 1)
                    history["validation"].append((history["seconds"], *reached))
                bar.update(round(spent, 2))
                bar.set_postfix_str(self._postfix())

    def _evaluate(self):
        """Accuracy with the solver of all, and with the method's own, from theta to the end."""
        s, own = self.s, self.plan(len(self.history["loss"]))[0]
        if self.name in POOLED[1:]:  # which come to the minimiser over the visits
            own = iopt.gd(lr=s.inner_lr, max_steps=4 * s.inner_steps)
        solvers = {"accuracy": None}
        if own != iopt.gd(lr=s.inner_lr, max_steps=s.inner_steps):
            solvers["own solver"] = own
        with tqdm(total=len(solvers) * s.test_tasks, desc="test tasks") as bar:
            where = self.split.test, s.test_tasks, s.seed + 2, bar
            return {name: accuracy(self.model, s, *where, each) for name, each in solvers.items()}


def row(name, results):
    return {
        "method": name,
        "accuracy": results["accuracy"],
        "own_solver": results.get("own solver"),
        "meta_steps": len(results["loss"]),
        "cpu_seconds": 60 * results["minutes"],
        "validation": results["validation"],
        "diverged": results.get("diverged"),
    }


def shown(row):
    interval = lambda pair: "{:.1f} ± {:.1f}".format(*pair) if pair else ""  # noqa: E731
    return {
        "method": TITLES[row["method"]],
        "accuracy [%]": interval(row["accuracy"]),
        "own inner solver [%]": interval(row["own_solver"]),
        "meta-steps": row["meta_steps"],
        "ms a meta-step": f"{1000 * row['cpu_seconds'] / max(1, row['meta_steps']):.0f}",
        "": "diverged" if row["diverged"] else "",
    }


def draw(rows, path):
    fig, axes = plt.subplots(figsize=(8, 0.8 + 0.32 * len(rows)), layout="constrained")
    rows = sorted(rows, key=lambda row: row["accuracy"][0])
    means, halves = zip(*(row["accuracy"] for row in rows), strict=True)
    colors = ["#E69F00" if row["method"] in POOLED else "#0072B2" for row in rows]
    axes.barh([TITLES[row["method"]] for row in rows], means, xerr=halves, color=colors, capsize=2)
    for place, row in enumerate(rows):
        axes.text(1, place, f"{row['meta_steps']} meta-steps", va="center", color="w", fontsize=8)
    axes.set(xlabel="accuracy, unseen characters [%]", xlim=(0, 100))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(args):
    torch.set_num_threads(args.threads)
    split = omniglot_splits(omniglot(args.data, cache=Path("runs")), seed=0)
    s = settings(args)
    whole = asdict(s) | {"seconds": args.seconds, "pool": args.pool}

    def trained(name):
        torch.manual_seed(s.seed)
        model = ConvNet(s.way, zero_head=s.zero_head)
        folder = args.out / name
        return row(name, Timed(name, s, split, model, folder, args.seconds, args.pool).finish())

    points = Points(args.out, whole, args.methods)
    rows = [points(name, lambda name=name: trained(name)) for name in args.methods]
    kept = {"machine": machine(), "settings": whole, "rows": rows}
    (args.out / "methods.json").write_text(json.dumps(kept) + "\n")
    draw(rows, args.out / "methods.png")
    print(table([shown(row) for row in rows]))
    print(f"\nsaved {args.out}/methods.json and .png; kept ones are in {RESULTS / 'paper'}")
