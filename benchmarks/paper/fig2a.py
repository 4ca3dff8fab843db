"""Figure 2a: how far the meta-gradient is from the exact one, against the inner gradient steps.

    python -m benchmarks.paper fig2a

Linear regression in 50 dimensions, lam = 5, condition number 50 (of the task's loss; eigenvalues 1 to
50 spread evenly on a log scale), gradient descent with lr = 1/L, float64. Relative error of the
meta-gradient of each task, median over the tasks.
"""

from functools import partial
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import implicit_optim as iopt
from benchmarks.measure import save, table
from benchmarks.paper.points import Points
from benchmarks.paper.quadratics import Quadratics

N, KAPPA, LAM, TASKS = 50, 50.0, 5.0, 11
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RULES = {
    "MAML": iopt.Unrolled(),
    "iMAML, 2 CG steps": iopt.Implicit(iopt.CG(max_steps=2)),
    "iMAML, 5 CG steps": iopt.Implicit(iopt.CG(max_steps=5)),
    "iMAML, 20 CG steps": iopt.Implicit(iopt.CG(max_steps=20)),
}
COLORS = ("#7F7F7F", "#E69F00", "#D55E00", "#0072B2")  # safe for colour-blind eyes


def problem(tasks=TASKS, seed=0):
    spectrum = torch.logspace(0, torch.tensor(KAPPA).log10().item(), N, dtype=torch.float64)
    return Quadratics.make(tasks, spectrum, LAM, seed)


def errors(problem, steps, rule):
    """Relative error of every task's meta-gradient."""
    tasks = [problem.task(i) for i in range(len(problem.support[0]))]
    return [task.error(task.gd(steps), rule) for task in tasks]


def draw(steps, rows, path):
    fig, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for (name, color), marker in zip(zip(RULES, COLORS, strict=True), "sov^", strict=True):
        axes.plot(steps, [row[name] for row in rows], marker=marker, ms=4, color=color, label=name)
    axes.set(xscale="log", yscale="log", ylim=(1e-8, 5), xlabel="inner gradient steps")
    axes.set(ylabel="relative error of the meta-gradient")
    axes.set_xticks(steps, [str(k) for k in steps], minor=False)
    axes.minorticks_off()
    axes.legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def arguments(parser):
    parser.add_argument("--out", type=Path, default=Path("runs/fig2a"))
    parser.add_argument("--seed", type=int, default=0)


def main(args):
    torch.set_num_threads(1)  # matrices of 50 x 50
    quadratics = problem(seed=args.seed)
    names = [f"{rule}, {k} steps" for k in STEPS for rule in RULES]
    points = Points(args.out, {"seed": args.seed, "tasks": TASKS}, names)
    rows = []
    for k in STEPS:
        rows.append({"inner steps": k})
        for name, rule in RULES.items():
            make = partial(errors, quadratics, k, rule)
            rows[-1][name] = median(points(f"{name}, {k} steps", make))
    saved = save("fig2a", {"seed": args.seed, "median": rows}, args.out)
    draw(STEPS, rows, args.out / "fig2a.png")
    print(
        table([{k: f"{v:.2g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows])
    )
    print(f"\nsaved {saved} and {args.out / 'fig2a.png'}")
