"""The kernels, one folder a family: whole arrays in and out, tiles and `wsekern.fabric` inside.

A family may import `wsekern.wafer` and `wsekern.fabric`, and no other family.
"""
