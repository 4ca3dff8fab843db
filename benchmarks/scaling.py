"""How one meta-gradient's time grows with tasks T, parameters n, inner steps K and CG steps C.

One of them varies at a time, from a base point of T = 32 (4 where n varies), K = 16, C = 5. The slope
is that of log time over log size between the two largest sizes: 1 is linear.
"""

import dataclasses
import math

import matplotlib
import torch

from benchmarks.measure import RESULTS, interleaved, save, table
from benchmarks.peers import ours
from benchmarks.workloads import sinusoid
from implicit_optim.tasks import MLP

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

THREADS, ROUNDS = 2, 5
TASKS = (1, 4, 16, 64, 256)
WIDTHS = (20, 40, 80, 160, 320)
STEPS = (1, 2, 4, 8, 16, 32, 64)
CG_STEPS = (1, 2, 4, 8, 16, 32)


def axes():
    """The workloads of each axis, by size."""
    base, few = sinusoid(32), sinusoid(4)
    nets = [MLP(1, (width, width), 1) for width in WIDTHS]
    return {
        "tasks T": {t: sinusoid(t) for t in TASKS},
        "parameters n": {parameters(m): dataclasses.replace(few, model=m) for m in nets},
        "inner steps K": {k: dataclasses.replace(base, steps=k) for k in STEPS},
        "CG steps C": {c: dataclasses.replace(base, cg=c) for c in CG_STEPS},
    }


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def timed(axis, workloads):
    seconds = interleaved(
        {size: (lambda w=w: ours(w)) for size, w in workloads.items()}, rounds=ROUNDS
    )
    return [{"axis": axis, "size": size, "ms": s * 1e3} for size, s in seconds.items()]


def slope(rows):
    """Of log time over log size, between the last two rows."""
    before, last = rows[-2:]
    return math.log(last["ms"] / before["ms"]) / math.log(last["size"] / before["size"])


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rows = {axis: timed(axis, workloads) for axis, workloads in axes().items()}
    slopes = {axis: slope(points) for axis, points in rows.items()}
    every = [row for points in rows.values() for row in points]
    print("Time of one meta-gradient, sinusoid MLP, medians:\n")
    print(table(every))
    print("\nSlope of log time over log size, last two points (1 is linear):\n")
    print(table([{"axis": axis, "slope": value} for axis, value in slopes.items()]))
    saved = save("scaling", {"time": every, "slopes": slopes})
    print(f"\nsaved {saved} and {picture(rows, slopes)}")


def picture(rows, slopes):
    fig, grid = plt.subplots(2, 2, figsize=(8, 6))
    for ax, (axis, points) in zip(grid.flat, rows.items(), strict=True):
        sizes, times = [p["size"] for p in points], [p["ms"] for p in points]
        ax.plot(sizes, times, "o-", label=f"measured, slope {slopes[axis]:.2f} at the end")
        ax.plot(
            sizes, [times[0] * s / sizes[0] for s in sizes], "k--", linewidth=1, label="slope 1"
        )
        ax.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        ax.legend(fontsize=8)
    fig.suptitle("One meta-gradient of the sinusoid MLP")
    fig.tight_layout()
    path = RESULTS.parent.parent / "docs" / "pictures" / "scaling.png"
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path
