"""2,000 meta-steps in one process: memory, tensors and Python objects must not grow.

Four learners take turns: plain gradient descent, dropout, batch norm by task, Newton-CG. The slope is
that of a straight line through what was counted after the first 400 steps.
"""

import gc
import resource
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import implicit_optim as iopt
from benchmarks.measure import save, table
from implicit_optim.tasks import MLP, sinusoids

STEPS, EVERY, WARM = 2_000, 50, 400


def learners():
    gd = iopt.gd(lr=0.01, max_steps=8)
    dropout = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 1))
    norm = nn.Sequential(nn.Linear(1, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 1))
    per_task = iopt.RunningStats.PER_TASK
    quiet = {"lam": 1.0, "on_solve": iopt.Ignore()}
    return [
        iopt.MetaLearner(MLP(1, (40, 40), 1), F.mse_loss, solver=gd, **quiet),
        iopt.MetaLearner(dropout, F.mse_loss, solver=gd, stochastic=True, **quiet),
        iopt.MetaLearner(norm, F.mse_loss, solver=gd, running_stats=per_task, **quiet),
        iopt.MetaLearner(
            MLP(1, (40, 40), 1), F.mse_loss, solver=iopt.newton_cg(max_steps=2), **quiet
        ),
    ]


def resident():
    """Bytes of memory that the process holds now; its peak where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def count(step):
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in objects)
    return {"step": step, "rss": resident(), "tensors": tensors, "objects": len(objects)}


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    taking_turns = [
        (meta, torch.optim.Adam(meta.parameters(), lr=1e-3), stream)
        for meta in learners()
        for stream in [iter(sinusoids(tasks=8, shots=10, queries=10))]
    ]
    counts = []
    for step in tqdm(range(STEPS), desc="soak"):
        meta, opt, stream = taking_turns[step % len(taking_turns)]
        loss = meta(*next(stream)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if (step + 1) % EVERY == 0:
            counts.append(count(step + 1))
    late = [c for c in counts if c["step"] > WARM]
    at = [c["step"] for c in late]
    rows = [
        {
            "what": what,
            f"after {WARM + EVERY}": late[0][what],
            f"after {STEPS}": late[-1][what],
            "slope per 1,000 steps": float(np.polyfit(at, [c[what] for c in late], 1)[0]) * 1_000,
        }
        for what in ("rss", "tensors", "objects")
    ]
    print(table(rows))
    print(f"\nsaved {save('soak', rows)}")
