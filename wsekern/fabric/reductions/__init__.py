"""Reductions over a line of PEs: one algorithm a file, each with its published cost."""
