"""`make bench`: run every benchmark; tables go to the terminal, figures to benchmarks/results/."""

from benchmarks import cost

cost.main()
