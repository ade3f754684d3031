"""The kernels, one file a family: whole arrays in and out, tiles and `wsekern.fabric` inside.

May import `wsekern.fabric`, `wsekern.wafer.layout`, `wsekern.wafer.context`, `wsekern.wafer.wafer` and each other.
"""
