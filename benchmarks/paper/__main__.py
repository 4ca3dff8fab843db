"""The paper's results, one command each: `python -m benchmarks.paper RESULT --help`."""

import argparse

from benchmarks.paper import curvatures, fig2a, fig2b, methods, summary, table1, table2, table3

RESULTS = {
    "table1": table1,
    "fig2a": fig2a,
    "fig2b": fig2b,
    "table2": table2,
    "table3": table3,
    "curvatures": curvatures,
    "methods": methods,
    "summary": summary,
}

parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
choices = parser.add_subparsers(dest="result", required=True)
for name, module in RESULTS.items():
    line = module.__doc__.partition("\n")[0]
    choice = choices.add_parser(
        name,
        help=line,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(choice)
args = parser.parse_args()
RESULTS[args.result].main(args)
