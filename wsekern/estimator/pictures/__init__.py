"""Pictures of an estimate: maps, timelines, plots, and one page with all of them.

They need the extra `viz`, except for the timeline and the map in a terminal.
"""
