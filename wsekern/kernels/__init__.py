"""The kernels, one file a family: whole arrays in and out, tiles and `wsekern.fabric` inside.

May import `wsekern.fabric`, `wsekern.layout`, `wsekern.context`, `wsekern.wafer` and each other.
"""
