"""What `import implicit_optim` costs after `import torch`: medians of fresh processes.

python -m benchmarks import_time
"""

import json
import os
import statistics
import subprocess
import sys

from tqdm import tqdm

from benchmarks.measure import save, table

PROCESSES = 9
SCRIPT = """
import json, sys, time

def clocks():
    return time.perf_counter(), time.process_time()

start = clocks()
import torch
middle, before = clocks(), len(sys.modules)
import implicit_optim
end, after = clocks(), len(sys.modules)
rows = (start, middle, before), (middle, end, after - before)
print(json.dumps([[*(b - a for a, b in zip(one, two)), count] for one, two, count in rows]))
"""


def once():
    """``[wall s, CPU s, modules]`` of both imports in a process of their own, bytecode kept."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", SCRIPT]
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


def main(processes=PROCESSES):
    once()  # compiles to bytecode and fills the caches of the disk
    runs = [once() for _ in tqdm(range(processes), desc="imports", leave=False)]
    rows = []
    for name, column in zip(
        ("torch", "implicit_optim, after torch"), zip(*runs, strict=True), strict=True
    ):
        wall, cpu, modules = zip(*column, strict=True)
        rows.append(
            {
                "import": name,
                "wall ms": 1e3 * statistics.median(wall),
                "CPU ms": 1e3 * statistics.median(cpu),
                "least wall ms": 1e3 * min(wall),
                "modules": modules[0],
                "processes": processes,
            }
        )
    print(table(rows))
    print(save("import_time", rows))


if __name__ == "__main__":
    main()
