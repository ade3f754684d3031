"""This package is the abstract backend: what a program costs, read off its trace.

It may import the rest of wsekern, and nothing above it.
"""
