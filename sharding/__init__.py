"""Where every array lives: the rule table, and the layout of a whole train state.

May import `wsekern` alone; `models`, `training` and `serving` stand above it. Import the file that
you mean: `from sharding.rules import spec_of`, `from sharding.state import lay_out`.
"""
