"""What a model takes of wafers that nobody has at hand: `python -m models plan`.

May import `wsekern` and the rest of `models`.
"""
