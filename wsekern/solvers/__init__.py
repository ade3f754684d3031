"""This package is solvers of linear systems on fields, matrix-free: one a file, one result for all.

An operator is any linear function of a field or a pytree of fields, most often a `wk.stencil` of
one step. Loops and inner products are of whole arrays, which XLA splits as the fields are split: so
the end of a loop is decided once, for all PEs, on every backend.
"""
