"""Table 1: gradients and memory of a meta-gradient, against condition number and accuracy.

    python -m benchmarks.paper table1

Quadratics in 50 dimensions; the inner objective G has the eigenvalues lam ... lam kappa, evenly on a log
scale; float64. For each kappa and accuracy: the least number of inner steps (and of CG steps, or of
steps that are back-propagated) with which the library's meta-gradient is as accurate; a Hessian-vector
product is counted as two gradients. Truncated back-propagation takes the steps that full
back-propagation needs for a tenth of the error. Memory is the peak of all storages that torch makes.
"""

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import implicit_optim as iopt
from benchmarks.measure import save, table
from benchmarks.paper.points import Points
from benchmarks.paper.quadratics import Quadratics
from tests.memory import PeakMemory

N, LAM, TASKS = 50, 5.0, 4
KAPPAS = (10, 30, 100, 300)
ACCURACIES = (1e-2, 1e-4, 1e-6)
# The power of kappa that compute grows with, in the paper. Memory is that of a gradient times the
# steps that are back-propagated; of implicit MAML, that of a gradient.
METHODS = {"MAML, GD": 1.0, "MAML, AGD": 0.5, "truncated, GD": 1.0, "iMAML, AGD": 0.5}
COLORS = ("#7F7F7F", "#E69F00", "#D55E00", "#0072B2")


def problem(kappa, seed=0):
    return Quadratics.conditioned(TASKS, N, kappa, LAM, seed)


def least(good, guess):
    """The least count that is good, to two per cent; what is more is taken to be good as well."""
    low, high = 0, max(1, round(guess))
    while not good(high):
        low, high = high, max(high + 1, round(1.3 * high))
    if low == 0:
        low = high
        while low > 1 and good(low):
            low, high = round(low / 1.3) if low > 4 else low - 1, low
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def measure(method, kappa, accuracy, seed):
    """Steps, products, gradients and peak bytes."""
    q = problem(kappa, seed)
    digits = -np.log(accuracy)
    slow, fast = kappa * digits, kappa**0.5 * digits
    if method == "iMAML, AGD":
        rule = lambda c: iopt.Implicit(iopt.CG(max_steps=c))  # noqa: E731
        solved = q.agd(round(3 * fast) + 20)
        products = least(lambda c: q.error(solved, rule(c)) <= accuracy / 2, min(fast, N) / 2)
        rule = rule(products)
        steps = least(lambda k: q.error(q.agd(k), rule) <= accuracy, fast)
        solver = q.agd(steps)
    elif method == "truncated, GD":
        full = iopt.Unrolled()
        steps = least(lambda k: q.error(q.gd(k), full) <= accuracy / 10, slow)
        solver = q.gd(steps)
        products = least(lambda k: q.error(solver, iopt.Truncated(k)) <= accuracy, slow / 2)
        rule = iopt.Truncated(products)
    else:
        make, guess = (q.gd, slow) if method == "MAML, GD" else (q.agd, fast)
        rule = iopt.Unrolled()
        steps = products = least(lambda k: q.error(make(k), rule) <= accuracy, guess)
        solver = make(steps)
    with PeakMemory() as memory:
        q.meta_gradient(solver, rule)
    return {
        "inner steps": steps,
        "products": products,
        "gradients": steps + 2 * products,
        "peak, KiB": memory.peak / 1024,
    }


def power(rows):
    """Of kappa in the number of gradients, by least squares on the logarithms."""
    kappas, values = ([row[key] for row in rows] for key in ("kappa", "gradients"))
    return float(np.polyfit(np.log(kappas), np.log(values), 1)[0])


def memory(rows):
    """KiB at no step and for each step, by least squares; steps are those that are back-propagated."""
    what = "products" if rows[0]["method"] != "iMAML, AGD" else "inner steps"
    each, base = np.polyfit([row[what] for row in rows], [row["peak, KiB"] for row in rows], 1)
    return float(base), float(each)


def draw(rows, path):
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for (method, theory), color in zip(METHODS.items(), COLORS, strict=True):
        own = [r for r in rows if r["method"] == method and r["accuracy"] == ACCURACIES[1]]
        x = np.array([row["kappa"] for row in own])
        for axes, what in ((left, "gradients"), (right, "peak, KiB")):
            y = np.array([row[what] for row in own])
            label = f"{method}: {power(own):.2f} (paper: {theory:g})" if axes is left else method
            axes.plot(x, y, marker="o", ms=4, color=color, label=label)
            if axes is left:
                axes.plot(x, y[-1] * (x / x[-1]) ** theory, ":", color=color, lw=1)
    for axes, what in ((left, "gradients"), (right, "peak memory [KiB]")):
        axes.set(xscale="log", yscale="log", xlabel="condition number kappa", ylabel=what)
        axes.set_xticks(KAPPAS, [str(k) for k in KAPPAS])
        axes.tick_params(axis="x", which="minor", bottom=False)
    left.legend(title="power of kappa", fontsize=8)
    right.legend(fontsize=8)
    fig.suptitle(f"to a relative error of {ACCURACIES[1]:g}; dotted: the paper's power")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def arguments(parser):
    parser.add_argument("--out", type=Path, default=Path("runs/table1"))
    parser.add_argument("--seed", type=int, default=0)


def main(args):
    torch.set_num_threads(1)  # matrices of 50 x 50
    cases = [(m, k, a) for k in KAPPAS for a in ACCURACIES for m in METHODS]
    names = {case: "{}, kappa {}, error {:g}".format(*case) for case in cases}
    points = Points(args.out, {"seed": args.seed}, names.values())
    rows = []
    for case, name in names.items():
        labels = dict(zip(("method", "kappa", "accuracy"), case, strict=True))
        rows.append(labels | points(name, partial(measure, *case, args.seed)))
    summary = []
    for method, theory in METHODS.items():
        every = [row for row in rows if row["method"] == method]
        base, each = memory(every)
        for accuracy in ACCURACIES:
            own = [row for row in every if row["accuracy"] == accuracy]
            summary.append({"method": method, "error": f"{accuracy:g}"})
            summary[-1] |= {f"kappa {row['kappa']}": row["gradients"] for row in own}
            summary[-1] |= {"power": power(own), "paper": theory}
            summary[-1] |= {"KiB at no step": base, "KiB a step": each}
    saved = save("table1", {"seed": args.seed, "points": rows, "summary": summary}, args.out)
    draw(rows, args.out / "table1.png")
    print(table(summary))
    print(f"\nsaved {saved} and {args.out / 'table1.png'}")
