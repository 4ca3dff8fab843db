"""The runs of tables 2 and 3 that are kept, beside the paper's: a table and a picture.

    python -m benchmarks.paper summary

`--keep runs/.../results.json NAME` first puts what they show of a run into
benchmarks/results/paper/omniglot-NAME.json: not the loss of every meta-step.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measure import RESULTS, compact, table
from benchmarks.paper.few_shot import METHODS
from benchmarks.paper.table2 import PAPER

COLORS = {
    "imaml-gd": "#0072B2",
    "imaml-hf": "#56B4E9",
    "maml": "#7F7F7F",
    "fomaml": "#E69F00",
    "reptile": "#D55E00",
}


def arguments(parser):
    parser.add_argument("--results", type=Path, default=RESULTS / "paper")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/paper-table2.png"))
    parser.add_argument("--keep", nargs=2, metavar=("FILE", "NAME"), help="add a run")


def kept(run):
    """What the table and the picture show of a run, and on which machine it was."""
    names = ("settings", "machine", "minutes", "transductive", "support only", "validation")
    shares = run["truncated"]
    mean = [sum(shares) / len(shares)] if shares else []
    return {name: run[name] for name in names} | {"truncated": mean}


def load(folder):
    """The runs in a folder: longest last, else by method."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("omniglot-*.json"))]
    order = list(METHODS)
    key = lambda s: (s["steps"], order.index(s["method"]), s["lam"])  # noqa: E731
    return sorted(runs, key=lambda run: key(run["settings"]))


def row(run):
    s, share = run["settings"], run["truncated"]
    published = PAPER[s["method"]].get(f"{s['way']}-{s['shot']}")
    accuracy = lambda kind: "{accuracy:.2f} ± {interval_95:.2f}".format(**run[kind])  # noqa: E731
    return {
        "method": METHODS[s["method"]],
        "lam": f"{s['lam']:g}",
        "curvature": s["curvature"] if "imaml" in s["method"] else "-",
        "meta-steps": s["steps"],
        "tasks a step": s["tasks"],
        "accuracy": accuracy("transductive"),
        "batch norm by support": accuracy("support only"),
        "negative curvature": f"{100 * sum(share) / len(share):.1f} %" if share else "-",
        "the paper": f"{published[0]:g} ± {published[1]:g}" if published else "-",
    }


def draw(runs, path):
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    fewest = min(run["settings"]["steps"] for run in runs)
    for run in runs:
        s = run["settings"]
        equal = s["steps"] == fewest
        steps, values, halves = zip(*run["validation"], strict=True)
        label = f"{METHODS[s['method']]}, lam = {s['lam']:g}"
        if "imaml" in s["method"] and s["curvature"] != "hessian":
            label += ", Gauss-Newton"
        style = {"color": COLORS[s["method"]], "marker": "o", "ms": 3, "capsize": 2}
        style["ls"] = "-" if s["lam"] < 2 and s["curvature"] == "hessian" else "--"
        label += "" if equal else f", {s['steps']} steps"
        (left if equal else right).errorbar(steps, values, halves, label=label, **style)
    left.set(title=f"{fewest} meta-steps", xlabel="meta-steps")
    right.set(title="longer", xlabel="meta-steps")
    left.set_ylabel("accuracy, unseen characters [%]")
    for axes in (left, right):
        if axes.has_data():
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(args):
    if args.keep:
        run = json.loads(Path(args.keep[0]).read_text())
        path = args.results / f"omniglot-{args.keep[1]}.json"
        path.write_text(compact(kept(run)) + "\n")
    runs = load(args.results)
    if not runs:
        raise SystemExit(
            f"no omniglot-*.json in {args.results}: run table2, and --keep its results"
        )
    draw(runs, args.out)
    print(table([row(run) for run in runs]))
    print(f"\nsaved {args.out}")
