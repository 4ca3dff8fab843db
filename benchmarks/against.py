"""One meta-gradient of this checkout and of another one, in turn: medians, and their ratio.

python -m benchmarks.against ../other [workload ...]

Each checkout has a process of its own, which waits for its turn; both have the same environment, two
intra-op threads, and what the row's name says was asked for.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import ALLOCATOR, save, table

HERE = Path(__file__).resolve().parent.parent
ROUNDS, SPELL = 15, 0.3  # seconds in which a short step is repeated

SERVER = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(2)
import implicit_optim as iopt
from benchmarks.workloads import WORKLOADS
from benchmarks.peers import ours
asked = {asked}
torch.manual_seed(0)
w = WORKLOADS[{key!r}]()
if asked.pop("channels_last", False):
    w.model.to(memory_format=torch.channels_last)
calls = 1
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(calls):
        ours(w, **asked)
    took = (time.perf_counter() - start) / calls
    calls = int(line) or max(1, round({spell} / took))
    print(took, calls, flush=True)
"""

CALL = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import implicit_optim as iopt
model = torch.nn.Linear(3, 1)
meta = iopt.MetaLearner(model, torch.nn.functional.mse_loss, solver=iopt.gd(lr=0.1, max_steps=1))
x, phi = torch.randn(1, 5, 3), {{k: p.detach()[None] for k, p in model.named_parameters()}}
calls = 1
for line in sys.stdin:
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(calls):
            meta.predict(phi, x)
    took = (time.perf_counter() - start) / calls
    calls = int(line) or max(1, round({spell} / took))
    print(took, calls, flush=True)
"""

THREADS = "dict(batching=iopt.Batching(threads=2), channels_last=True)"
CONVOLUTIONS = ("conv-4", "conv-16", "conv-32", "conv-20way-4")
ROWS = {
    "sinusoid": ("sinusoid", "{}"),
    "call": ("call", "{}"),
    **{f"{key}, threads=2, channels_last": (key, THREADS) for key in CONVOLUTIONS},
    **{f"{key}, nothing asked for": (key, "{}") for key in CONVOLUTIONS},
}


class Contender:
    """A process that takes a step whenever it is told to."""

    def __init__(self, checkout, key, asked):
        code = (CALL if key == "call" else SERVER).format(key=key, asked=asked, spell=SPELL)
        environment = os.environ | ALLOCATOR | {"PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], cwd=checkout, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.calls = 1

    def step(self, calls):
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        took, calls = self.process.stdout.readline().split()
        return float(took), int(calls)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compared(other, key, asked, rounds):
    """Median seconds of both; the other checkout is never asked for anything."""
    both = Contender(HERE, key, asked), Contender(other, key, "{}")
    try:
        for contender in both:
            contender.step(0)
            _, contender.calls = contender.step(0)
            contender.step(contender.calls)
        seconds = [[], []]
        for _ in range(rounds):
            for contender, mine in zip(both, seconds, strict=True):
                mine.append(contender.step(contender.calls)[0])
        return [statistics.median(mine) for mine in seconds]
    finally:
        for contender in both:
            contender.close()


def main(other, names, rounds=ROUNDS):
    rows = []
    for name in names:
        ours, theirs = compared(other, *ROWS[name], rounds)
        rows.append({"workload": name, "ours, ms": ours * 1e3, "theirs, ms": theirs * 1e3})
        rows[-1]["ours / theirs"] = ours / theirs
        print(rows[-1], flush=True)
    print(table(rows))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rows", nargs="+", dest="names", metavar="row", help=f"of {list(ROWS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    rows = main(given.other.resolve(), given.names or ROWS, given.rounds)
    if not given.names:
        print("saved", save("against", rows))
