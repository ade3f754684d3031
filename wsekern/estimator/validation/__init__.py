"""This package is the programs whose times on a wafer were published, written as kernels.

They run on every backend, as any kernel does; the estimator is held against their published times.
"""
