"""One meta-gradient, ours and the peers', in turn in one process: medians, and ratios to ours.

Two intra-op threads for everybody. "Ours" asks for nothing; a row of its own asks for two threads of one
each and for `channels_last`.
"""

import copy
import dataclasses
import subprocess
import sys

import matplotlib
import torch

import implicit_optim as iopt
from benchmarks.measure import RESULTS, interleaved, save, table
from benchmarks.peers import CONTENDERS, SAME_GRADIENT, compiled, ours
from benchmarks.workloads import WORKLOADS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

THREADS = 2
ASKED = "ours, threads=2 and channels_last"
CONVOLUTIONS = ("conv-4", "conv-16", "conv-32", "conv-20way-4")
QUADRATICS = (
    "quadratic-50",
    "quadratic-50x64",
    "quadratic-1e3",
    "quadratic-1e3x64",
    "quadratic-1e5",
)
TIMED = ("sinusoid", *CONVOLUTIONS, *QUADRATICS)
COMPILED = ("quadratic-50", "quadratic-50x64")  # where the compiler takes seconds
MEMORY_STEPS = (1, 4, 16, 64)


def timed(key, rounds):
    torch.manual_seed(0)
    workload = WORKLOADS[key]()
    reference = torch.cat([g.reshape(-1) for g in CONTENDERS["ours"](workload)])
    for name in SAME_GRADIENT:
        theirs = torch.cat([g.reshape(-1) for g in CONTENDERS[name](workload)])
        error = (theirs - reference).norm() / reference.norm()
        assert error < 1e-2, f"{name} computes another gradient on {key}: {error:.1e}"
    runs = {name: (lambda run=run: run(workload)) for name, run in CONTENDERS.items()}
    if key in COMPILED:
        runs["ours, compiled"] = compiled(workload)
    if key in CONVOLUTIONS:
        model = copy.deepcopy(workload.model).to(memory_format=torch.channels_last)
        asked = dataclasses.replace(workload, model=model)
        runs[ASKED] = lambda: ours(asked, batching=iopt.Batching(threads=THREADS))
    seconds = interleaved(runs, rounds=rounds, warmup=1)
    own = seconds["ours"]
    row = {"workload": workload.name, "ours, ms": own * 1e3}
    for name in ("ours, compiled", ASKED):
        seconds.setdefault(name, float("nan"))
    row |= {name: s / own for name, s in seconds.items() if name != "ours"}
    row["best peer"] = (
        min(seconds[name] for name in CONTENDERS if not name.startswith("ours")) / own
    )
    return row


def memory(name, key, steps):
    """Bytes above the inputs at the peak of one meta-gradient, in a process of its own."""
    code = (
        "import dataclasses, torch; from benchmarks.peers import CONTENDERS\n"
        "from benchmarks.workloads import WORKLOADS; from tests.memory import PeakMemory\n"
        f"torch.manual_seed(0); torch.set_num_threads({THREADS})\n"
        f"w = dataclasses.replace(WORKLOADS[{key!r}](), steps={steps})\n"
        f"with PeakMemory() as memory: CONTENDERS[{name!r}](w)\n"
        "print(memory.peak)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def main(keys=TIMED):
    torch.set_num_threads(THREADS)
    rows, lean = [], []
    for key in keys:
        rows.append(timed(key, rounds=5 if "conv" in key else 15))
        save("speed", {"time": rows, "memory": lean})  # a kill loses one workload
    print("Times of one meta-gradient, in ours (16 inner steps, 5 CG steps):\n")
    print(table(rows))
    names = [n for n in CONTENDERS if n != "ours, first order"]
    for steps in MEMORY_STEPS:
        fit = [n for n in names if steps <= 16 or "MAML" not in n]
        lean.append({"inner steps": steps})
        lean[-1] |= {n: memory(n, "conv-20way-1", steps) / 2**20 for n in fit}
    print("\nPeak memory in MiB, conv, 20-way 5-shot, 1 task:\n")
    print(table([{k: row.get(k, float("nan")) for k in lean[0]} for row in lean]))
    print(f"\nsaved {save('speed', {'time': rows, 'memory': lean})} and {picture(rows)}")


def picture(rows):
    names = [n for n in CONTENDERS if not n.startswith("ours")]
    fig, ax = plt.subplots(figsize=(9, 4))
    for i, name in enumerate(names):
        places = [j + (i - len(names) / 2) / (len(names) + 2) for j in range(len(rows))]
        ax.bar(places, [row[name] for row in rows], width=1 / (len(names) + 2), label=name)
    ax.axhline(1, color="black", linewidth=1)
    ax.set_xticks(
        range(len(rows)), [row["workload"].replace(", ", "\n") for row in rows], fontsize=8
    )
    ax.set_yscale("log")
    ax.set_ylabel("time / ours")
    ax.set_title("One meta-gradient: 16 inner steps, 5 CG steps")
    ax.legend(fontsize=8)
    fig.tight_layout()
    path = RESULTS.parent.parent / "docs" / "pictures" / "speed.png"
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path
