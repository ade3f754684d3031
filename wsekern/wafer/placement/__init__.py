"""Where the PEs of a program lie: on a physical wafer with its defects, or on devices that work.

Imports `wsekern.hardware` and `wsekern.wafer.axes` alone, so that `wsekern.wafer.wafer` can build
on it.
"""
