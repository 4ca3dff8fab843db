"""Measurements. Nothing here is a test: figures are ratios and medians of one interleaved run."""
