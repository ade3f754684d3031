"""This package is what can be seen of an estimate: maps, timelines, plots and one page of it all.

It may import the rest of wsekern, and nothing above it. Pictures need the extra `viz`.
"""
