"""Matrix-free solvers of linear systems on fields: one method a file, a `Solution` from each.

An operator is any linear function of a field or a pytree of fields, most often a `wk.stencil` of
one step. Loops and inner products are of whole arrays, which XLA splits as the fields are split. So
the end of a loop is decided once, for all PEs, on every backend.
"""
