"""Every speed claim, side by side with what a user would pick instead: `python -m benchmarks`.

May import every other folder; none imports it.
"""
