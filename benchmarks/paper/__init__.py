"""The paper's results, one command each: see `python -m benchmarks.paper --help`."""
