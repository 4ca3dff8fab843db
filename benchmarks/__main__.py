"""`make bench`: run every benchmark, or those named; figures go to benchmarks/results/.

python -m benchmarks [cost] [scaling] [products] [approximations] [profiles] [speed] [soak] [import_time]
"""

import argparse
import os
import sys

from benchmarks import (
    approximations,
    cost,
    import_time,
    products,
    profiles,
    scaling,
    soak,
    speed,
)
from benchmarks.measure import ALLOCATOR

BENCHMARKS = {
    "cost": cost.main,
    "scaling": scaling.main,
    "products": products.main,
    "approximations": approximations.main,
    "profiles": profiles.main,
    "speed": speed.main,
    "soak": soak.main,
    "import_time": import_time.main,
}

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}")
names = parser.parse_args().names
unknown = set(names) - set(BENCHMARKS)
if unknown:
    parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
if not any(
    name.startswith("MALLOC_") for name in os.environ
):  # for all contenders, see docs/cost.md
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *names], os.environ | ALLOCATOR)
for name in names or BENCHMARKS:
    BENCHMARKS[name]()
