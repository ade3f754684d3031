"""The abstract backend: the cost of a program on a wafer, read off its trace.

It may import the rooms below it in wsekern, and nothing above.
"""
