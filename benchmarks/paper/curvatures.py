"""Which matrix, which lam: Omniglot, 5-way 1-shot, a short training for each pair.

    python -m benchmarks.paper curvatures --data DIR

The Hessian, Gauss-Newton, the Hessian with Gauss-Newton behind it, the Hessian damped in the solve,
and the empirical Fisher matrix, each with lam from 0.5 to 10: accuracy on unseen characters at equal
meta-steps, the processor time that it took, and the share of tasks with negative curvature. Killed,
the same command goes on where it was.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.measure import RESULTS, machine, table
from benchmarks.paper.few_shot import Run, comparison
from implicit_optim.tasks import ConvNet, omniglot, omniglot_splits

LAMS = (0.5, 1.0, 2.0, 5.0, 10.0)
COLORS = {
    "hessian": "#0072B2",
    "gauss-newton": "#D55E00",
    "safeguarded": "#009E73",
    "damped": "#E69F00",
    "fisher": "#CC79A7",
}


def arguments(parser):
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120, help="meta-steps of a run")
    parser.add_argument("--tasks", type=int, default=8, help="in a meta-step")
    parser.add_argument("--test-tasks", type=int, default=300)
    parser.add_argument("--lams", type=float, nargs="+", default=LAMS)
    parser.add_argument("--curvatures", choices=COLORS, nargs="+", default=list(COLORS))
    parser.add_argument("--threads", type=int, default=1, help="torch's intra-op threads")
    parser.add_argument("--out", type=Path, default=Path("runs/curvatures"))


def settings(args):
    return comparison(args, args.steps, max(1, args.steps // 3))


def finished(s, split, folder):
    """A run's results, with the processor time that it took, if it was never killed."""
    path = folder / "results.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.manual_seed(s.seed)
    resumed, started = (folder / "checkpoint.pt").exists(), time.process_time()
    results = Run(s, split, ConvNet(s.way, zero_head=s.zero_head), folder).finish()
    results["cpu_seconds"] = None if resumed else time.process_time() - started
    path.write_text(json.dumps(results) + "\n")
    return results


def row(results):
    s, share = results["settings"], results["truncated"]
    found = results["transductive"]
    return {
        "lam": s["lam"],
        "curvature": s["curvature"],
        "accuracy": found["accuracy"],
        "interval_95": found["interval_95"],
        "validation": results["validation"],
        "negative": sum(share) / len(share),
        "negative_last_third": sum(share[-len(share) // 3 :]) / len(share[-len(share) // 3 :]),
        "cpu_seconds": results["cpu_seconds"],
    }


def draw(rows, path):
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, color in COLORS.items():
        own = [row for row in rows if row["curvature"] == name]
        if not own:
            continue
        lams = [row["lam"] for row in own]
        style = {"color": color, "marker": "o", "ms": 4, "label": name}
        halves = [row["interval_95"] for row in own]
        left.errorbar(lams, [row["accuracy"] for row in own], halves, capsize=2, **style)
        right.plot(lams, [100 * row["negative"] for row in own], **style)
    left.set(title="accuracy, unseen characters [%]")
    right.set(title="training tasks with negative curvature [%]")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="lam")
        axes.set_xticks(LAMS, [f"{lam:g}" for lam in LAMS])
        axes.minorticks_off()
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(args):
    torch.set_num_threads(args.threads)
    split = omniglot_splits(omniglot(args.data, cache=Path("runs")), seed=0)
    rows = []
    for lam in args.lams:
        for curvature in args.curvatures:
            s = replace(settings(args), lam=lam, curvature=curvature)
            rows.append(row(finished(s, split, args.out / f"{curvature}-{lam:g}")))
    args.out.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(), "settings": vars(settings(args)), "rows": rows}
    (args.out / "curvatures.json").write_text(json.dumps(whole) + "\n")
    draw(rows, args.out / "curvatures.png")
    shown = ("lam", "curvature", "accuracy", "interval_95", "negative", "cpu_seconds")
    print(table([{k: row[k] for k in shown} for row in rows]))
    print(f"\nsaved {args.out}/curvatures.json and .png; kept ones are in {RESULTS / 'paper'}")
