"""Interleaved timing: every contender in turn, medians over the rounds, ratios within a run."""

import json
import math
import platform
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
# glibc keeps what a step frees for the next one, instead of asking for every page again: for every
# contender, who is started with this in its environment.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**29), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
SPELL = 0.05  # seconds; who takes less is called several times in a row, and meets its own caches


def interleaved(contenders, rounds=9, warmup=2):
    """Median seconds of each callable in `contenders`, a dict by name, run in turn."""
    seconds, calls = {name: [] for name in contenders}, dict.fromkeys(contenders, 1)
    for i in tqdm(range(rounds + warmup), leave=False):
        for name, run in contenders.items():
            synchronise()
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            synchronise()
            took = (time.perf_counter() - start) / calls[name]
            if i >= warmup:
                seconds[name].append(took)
            elif i == warmup - 1:
                calls[name] = math.ceil(SPELL / max(took, 1e-4))
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "gpu": gpu,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name, rows, folder=RESULTS):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(compact({"machine": machine(), "rows": rows}) + "\n")
    return path


def compact(value):
    """JSON with a line for each record (a dict in a list), floats to four digits."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return "[\n" + ",\n".join(json.dumps(rounded(v)) for v in value) + "\n]"
    if isinstance(value, dict) and any(isinstance(v, (dict, list)) for v in value.values()):
        parts = (f"{json.dumps(str(key))}: {compact(v)}" for key, v in value.items())
        return "{\n" + ",\n".join(parts) + "\n}"
    return json.dumps(rounded(value))


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(rows):
    """Rows (dicts with the same keys) as markdown."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
