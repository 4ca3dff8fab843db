"""Figure 2b: time and peak memory of a meta-gradient against the inner gradient steps.

    python -m benchmarks.paper fig2b

Omniglot's network and sizes, 20-way 5-shot with 5 query images a class, one task, float32, 5 CG steps.
Seconds are medians, all methods in turn; memory is the peak of all storages that torch makes.
"""

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import implicit_optim as iopt
from benchmarks.measure import interleaved, save, table
from benchmarks.paper.points import Points
from benchmarks.workloads import omniglot
from tests.memory import PeakMemory

STEPS = (1, 2, 4, 8, 16, 32, 64)
RULES = {
    "MAML": iopt.Unrolled(),
    "first-order MAML": iopt.FirstOrder(),
    "iMAML": iopt.Implicit(iopt.CG(max_steps=5)),
}
COLORS = ("#7F7F7F", "#E69F00", "#0072B2")


def contenders(work, steps):
    def backward(rule):
        meta = iopt.MetaLearner(
            work.model,
            work.loss,
            solver=iopt.gd(lr=0.1, max_steps=steps),
            lam=2.0,
            meta_gradient=rule,
            on_solve=iopt.Ignore(),
        )

        def run():
            work.model.zero_grad()
            meta(work.support, work.query).mean().backward()

        return run

    return {name: backward(rule) for name, rule in RULES.items()}


def seconds(work, steps, rounds):
    return interleaved(contenders(work, steps), rounds=rounds, warmup=1)


def peaks(work, steps):
    """MiB above the inputs."""
    contenders(work, 1)["iMAML"]()  # what the first solve of a process allocates once, 31 MiB
    found = {}
    for name, run in contenders(work, steps).items():
        work.model.zero_grad()
        with PeakMemory() as memory:
            run()
        found[name] = memory.peak / 2**20
    return found


def draw(rows, path):
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    steps = [row["inner steps"] for row in rows]
    for panel, what in zip(axes, ("seconds", "MiB"), strict=True):
        for (name, color), marker in zip(zip(RULES, COLORS, strict=True), "sov", strict=True):
            values = [row[f"{name}, {what}"] for row in rows]
            panel.plot(steps, values, marker=marker, ms=4, color=color, label=name)
        panel.set(xlabel="inner gradient steps", ylabel=what, ylim=(0, None))
        panel.set_xticks(steps, [str(k) if k > 4 else "" for k in steps])
    axes[0].set_title("time of a meta-gradient")
    axes[1].set_title("peak memory")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def arguments(parser):
    parser.add_argument("--out", type=Path, default=Path("runs/fig2b"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)


def main(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work = omniglot(1, 20, 5)
    settings = {"seed": args.seed, "rounds": args.rounds, "threads": args.threads}
    names = [f"{what}, {k} steps" for k in STEPS for what in ("memory", "time")]
    points, rows = Points(args.out, settings, names), []
    for k in STEPS:
        lean = points(f"memory, {k} steps", partial(peaks, work, k))
        fast = points(f"time, {k} steps", partial(seconds, work, k, args.rounds))
        row = {f"{name}, seconds": v for name, v in fast.items()}
        row |= {f"{name}, MiB": v for name, v in lean.items()}
        rows.append({"inner steps": k} | row)
        rows[-1]["iMAML - first-order, seconds"] = fast["iMAML"] - fast["first-order MAML"]
    saved = save("fig2b", {"settings": settings, "points": rows}, args.out)
    draw(rows, args.out / "fig2b.png")
    print(table(rows))
    print(f"\nsaved {saved} and {args.out / 'fig2b.png'}")
